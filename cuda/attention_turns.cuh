// SPDX-License-Identifier: MIT
// How blocks of attention's backward passes take turns at dQ in device memory.
#pragma once
#include "mma.cuh"

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
