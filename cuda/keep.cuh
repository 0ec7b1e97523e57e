// SPDX-License-Identifier: MIT
// Loads that ask the L2 cache to keep what they read.
#pragma once
#include "vector.cuh"

// Reads a vector with priority evict_last: in the L2 cache lines that wait to be written then give way to those
// that were read. On an H200 kernels that read and write at copy speed take 1 to 4 % less time, with 4 or 16 sets
// of inputs in turn alike, and the kernels before and after lose nothing; evict_first and no_allocate cost 2 to
// 5 %. The asm is volatile, or the compiler would move it down to its first use and loads would not overlap.
template <typename T, int VEC>
__device__ __forceinline__ void load_kept(Held<T, VEC>& to, const T* from, long long index) {
#if __CUDA_ARCH__ >= 800
  if constexpr (VEC > 1) {
    unsigned long long keep;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
#pragma unroll
    for (int k = 0; k < to.kWords; ++k) {
      uint4& word = to.words[k];
      asm volatile("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                   : "l"(reinterpret_cast<const uint4*>(from) + index * to.kWords + k), "l"(keep));
    }
    return;
  }
#endif
  to.load(from, index);
}
