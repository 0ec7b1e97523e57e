// SPDX-License-Identifier: MIT
// Forward pass of RMSNorm and LayerNorm; formulas and layout are in norm.cuh.
#pragma once
#include "norm.cuh"

// Block: a row of `width` threads, or several narrower than a warp. One row each: on H200 more blocks hide
// latency better than a persistent grid that reads ahead, if registers leave room for all 2048 threads (32
// each) or nearly (40 where two rows are read).
template <bool RESIDUAL, bool WIDE, int ITEMS>
constexpr int kBlocks = WIDE || ITEMS == 0 || ITEMS > 2 ? 2 : RESIDUAL ? 3 : 4;

template <bool LAYER, bool RESIDUAL, typename T, typename W, typename O, int VEC, int ITEMS>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<RESIDUAL, sizeof(O) != sizeof(T), ITEMS>)
    norm_forward(const T* __restrict__ x,         // [rows, dim]
                 const T* __restrict__ residual,  // [rows, dim] if RESIDUAL
                 const W* __restrict__ w,         // [dim]
                 const W* __restrict__ b,         // [dim] or null
                 O* __restrict__ y,               // [rows, dim]
                 T* __restrict__ h,               // [rows, dim] if RESIDUAL
                 float2* __restrict__ stats,      // [rows] mean and r if LAYER, kept for the backward pass
                 long long rows, int dim, int width, float eps, int rounding) {
  constexpr int kSums = LAYER ? 2 : 1;
  __shared__ float scratch[2][kMaxWarps][kSums];
  const Group group(width);
  const long long row = (long long)blockIdx.x * (blockDim.x / width) + group.index;
  const int vectors = dim / VEC;
  const bool active = row < rows;  // inactive threads still take part in the sums
  x += row * dim;
  y += row * dim;
  if constexpr (RESIDUAL) residual += row * dim, h += row * dim;

  // A vector of h, written out if it is a sum.
  const auto read = [&](int i) {
    Held<T, VEC> v(x, i);
    if constexpr (RESIDUAL) {
      float sum[VEC], addend[VEC];
      v.unpack(sum);
      Held<T, VEC>(residual, i).unpack(addend);
#pragma unroll
      for (int e = 0; e < VEC; ++e) sum[e] += addend[e];
      v.pack(sum);
      v.store(h, i);
    }
    return v;
  };
  Held<T, VEC> held[ITEMS > 0 ? ITEMS : 1];
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
      if (active && group.lane + k * width < vectors) held[k] = read(group.lane + k * width);
  } else if (RESIDUAL && active) {
    for (int i = group.lane; i < vectors; i += width) read(i);
  }

  // Sum over the row of (v - pivot)^2, and for LAYER of v - pivot before it.
  int parity = 0;
  float sums[kSums];
  const auto sum = [&](float pivot) {
    float squares = 0.0f, values = 0.0f;
    const auto include = [&](const Held<T, VEC>& from) {
      float v[VEC];
      from.unpack(v);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const float d = LAYER ? v[e] - pivot : v[e];
        if constexpr (LAYER) values += d;
        squares += d * d;
      }
    };
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k)
        if (active && group.lane + k * width < vectors) {
          held[k].hide();
          include(held[k]);
        }
    } else if (active) {
      for (int i = group.lane; i < vectors; i += width)
        include(Held<T, VEC>(RESIDUAL ? h : x, i));
    }
    sums[0] = values;
    sums[kSums - 1] = squares;
    group_sum<true>(sums, group, scratch[parity]);
    parity ^= 1;
  };
  float mean = 0.0f, variance;
  if constexpr (LAYER) {
    sum(0.0f);
    mean = sums[0] / dim;
    variance = sums[1] / dim - mean * mean;
    // Where the mean is too far from zero the sums of squares have cancelled: once more, about the mean. At
    // a standard deviation one bit is lost, which fp32 results would show.
    constexpr float kFar = sizeof(O) == 4 ? 16.0f : 1.0f;
    if (__any_sync(kAllLanes, kFar * mean * mean > variance)) {
      sum(mean);
      const float shift = sums[0] / dim;
      variance = sums[1] / dim - shift * shift;
      mean += shift;
    }
  } else {
    sum(0.0f);
    variance = sums[0] / dim;
  }
  const float r = rsqrtf(variance + eps);
  if (!active) return;
  if (LAYER && group.lane == 0) stats[row] = {mean, r};

  const float offset = rounding == kZeroCentered ? 1.0f : 0.0f;
  const auto write = [&](int i, const Held<T, VEC>& from) {
    float v[VEC], scale[VEC], shift[VEC] = {};
    from.unpack(v);
    Held<W, VEC>(w, i).unpack(scale);
    if (LAYER && b != nullptr) Held<W, VEC>(b, i).unpack(shift);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      if constexpr (LAYER)
        v[e] = centre<O>(v[e], mean, r) * scale[e] + shift[e];
      else if (rounding == kLlama)
        v[e] = scale[e] * to_float(from_float<T>(v[e] * r));
      else
        v[e] = v[e] * r * (offset + scale[e]);
    }
    Held<O, VEC> out;
    out.pack(v);
    out.store(y, i);
  };
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
      if (group.lane + k * width < vectors) write(group.lane + k * width, held[k]);
  } else {
    for (int i = group.lane; i < vectors; i += width)
      write(i, Held<T, VEC>(RESIDUAL ? h : x, i));
  }
}
