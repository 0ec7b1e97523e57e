// SPDX-License-Identifier: MIT
// Sums over the threads that share a row, in an order that depends on nothing but their number.
#pragma once

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 32;

// Sum of `value` over groups of `width` consecutive lanes; width is a power of two up to 32.
__device__ __forceinline__ float warp_sum(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Sum over the `width` threads of a row: part of a warp, or else the whole block. Every thread of the
// block must call it. `scratch` holds kMaxWarps floats; a caller that sums again before the next
// barrier must alternate between two of them, which saves a second barrier per sum.
__device__ __forceinline__ float row_sum(float value, int width, float* scratch) {
  if (width <= kWarp) return warp_sum(value, width);
  value = warp_sum(value, kWarp);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = lane < width / kWarp ? scratch[lane] : 0.0f;
  return warp_sum(value, kWarp);
}
