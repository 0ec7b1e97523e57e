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
#include "reduce.cuh"
#include "vector.cuh"

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

// The threads that share a row.
struct Group {
  int index, lane, width;
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
          all.h[k].load(h + row * dim, i);
          all.dy[k].load(dy + row * dim, i);
          if constexpr (RESIDUAL) all.dh[k].load(dh + row * dim, i);
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
      row_stats = {0.0f, rsqrtf(sums[0] / dim + eps)};
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
