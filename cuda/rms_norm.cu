// SPDX-License-Identifier: MIT
// RMSNorm forward and backward (Zhang & Sennrich 2019, arXiv:1910.07467).
//
//   r = 1 / sqrt(mean(x^2) + eps)      xhat = x * r
//   llama:         y = w * T(xhat)         xhat is rounded to x's type first, as transformers does
//   zero-centred:  y = T(xhat * (1 + w))   one rounding at the end (Gemma)
//   dx = r * (g - xhat * mean(g * xhat))   with g = dy * w (or dy * (1 + w))
//   dw = sum over rows of dy * xhat
//
// Floor in bytes for [N, D] of b-byte elements: forward 2*N*D*b, backward 3*N*D*b; arithmetic is free.
// A row is read once and stays in registers: `width` threads hold ITEMS vectors of VEC elements each.
// Rows too wide for that (ITEMS == 0) are read twice, the second time mostly from cache. VEC == 1 is the
// path for sizes that are no multiple of 16 bytes and for misaligned views.
//
// dw needs no atomics: each warp or block sums the rows it visits into its own row of `partial`, and
// column_sum adds those rows in a fixed order, so that results repeat bit for bit.
//
// T: type of x and dx; W: of w and dw; O: of y and dy. A mixed 16-bit backward with ITEMS == 4 would spill.
// instantiate: rms_norm_forward<float,float,float,{4,1},0>
// instantiate: rms_norm_forward<float,float,float,4,{1,2,4}>
// instantiate: rms_norm_forward<__half,__half,__half,{8,1},0>
// instantiate: rms_norm_forward<__half,__half,__half,8,{1,2,4}>
// instantiate: rms_norm_forward<__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,{8,1},0>
// instantiate: rms_norm_forward<__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,2,4}>
// instantiate: rms_norm_forward<float,{__half,__nv_bfloat16},float,{4,1},0>
// instantiate: rms_norm_forward<float,{__half,__nv_bfloat16},float,4,{1,2,4}>
// instantiate: rms_norm_forward<__half,float,{float,__half},{8,1},0>
// instantiate: rms_norm_forward<__half,float,{float,__half},8,{1,2,4}>
// instantiate: rms_norm_forward<__nv_bfloat16,float,{float,__nv_bfloat16},{8,1},0>
// instantiate: rms_norm_forward<__nv_bfloat16,float,{float,__nv_bfloat16},8,{1,2,4}>
// instantiate: rms_norm_backward<float,float,float,{4,1},0>
// instantiate: rms_norm_backward<float,float,float,4,{1,2,4}>
// instantiate: rms_norm_backward<__half,__half,__half,{8,1},0>
// instantiate: rms_norm_backward<__half,__half,__half,8,{1,2,4}>
// instantiate: rms_norm_backward<__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,{8,1},0>
// instantiate: rms_norm_backward<__nv_bfloat16,__nv_bfloat16,__nv_bfloat16,8,{1,2,4}>
// instantiate: rms_norm_backward<float,{__half,__nv_bfloat16},float,{4,1},0>
// instantiate: rms_norm_backward<float,{__half,__nv_bfloat16},float,4,{1,2,4}>
// instantiate: rms_norm_backward<__half,float,{float,__half},{8,1},0>
// instantiate: rms_norm_backward<__half,float,{float,__half},8,{1,2}>
// instantiate: rms_norm_backward<__nv_bfloat16,float,{float,__nv_bfloat16},{8,1},0>
// instantiate: rms_norm_backward<__nv_bfloat16,float,{float,__nv_bfloat16},8,{1,2}>
// instantiate: column_sum<{float,__half,__nv_bfloat16}>
#include "reduce.cuh"
#include "vector.cuh"

// 512 threads leave 128 registers each, enough for a row's x, dy and dw in flight.
constexpr int kMaxThreads = 512;
constexpr int kSumRows = 32;

// One output element from x, r and w, with transformers' rounding.
template <typename T, typename W, typename O>
__device__ __forceinline__ O scale(float x, float r, W w, bool zero_centered) {
  if (zero_centered) return from_float<O>(x * r * (1.0f + to_float(w)));
  return from_float<O>(to_float(w) * to_float(from_float<T>(x * r)));
}

