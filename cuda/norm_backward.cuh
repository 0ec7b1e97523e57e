// SPDX-License-Identifier: MIT
// Backward pass of RMSNorm and LayerNorm, and the sum of its partial dw and db; formulas and layout are in
// norm.cuh.
#pragma once
#include "norm.cuh"

__device__ __forceinline__ void add(float4& to, const float4& more) {
  to.x += more.x, to.y += more.y, to.z += more.z, to.w += more.w;
}

// A row's share of one thread on its way through the backward pass.
template <bool RESIDUAL, typename T, typename O, int VEC, int ITEMS>
struct BackwardRow {
  Held<T, VEC> h[ITEMS], dh[RESIDUAL ? ITEMS : 1];
  Held<O, VEC> dy[ITEMS];
  float2 stats;
};

template <bool LAYER, bool RESIDUAL, typename T, typename W, typename O, int VEC, int ITEMS>
__global__ void __launch_bounds__(kMaxBackward<LAYER, RESIDUAL, ITEMS>, 1)
    norm_backward(const O* __restrict__ dy,         // [rows, dim]
                  const T* __restrict__ dh,         // [rows, dim] if RESIDUAL
                  const T* __restrict__ h,          // [rows, dim]
                  const W* __restrict__ w,          // [dim]
                  const float2* __restrict__ stats,  // [rows] mean and r if LAYER
                  T* __restrict__ dx,               // [rows, dim]
                  float* __restrict__ partial,      // [LAYER ? 2 : 1, gridDim.x, dim], or null: no dw, db
                  long long rows, int dim, int width, float eps, int rounding) {
  constexpr int kHeld = ITEMS > 0 ? ITEMS : 1;
  constexpr int kSets = LAYER ? 2 : 1;
  // The next row is read ahead where the registers allow it.
  constexpr bool kAhead = ITEMS > 0 && ITEMS <= 2 && sizeof(O) == sizeof(T) &&
                          sizeof(W) == sizeof(T) && !(LAYER && RESIDUAL);
  using Row = BackwardRow<RESIDUAL, T, O, VEC, kHeld>;
  __shared__ float scratch[2][kMaxWarps][2];
  const Group group(width);
  const int groups = blockDim.x / width;
  const int vectors = dim / VEC;
  const long long stride = (long long)gridDim.x * groups;
  const float offset = rounding == kZeroCentered ? 1.0f : 0.0f;
  float* own_partial = partial + (long long)blockIdx.x * dim;
  const long long next_set = (long long)gridDim.x * dim;

  float dw[kSets][kHeld][VEC] = {};
  Held<W, VEC> scale[kHeld] = {};
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
      if (group.lane + k * width < vectors) scale[k].load(w, group.lane + k * width);
  } else if (partial != nullptr) {
    for (int i = group.lane; i < dim; i += width)
#pragma unroll
      for (int set = 0; set < kSets; ++set) own_partial[set * next_set + i] = 0.0f;
    __syncthreads();  // a thread adds to columns that others have cleared
  }

  // Words of a vector past the row's end, and of a row past the last, stay zero: they add nothing.
  const auto read = [&](long long row) {
    Row all = {};
    if (row < rows) {
      if constexpr (LAYER) all.stats = stats[row];
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int i = group.lane + k * width;
        if (i < vectors) {
          load_kept(all.h[k], h + row * dim, i);
          load_kept(all.dy[k], dy + row * dim, i);
          if constexpr (RESIDUAL) load_kept(all.dh[k], dh + row * dim, i);
        }
      }
    }
    return all;
  };
  // One vector's part of the two sums over the row.
  const auto project = [&](const Held<T, VEC>& hv, const Held<O, VEC>& dyv,
                           const Held<W, VEC>& wv, float2 row_stats, float(&sums)[2]) {
    float v[VEC], d[VEC], s[VEC];
    hv.unpack(v), dyv.unpack(d), wv.unpack(s);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const float g = d[e] * (LAYER ? s[e] : offset + s[e]);
      if constexpr (LAYER) v[e] = centre<O>(v[e], row_stats.x, row_stats.y);
      sums[0] += LAYER ? g : v[e] * v[e];
      sums[1] += g * v[e];
    }
  };
  // dx = r * g - xhat-or-h * slope - shift, and its part of dw and db.
  const auto finish = [&](const Held<T, VEC>& hv, const Held<O, VEC>& dyv,
                          const Held<W, VEC>& wv, const Held<T, VEC>& dhv, float2 row_stats,
                          float slope, float shift, float* dw_at, float* db_at, T* to, int i) {
    float v[VEC], d[VEC], s[VEC], more[VEC] = {};
    hv.unpack(v), dyv.unpack(d), wv.unpack(s);
    if constexpr (RESIDUAL) dhv.unpack(more);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const float xhat = LAYER ? centre<O>(v[e], row_stats.x, row_stats.y) : v[e] * row_stats.y;
      const float g = d[e] * (LAYER ? s[e] : offset + s[e]);
      dw_at[e] += d[e] * xhat;
      if constexpr (LAYER) db_at[e] += d[e];
      d[e] = row_stats.y * (g - xhat * slope - shift) + more[e];
    }
    Held<T, VEC> out;
    out.pack(d);
    out.store(to, i);
  };

  int parity = 0;
  // `first` is the block's, so that all its threads leave the loop together.
  long long first = (long long)blockIdx.x * groups;
  Row row_now;
  if constexpr (kAhead) row_now = read(first + group.index);
  for (; first < rows; first += stride) {
    const long long row = first + group.index;
    Row row_next;
    if constexpr (kAhead) row_next = read(row + stride);
    if constexpr (ITEMS > 0 && !kAhead) row_now = read(row);
    float2 row_stats = {};
    if constexpr (LAYER && ITEMS > 0) row_stats = row_now.stats;
    if constexpr (LAYER && ITEMS == 0)
      if (row < rows) row_stats = stats[row];

    float sums[2] = {};
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k)
        project(row_now.h[k], row_now.dy[k], scale[k], row_stats, sums);
    } else if (row < rows) {
      for (int i = group.lane; i < vectors; i += width)
        project(Held<T, VEC>(h + row * dim, i), Held<O, VEC>(dy + row * dim, i),
                Held<W, VEC>(w, i), row_stats, sums);
    }
    group_sum<false>(sums, group, scratch[parity]);
    parity ^= 1;
    float slope, shift = 0.0f;
    if constexpr (LAYER) {
      shift = sums[0] / dim;
      slope = sums[1] / dim;
    } else {
      row_stats = {0.0f, inverse_root<O>(sums[0] / dim + eps)};
      slope = sums[1] * row_stats.y / dim;
    }

    T* to = dx + row * dim;
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const int i = group.lane + k * width;
        row_now.h[k].hide(), row_now.dy[k].hide();
        if (row < rows && i < vectors)
          finish(row_now.h[k], row_now.dy[k], scale[k], row_now.dh[RESIDUAL ? k : 0], row_stats,
                 slope, shift, dw[0][k], dw[kSets - 1][k], to, i);
      }
    } else if (row < rows) {
      for (int i = group.lane; i < vectors; i += width) {
        float sum[2][VEC] = {};
        const Held<T, VEC> more = RESIDUAL ? Held<T, VEC>(dh + row * dim, i) : Held<T, VEC>{};
        finish(Held<T, VEC>(h + row * dim, i), Held<O, VEC>(dy + row * dim, i),
               Held<W, VEC>(w, i), more, row_stats, slope, shift, sum[0], sum[1], to, i);
        if (partial != nullptr)
#pragma unroll
          for (int set = 0; set < kSets; ++set)
#pragma unroll
            for (int e = 0; e < VEC; ++e) own_partial[set * next_set + i * VEC + e] += sum[set][e];
      }
    }
    if constexpr (kAhead) row_now = row_next;
  }

  if constexpr (ITEMS > 0) {
    if (partial == nullptr) return;
    // Lanes of a warp that hold the same columns are added by shuffles; then, through shared memory, the
    // groups of the block, in order.
    const bool narrow = width < kWarp;
    const int sums = narrow ? blockDim.x / kWarp : groups;
    const int own_sum = narrow ? threadIdx.x / kWarp : group.index;
    if (narrow)
#pragma unroll
      for (int set = 0; set < kSets; ++set)
#pragma unroll
        for (int e = 0; e < VEC; ++e)  // ITEMS is 1
          for (int offset = kWarp / 2; offset >= width; offset /= 2)
            dw[set][0][e] += __shfl_xor_sync(kAllLanes, dw[set][0][e], offset);
    constexpr int kShared =
        ITEMS <= 2 ? kMaxBackward<LAYER, RESIDUAL, ITEMS> * ITEMS * VEC / 4 : 1;
    __shared__ float4 groups_dw[kShared];
    const int quads = dim / 4;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      float4* to = reinterpret_cast<float4*>(own_partial + set * next_set);
      float4* mine = to;
      if constexpr (ITEMS <= 2) {
        if (sums > 1) mine = groups_dw + own_sum * quads;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const int i = group.lane + k * width;
        const float* from = dw[set][k];
        if (i < vectors && (!narrow || threadIdx.x % kWarp < width))
#pragma unroll
          for (int e = 0; e < VEC; e += 4)
            mine[(i * VEC + e) / 4] = {from[e], from[e + 1], from[e + 2], from[e + 3]};
      }
      __syncthreads();
      if constexpr (ITEMS <= 2) {
        if (sums > 1)
          for (int c = threadIdx.x; c < quads; c += blockDim.x) {
            // Four chains of additions: shorter ones lose less.
            float4 sum[4] = {};
            for (int g = 0; g < sums; g += 4)
#pragma unroll
              for (int k = 0; k < 4; ++k)
                if (g + k < sums) add(sum[k], groups_dw[(g + k) * quads + c]);
            add(sum[0], sum[1]), add(sum[2], sum[3]), add(sum[0], sum[2]);
            to[c] = sum[0];
          }
      }
    }
  }
}

