// SPDX-License-Identifier: MIT
// Hopper's copy engine (TMA): tiles of a matrix between device memory and shared memory, by one thread's word,
// laid out as wgmma reads them (wgmma.cuh); and clusters, whose blocks see each other's shared memory.
#pragma once
#include "wgmma.cuh"

#if __CUDA_ARCH__ >= 900
#define BARQ_CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)
#else
#define BARQ_CLUSTER_OF_TWO  // others have no clusters, and no kernel of theirs is made
#endif

// What the driver made of a matrix and its tiles; a parameter of the kernel (`const __grid_constant__`).
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster.
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Barriers that were made are seen by the copy engine and by other blocks, after `wait_for_cluster`.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and adds the bytes that copies will bring before the barrier is passed.
__device__ __forceinline__ void expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At a barrier of the cluster's block `rank`, where this block has one at `barrier`. Of this thread's writes it
// says nothing to that block: with .release.cluster it would wait for all of them to be seen by the whole GPU.
__device__ __forceinline__ void arrive_at(unsigned barrier, int rank) {
  asm volatile(
      "{ .reg .b32 to; mapa.shared::cluster.u32 to, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [to]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// The map's tile whose first element has this column and row. What is outside the matrix comes as zeros.
__device__ __forceinline__ void load_tile(const TensorMap& map, unsigned to, int column, int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// To the same place in two blocks, where it arrives at the barriers of the same place.
__device__ __forceinline__ void load_tile_for_both(const TensorMap& map, unsigned to, int column, int row,
                                                   unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<unsigned short>(3))
      : "memory");
}
// What is outside the matrix is not stored.
__device__ __forceinline__ void store_tile(const TensorMap& map, unsigned from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until shared memory of all but the thread's last LEFT tiles may be written again.
template <int LEFT>
__device__ __forceinline__ void wait_for_stores_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
