// SPDX-License-Identifier: MIT
// Forward pass of RMSNorm and LayerNorm; formulas and layout are in norm.cuh.
#pragma once
#include "norm.cuh"

// Block: (threads of a row, rows), one row or several narrower than a warp. One row each: on H200 more blocks
// hide latency better than a persistent grid that reads ahead, in registers or in shared memory by the bulk copy
// engine. Without a residual a thread has two or four vectors, so that few threads wait for each other; with one
// it reads two tensors, and a vector of each is enough. The weight is read with the row, not after the sum.
template <typename T, typename W, typename O>
constexpr bool kOneSize = sizeof(W) == sizeof(T) && sizeof(O) == sizeof(T);
template <bool ONE_SIZE, int ITEMS>
constexpr int kForwardThreads = !ONE_SIZE ? 512 : ITEMS == 1 ? 1024 : ITEMS == 2 ? 256 : 512;
// For 32 registers a thread, 40 with two vectors, 64 with four or with y of another size.
template <typename T, typename W, typename O, int ITEMS>
constexpr int kForwardBlocks = sizeof(O) != sizeof(T) || ITEMS % 4 == 0 ? 2
                               : !kOneSize<T, W, O>                     ? 4
                               : ITEMS == 2                             ? 6
                                                                        : 2;

template <bool LAYER, bool RESIDUAL, typename T, typename W, typename O, int VEC, int ITEMS>
__global__ void __launch_bounds__(kForwardThreads<kOneSize<T, W, O>, ITEMS>,
                                  kForwardBlocks<T, W, O, ITEMS>)
    norm_forward(const T* __restrict__ x,         // [rows, dim]
                 const T* __restrict__ residual,  // [rows, dim] if RESIDUAL
                 const W* __restrict__ w,         // [dim]
                 const W* __restrict__ b,         // [dim] or null
                 O* __restrict__ y,               // [rows, dim]
                 T* __restrict__ h,               // [rows, dim] if RESIDUAL
                 float2* __restrict__ stats,      // [rows] mean and r if LAYER, kept for the backward pass
                 long long rows, int dim, float eps, int rounding) {
  constexpr int kSums = LAYER ? 2 : 1, kHeld = ITEMS > 0 ? ITEMS : 1;
  // Where the weight finds registers beside the row.
  constexpr bool kEarly = ITEMS > 0 && kOneSize<T, W, O> && !(LAYER && RESIDUAL && ITEMS == 4);
  __shared__ float scratch[2][kMaxWarps][kSums];
  const Group group;
  const int width = group.width, vectors = dim / VEC;
  const long long row = (long long)blockIdx.x * blockDim.y + group.index;
  const bool active = row < rows;  // inactive threads still take part in the sums
  const long long start = (active ? row : rows - 1) * dim;
  x += start;
  y += start;
  if constexpr (RESIDUAL) residual += start, h += start;
  // A thread's k-th vector. One past the end of the row, or of a row past the last, is loaded in bounds and
  // left out of sums and stores: loads without branches are all under way at once.
  const auto place = [&](int k) { return min(group.lane + k * width, vectors - 1); };
  const auto inside = [&](int k) { return active && group.lane + k * width < vectors; };

  // v becomes the sum, written out.
  const auto add = [&](Held<T, VEC>& v, const Held<T, VEC>& more, int i, bool write) {
    float sum[VEC], addend[VEC];
    v.unpack(sum), more.unpack(addend);
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum[e] += addend[e];
    v.pack(sum);
    if (write) v.store(h, i);
  };
  Held<T, VEC> held[kHeld], more[RESIDUAL ? kHeld : 1];
  Held<W, VEC> scales[kEarly ? kHeld : 1];
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      load_kept(held[k], x, place(k));
      if constexpr (RESIDUAL) load_kept(more[k], residual, place(k));
    }
    if constexpr (kEarly)
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) load_kept(scales[k], w, place(k));
    if constexpr (RESIDUAL)
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) add(held[k], more[k], place(k), inside(k));
  } else if (RESIDUAL && active) {
    for (int i = group.lane; i < vectors; i += width) {
      load_kept(held[0], x, i);
      add(held[0], Held<T, VEC>(residual, i), i, true);
    }
  }
  // Of the row; 16 bits do not show the rounding of a reciprocal, found while the loads are under way.
  const float share = 1.0f / dim;
  const auto average = [&](float sum) { return sizeof(O) == 4 ? sum / dim : sum * share; };

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
      for (int k = 0; k < ITEMS; ++k) {
        held[k].hide();
        if (inside(k)) include(held[k]);
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
    mean = average(sums[0]);
    variance = average(sums[1]) - mean * mean;
    // Where the mean is too far from zero the sums of squares have cancelled: once more, about the mean. At
    // a standard deviation one bit is lost, which fp32 results would show.
    constexpr float kFar = sizeof(O) == 4 ? 16.0f : 1.0f;
    if (__any_sync(kAllLanes, kFar * mean * mean > variance)) {
      sum(mean);
      const float shift = average(sums[0]);
      variance = average(sums[1]) - shift * shift;
      mean += shift;
    }
  } else {
    sum(0.0f);
    variance = average(sums[0]);
  }
  const float r = inverse_root<O>(variance + eps);
  if (!active) return;
  if (LAYER && group.lane == 0) stats[row] = {mean, r};

  const float offset = rounding == kZeroCentered ? 1.0f : 0.0f;
  const auto write = [&](int i, const Held<T, VEC>& from, const Held<W, VEC>& by) {
    float v[VEC], scale[VEC], shift[VEC] = {};
    from.unpack(v);
    by.unpack(scale);
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
    for (int k = 0; k < ITEMS; ++k) {
      const int i = group.lane + k * width;
      if (i < vectors) write(i, held[k], kEarly ? scales[kEarly ? k : 0] : Held<W, VEC>(w, i));
    }
  } else {
    for (int i = group.lane; i < vectors; i += width)
      write(i, Held<T, VEC>(RESIDUAL ? h : x, i), Held<W, VEC>(w, i));
  }
}