// out[c] = sum over parts of partial[p, c], in fp32 and in a fixed order; blockIdx.y chooses dw or db.
// A block has 32 columns: eight threads with four of them each read a row, so that nearly all rows are
// asked for at once. VEC == 1 where dim is no multiple of 4: the columns of a thread are then 8 apart.
constexpr int kColumns = 32, kSumThreads = 1024;
template <typename W, int VEC>
__global__ void __launch_bounds__(kSumThreads, 1)
    column_sum(const float* __restrict__ partial,  // [gridDim.y, parts, dim]
               W* __restrict__ dw,                 // [dim]
               W* __restrict__ db,                 // [dim] if gridDim.y == 2
               int parts, int dim) {
  __shared__ float sums[kMaxWarps][kColumns + 1];  // + 1: a column is read by a warp, from 32 banks
  partial += (long long)blockIdx.y * parts * dim;
  const int lane = threadIdx.x % 8, column = blockIdx.x * kColumns + (VEC == 4 ? 4 * lane : lane);
  float sum[4] = {};
  for (int p = threadIdx.x / 8; p < parts; p += kSumThreads / 8) {
    const float* row = partial + (long long)p * dim;
    if constexpr (VEC == 4) {
      if (column < dim) {
        const float4 v = *reinterpret_cast<const float4*>(row + column);
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column + 8 * e < dim) sum[e] += row[column + 8 * e];
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {  // the four rows of a warp
    sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 8);
    sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 16);
    if (threadIdx.x % kWarp < 8)
      sums[threadIdx.x / kWarp][VEC == 4 ? 4 * lane + e : lane + 8 * e] = sum[e];
  }
  __syncthreads();
  // Warp w adds the 32 sums of column w.
  const int own = threadIdx.x / kWarp, part = threadIdx.x % kWarp;
  const float total = warp_sum(sums[part][own], kWarp);
  const int to = blockIdx.x * kColumns + own;
  if (part == 0 && to < dim) (blockIdx.y == 0 ? dw : db)[to] = from_float<W>(total);
}
