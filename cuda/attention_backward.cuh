// SPDX-License-Identifier: MIT
// What attention's backward passes share: a block's work, and turns at dQ in device memory.
#pragma once
#include "attention.cuh"

// What a block of a backward pass needs once a step or less: in shared memory, so that it does not take registers
// from the sums. Pointers are those of the document and the first of the heads that share its keys.
template <typename T>
struct Work {
  const T *q, *dout;
  const float2* statistics;
  T *dq, *dk, *dv;
  float* sums;
  int* turns;
  Angles angles;
  Tile tile;
  int kv_head;

  // By one thread, from pointers to the whole; ROWS queries in a tile.
  template <int ROWS, int D>
  __device__ __forceinline__ void take(const Work& all, const Tile* tiles, const Layout& q_layout,
                                       const Layout& do_layout, long long angles_batch, long long tokens,
                                       int row_length, int query_tiles, int heads, int group, int dim) {
    // Blocks take work in the order in which they start.
    const int ticket = atomicAdd(all.turns, 1), kv_heads = heads / group;
    const Tile taken = tiles[ticket / kv_heads];
    const int number = ticket % kv_heads, head = number * group;
    tile = taken;
    angles = all.angles.of(taken, row_length, angles_batch);
    kv_head = number;
    q = rows_of(all.q, q_layout, taken, row_length, head);
    dout = rows_of(all.dout, do_layout, taken, row_length, head);
    statistics = all.statistics + head * tokens + taken.start;
    dq = all.dq + (taken.start * static_cast<long long>(heads) + head) * dim;
    const long long at = (taken.start * static_cast<long long>(kv_heads) + number) * dim;
    dk = all.dk + at;
    dv = all.dv + at;
    // Tiles of queries of all documents have room for a short one at the end of each.
    const int query_tile = number * query_tiles + taken.start / ROWS + taken.document;
    turns = all.turns + 1 + query_tile * group;
    sums = all.sums + query_tile * static_cast<long long>(group * ROWS * D);
  }
};

// A turn is seen by a plain load, ahead of its need: what was added before it was passed is in the L2 cache by
// then, where all that depends on it happens too (red, ld.cg).
__device__ __forceinline__ int look_at_turn(const int* turn) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(turn) : "memory");
  return value;
}

__device__ __forceinline__ void wait_for_turn(const int* turn, int wanted) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(turn) : "memory");
  } while (value != wanted);
}

__device__ __forceinline__ void pass_turn(int* turn, int next) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
}

__device__ __forceinline__ void add_in_memory(float* to, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]),
               "f"(v[3])
               : "memory");
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(to + e, v[e]);
#endif
}

// Eight bytes to shared memory without a register; zeros where there is nothing.
__device__ __forceinline__ void copy_pair_async(float2* to, const float2* from, bool exists) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 8 : 0)
               : "memory");
#else
  *to = exists ? *from : float2{0.f, 0.f};
#endif
}