// Block: one row of `width` = blockDim.x > 32 threads, or blockDim.x / width rows for a narrower one.
template <typename T, typename W, typename O, int VEC, int ITEMS>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rms_norm_forward(const T* __restrict__ x,      // [rows, dim]
                     const W* __restrict__ w,      // [dim]
                     O* __restrict__ y,            // [rows, dim]
                     float* __restrict__ rstd,     // [rows], r, kept for the backward pass
                     long long rows, int dim, int width, float eps, int zero_centered) {
  __shared__ float scratch[kMaxWarps];
  const long long row = (long long)blockIdx.x * (blockDim.x / width) + threadIdx.x / width;
  const int lane = threadIdx.x % width;
  const int vectors = dim / VEC;
  const bool active = row < rows;  // inactive threads still take part in the sums
  x += row * dim;
  y += row * dim;

  Vec<T, VEC> held[ITEMS > 0 ? ITEMS : 1];
  float squares = 0.0f;
  const auto add_squares = [&](const Vec<T, VEC>& v) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) squares += to_float(v.at[e]) * to_float(v.at[e]);
  };
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
      if (active && lane + k * width < vectors) {
        held[k] = load<VEC>(x, lane + k * width);
        add_squares(held[k]);
      }
  } else if (active) {
    for (int i = lane; i < vectors; i += width) add_squares(load<VEC>(x, i));
  }

  const float r = rsqrtf(row_sum(squares, width, scratch) / dim + eps);
  if (!active) return;
  if (lane == 0) rstd[row] = r;

  const auto write = [&](int i, const Vec<T, VEC>& v) {
    const Vec<W, VEC> weight = load<VEC>(w, i);
    Vec<O, VEC> out;
#pragma unroll
    for (int e = 0; e < VEC; ++e)
      out.at[e] = scale<T, W, O>(to_float(v.at[e]), r, weight.at[e], zero_centered);
    store(y, i, out);
  };
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
      if (lane + k * width < vectors) write(lane + k * width, held[k]);
  } else {
    for (int i = lane; i < vectors; i += width) write(i, load<VEC>(x, i));
  }
}

