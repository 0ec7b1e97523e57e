// SPDX-License-Identifier: MIT
// 2^x and 1 / x as the hardware has them, one instruction each: without ftz they would be four.
#pragma once

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
