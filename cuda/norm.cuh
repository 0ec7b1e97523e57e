// SPDX-License-Identifier: MIT
// What rms_norm.cu and layer_norm.cu share: rows that are read once, normalised, and their gradients.
//
//   h = T(x + residual)                    with RESIDUAL; else h = x
//   RMS:    xhat = h * r                   r = 1 / sqrt(mean(h^2) + eps)
//   LAYER:  xhat = (h - mean) * r          r = 1 / sqrt(var(h) + eps)
//   y = w * T(xhat) | T(xhat * (1 + w)) | T(xhat * w + b)        rounding as transformers' modules do
//   g = dy * w (or dy * (1 + w))
//   RMS:    dh = r * (g - xhat * mean(g * xhat))
//   LAYER:  dh = r * (g - mean(g) - xhat * mean(g * xhat))
//   dw = sum over rows of dy * xhat        db = sum over rows of dy
// With RESIDUAL the gradient that reaches h from elsewhere is added to dh.
//
// Floor for [N, D] of b-byte elements: forward 2*N*D*b, backward 3*N*D*b, each with RESIDUAL 4*N*D*b;
// arithmetic is free.
//
// `width` threads share a row and hold it in registers, ITEMS vectors of 16 bytes each, as the words they
// were read as: unpacked they would take twice the registers. Rows too wide for that (ITEMS == 0) are read
// twice, the second time mostly from cache. VEC == 1 is the path for sizes that are no multiple of 16 bytes
// and for misaligned views.
//
// Backward is persistent, a block per SM: groups of `width` threads walk the rows with the stride of the
// whole grid and read the next row while they work on one, so that the memory is never idle. dw and db stay
// in registers until the block adds up its groups and writes one row of `partial`; column_sum adds those in
// a fixed order. No atomics: results repeat bit for bit.
#pragma once
#include "keep.cuh"
#include "reduce.cuh"

constexpr int kMaxThreads = 512;  // leaves 128 registers to each
// The common backward pass needs 96: it has room for two rows of 5120 elements.
template <bool LAYER, bool RESIDUAL, int ITEMS>
constexpr int kMaxBackward = !LAYER && !RESIDUAL && ITEMS <= 2 ? 640 : kMaxThreads;
enum Rounding { kLlama = 0, kZeroCentered = 1, kOnce = 2 };

// (v - mean) * r, in one instruction where the result is rounded to 16 bits anyway.
template <typename O>
__device__ __forceinline__ float centre(float v, float mean, float r) {
  return sizeof(O) == 4 ? (v - mean) * r : v * r - mean * r;
}

// 1 / sqrt(v). In fp32 results the hardware's error would show: there one step of Newton's follows, in which
// root + rest is v * r, nothing rounded away.
template <typename O>
__device__ __forceinline__ float inverse_root(float v) {
  const float r = rsqrtf(v);
  if (sizeof(O) != 4) return r;
  const float root = v * r, rest = fmaf(v, r, -root);
  const float error = fmaf(-rest, r, fmaf(-root, r, 1.0f));  // 1 - v * r * r
  return root > 0.0f ? fmaf(0.5f * r, error, r) : r;         // v may be zero or infinite
}

// The threads that share a row.
struct Group {
  int index, lane, width;
  // Of a block (width, groups): no division before the first load.
  __device__ Group() : index(threadIdx.y), lane(threadIdx.x), width(blockDim.x) {}
  // Of a block (groups * width).
  __device__ explicit Group(int width) : width(width) {
    index = threadIdx.x / width;
    lane = threadIdx.x - index * width;
  }
  // Meets the others. A group that is not ALONE in its block has a barrier of its own, one of 15; that
  // reserves all of them, which leaves room for few blocks on an SM.
  template <bool ALONE>
  __device__ void sync() const {
    if constexpr (ALONE)
      __syncthreads();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(width) : "memory");
  }
};

// Sums over a group, in an order that depends on `width` alone; all its threads get them. Shuffles are what
// they cost, so two values are summed as one: after the first exchange the lower half of a warp holds the
// one and the upper half the other. `scratch` has kMaxWarps rows; a caller that sums again before its
// group's next barrier must alternate between two of them.
template <bool ALONE, int N>
__device__ __forceinline__ void group_sum(float (&value)[N], const Group& group,
                                          float (*scratch)[N]) {
  static_assert(N <= 2);
  constexpr int kShare = kWarp / N;  // lanes of a warp for each value
  if (group.width < kWarp) {
#pragma unroll
    for (int n = 0; n < N; ++n) value[n] = warp_sum(value[n], group.width);
    return;
  }
  const int lane = group.lane % kWarp, which = lane / kShare;
  float sum = which == 0 ? value[0] : value[N - 1];
  if constexpr (N == 2)
    sum += __shfl_xor_sync(kAllLanes, which == 0 ? value[1] : value[0], kShare);
  sum = warp_sum(sum, kShare);
  if (group.width > kWarp) {
    const int warps = group.width / kWarp, first = group.index * warps, part = lane % kShare;
    if (part == 0) scratch[first + group.lane / kWarp][which] = sum;
    group.sync<ALONE>();
    sum = part < warps ? scratch[first + part][which] : 0.0f;
    if (N == 2 && part + kShare < warps) sum += scratch[first + part + kShare][which];
    sum = warp_sum(sum, kShare);
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    value[n] = N == 1 ? sum : __shfl_sync(kAllLanes, sum, n * kShare);
}