// Persistent: each group of `width` threads walks the rows with a stride of the whole grid, its share
// of dw in registers (ITEMS > 0) or in its row of `partial` (ITEMS == 0).
// `partial` has a row per block where width > 32, else one per warp; ITEMS == 0 needs width >= 32.
template <typename T, typename W, typename O, int VEC, int ITEMS>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rms_norm_backward(const O* __restrict__ dy,     // [rows, dim]
                      const T* __restrict__ x,      // [rows, dim]
                      const W* __restrict__ w,      // [dim]
                      const float* __restrict__ rstd,  // [rows]
                      T* __restrict__ dx,           // [rows, dim]
                      float* __restrict__ partial,  // [gridDim.x * (blockDim.x / max(width, 32)), dim]
                      long long rows, int dim, int width, int zero_centered) {
  __shared__ float scratch[2][kMaxWarps];
  const int groups = blockDim.x / width;
  const int lane = threadIdx.x % width;
  const int vectors = dim / VEC;
  const long long stride = (long long)gridDim.x * groups;
  partial += ((long long)blockIdx.x * blockDim.x + threadIdx.x) / max(width, kWarp) * dim;

  // g, and the value that multiplied the weight in the forward pass.
  const auto gradient = [&](float d, W weight) {
    return d * (zero_centered ? 1.0f + to_float(weight) : to_float(weight));
  };
  const auto normed = [&](float xhat) {
    return zero_centered ? xhat : to_float(from_float<T>(xhat));
  };

  float dw[ITEMS > 0 ? ITEMS : 1][VEC] = {};
  if constexpr (ITEMS == 0)
    for (int i = lane; i < vectors; i += width) store(partial, i, Vec<float, VEC>{});

  int parity = 0;
  // `first` is the block's, so that all its threads leave the loop together.
  for (long long first = (long long)blockIdx.x * groups; first < rows; first += stride) {
    const long long row = first + threadIdx.x / width;
    const bool active = row < rows;
    const float r = active ? rstd[row] : 0.0f;
    const T* x_row = x + row * dim;
    const O* dy_row = dy + row * dim;
    T* dx_row = dx + row * dim;

    Vec<T, VEC> held_x[ITEMS > 0 ? ITEMS : 1];
    Vec<O, VEC> held_dy[ITEMS > 0 ? ITEMS : 1];
    float projection = 0.0f;  // sum of g * xhat
    const auto project = [&](int i, const Vec<T, VEC>& xv, const Vec<O, VEC>& dyv) {
      const Vec<W, VEC> weight = load<VEC>(w, i);
#pragma unroll
      for (int e = 0; e < VEC; ++e)
        projection += gradient(to_float(dyv.at[e]), weight.at[e]) * (to_float(xv.at[e]) * r);
    };
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k)
        if (active && lane + k * width < vectors) {
          held_x[k] = load<VEC>(x_row, lane + k * width);
          held_dy[k] = load<VEC>(dy_row, lane + k * width);
        }
#pragma unroll
      for (int k = 0; k < ITEMS; ++k)
        if (active && lane + k * width < vectors) project(lane + k * width, held_x[k], held_dy[k]);
    } else if (active) {
      for (int i = lane; i < vectors; i += width)
        project(i, load<VEC>(x_row, i), load<VEC>(dy_row, i));
    }

    const float mean = row_sum(projection, width, scratch[parity]) / dim;
    parity ^= 1;
    if (!active) continue;  // a group past the end, in the block's last round

    const auto write = [&](int i, const Vec<T, VEC>& xv, const Vec<O, VEC>& dyv, float* dw_at) {
      const Vec<W, VEC> weight = load<VEC>(w, i);
      Vec<T, VEC> out;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const float d = to_float(dyv.at[e]), xhat = to_float(xv.at[e]) * r;
        out.at[e] = from_float<T>(r * (gradient(d, weight.at[e]) - xhat * mean));
        dw_at[e] += d * normed(xhat);
      }
      store(dx_row, i, out);
    };
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k)
        if (lane + k * width < vectors) write(lane + k * width, held_x[k], held_dy[k], dw[k]);
    } else {
      for (int i = lane; i < vectors; i += width)
        write(i, load<VEC>(x_row, i), load<VEC>(dy_row, i), partial + i * VEC);
    }
  }

  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int i = lane + k * width;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        // Groups narrower than a warp share a row of `partial`: add the lanes of equal column.
        float sum = dw[k][e];
        for (int offset = kWarp / 2; offset >= width; offset /= 2)
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        if (i < vectors && threadIdx.x % kWarp < width) partial[i * VEC + e] = sum;
      }
    }
  }
}

// out[c] = sum over parts of partial[p, c], in fp32 and in a fixed order. Block (32, kSumRows).
template <typename W>
__global__ void __launch_bounds__(kWarp* kSumRows, 1)
    column_sum(const float* __restrict__ partial,  // [parts, dim]
               W* __restrict__ out,                // [dim]
               int parts, int dim) {
  __shared__ float sums[kSumRows][kWarp + 1];  // + 1: the transposed reads below hit 32 banks
  const int column = blockIdx.x * kWarp + threadIdx.x;
  // Four chains of additions: more loads in flight, and a shorter chain loses less.
  float chains[4] = {};
  if (column < dim)
    for (int first = threadIdx.y; first < parts; first += 4 * kSumRows)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int p = first + k * kSumRows;
        if (p < parts) chains[k] += partial[(long long)p * dim + column];
      }
  sums[threadIdx.y][threadIdx.x] = (chains[0] + chains[1]) + (chains[2] + chains[3]);
  __syncthreads();
  // Each warp now adds the 32 sums of one column.
  const float sum = warp_sum(sums[threadIdx.x][threadIdx.y], kWarp);
  const int own = blockIdx.x * kWarp + threadIdx.y;
  if (threadIdx.x == 0 && own < dim) out[own] = from_float<W>(sum);
}
