// SPDX-License-Identifier: MIT
// Gated activations (Shazeer 2020, arXiv:2002.05202) and GELU (arXiv:1606.08415), forward and backward.
//
//   y = T(act(g)) * u             the activation is rounded first, as PyTorch does; without GATED y = act(g)
//   dg = dy * u * act'(g)         du = dy * T(act(g))
//   silu(g) = g * s(g), gelu_tanh(g) = g * s(2 sqrt(2/pi) (g + 0.044715 g^3)), s the sigmoid: 1 + tanh(z)
//   is 2 s(2z).                   gelu(g) = g * (1 + erf(g / sqrt 2)) / 2
//
// Floor for N elements of b bytes: 3*N*b forward and 5*N*b backward, without GATED 2*N*b and 3*N*b. The
// backward pass computes act(g) again, so that only g and u are kept. Exponential and division are the
// hardware's approximations (2 units in the last place) except in fp32.
//
// A thread takes one vector, or two of the exact GELU's forward pass: its long chains of arithmetic need
// company, the others gain nothing from it. Rows have strides, for gate and up side by side in one tensor;
// contiguous tensors are one long row of as many blocks as it needs. VEC == 1 is the path for misaligned
// views and odd sizes.
//
// <T, ACTIVATION, GATED, VEC>
// instantiate: glu_forward<float,{0,1,2},true,{4,1}>
// instantiate: glu_forward<{__half,__nv_bfloat16},{0,1,2},true,{8,1}>
// instantiate: glu_forward<float,{1,2},false,{4,1}>
// instantiate: glu_forward<{__half,__nv_bfloat16},{1,2},false,{8,1}>
// instantiate: glu_backward<float,{0,1,2},true,{4,1}>
// instantiate: glu_backward<{__half,__nv_bfloat16},{0,1,2},true,{8,1}>
// instantiate: glu_backward<float,{1,2},false,{4,1}>
// instantiate: glu_backward<{__half,__nv_bfloat16},{1,2},false,{8,1}>
#include "fast_math.cuh"
#include "keep.cuh"

constexpr int kBackwardThreads = 256;
enum Activation { kSilu = 0, kGelu = 1, kGeluTanh = 2 };
template <int ACTIVATION>
constexpr int kForwardThreads = ACTIVATION == kGelu ? 256 : 1024;
template <int ACTIVATION>
constexpr int kForwardVectors = ACTIVATION == kGelu ? 2 : 1;

// x times the sigmoid s of z, with s and s * (1 - s). z is in units of kUnit, which spares the exponential a
// multiplication.
template <bool PRECISE>
constexpr float kUnit = PRECISE ? 1.0f : kLog2e;
// s * (1 - s) is computed so up to this z and beyond it as s * (e * s), which does not cancel. The first has no
// error but that of s, most of which silu' = s + x s (1 - s) takes back: fp32 results show it.
template <bool PRECISE>
constexpr float kNear = PRECISE ? 2.5f : 0.0f;
struct Gate {
  float value, s, slope;
};

template <bool PRECISE>
__device__ __forceinline__ Gate gate_by(float x, float z) {
  const float e = PRECISE ? expf(-z) : exp2_fast(-z);
  const float s = PRECISE ? 1.0f / (1.0f + e) : reciprocal_fast(1.0f + e);
  return {PRECISE ? x / (1.0f + e) : x * s, s, s * (z < kNear<PRECISE> ? 1.0f - s : e * s)};
}

// The normal distribution function Phi(x) and its density. erff costs more than the memory leaves time for,
// so 16-bit types take Abramowitz & Stegun 7.1.26 for the tail that is below one half, good to 1.5e-7.
template <bool PRECISE>
__device__ __forceinline__ float2 normal(float x) {
  constexpr float kDensity = 0.39894228040143268f, kRoot = 0.70710678118654752f;
  if (PRECISE) return {0.5f * (1.0f + erff(x * kRoot)), kDensity * expf(-0.5f * x * x)};
  const float bell = exp2_fast(-0.5f * kLog2e * x * x);
  const float t = reciprocal_fast(1.0f + 0.3275911f * kRoot * fabsf(x));
  const float tail =
      0.5f * bell * t *
      (0.254829592f +
       t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return {x < 0.0f ? tail : 1.0f - tail, kDensity * bell};
}

// act(x), and act'(x) if asked for.
template <int ACTIVATION, bool PRECISE>
__device__ __forceinline__ float activate(float x, float* slope) {
  if constexpr (ACTIVATION == kGelu) {
    const float2 phi = normal<PRECISE>(x);
    if (slope != nullptr) *slope = phi.x + x * phi.y;
    return x * phi.x;
  } else {
    constexpr float kScale = 1.5957691216057308f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
    constexpr bool kTanh = ACTIVATION == kGeluTanh;
    constexpr float kFirst = kScale * kUnit<PRECISE>, kThird = kFirst * kCube;
    const float z = !kTanh    ? kUnit<PRECISE> * x
                    : PRECISE ? kScale * (x + kCube * x * x * x)
                              : x * (kFirst + kThird * x * x);
    Gate gate;
    if (kTanh && PRECISE) {  // fewer roundings
      const float t = tanhf(0.5f * z), s = 0.5f * (1.0f + t);
      gate = {x * s, s, 0.25f * (1.0f - t * t)};
    } else {
      gate = gate_by<PRECISE>(x, z);
    }
    if (slope != nullptr) {
      // Where x^2 could overflow gate.slope is zero.
      const float near = fminf(fabsf(x), 100.0f);
      const float inner = kTanh ? kScale * (1.0f + 3.0f * kCube * near * near) : 1.0f;
      *slope = gate.s + x * gate.slope * inner;
    }
    return gate.value;
  }
}

// A row has `chunks` blocks, one after the other.
template <typename T, int ACTIVATION, bool GATED, int VEC>
__global__ void __launch_bounds__(kForwardThreads<ACTIVATION>)
    glu_forward(const T* __restrict__ gate,  // [rows, columns], rows gate_stride apart
                const T* __restrict__ up,    // [rows, columns], rows up_stride apart, if GATED
                T* __restrict__ y,           // [rows, columns]
                long long columns, long long gate_stride, long long up_stride, int chunks) {
  constexpr int kVectors = kForwardVectors<ACTIVATION>;
  const long long row = blockIdx.x / chunks, vectors = columns / VEC;
  const long long first =
      (long long)(blockIdx.x - row * chunks) * (blockDim.x * kVectors) + threadIdx.x;
  Held<T, VEC> g[kVectors], u[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const long long i = first + k * blockDim.x;
    if (i < vectors) {
      load_kept(g[k], gate + row * gate_stride, i);
      if constexpr (GATED) load_kept(u[k], up + row * up_stride, i);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const long long i = first + k * blockDim.x;
    if (i >= vectors) return;
    float a[VEC];
    g[k].unpack(a);
#pragma unroll
    for (int e = 0; e < VEC; ++e) a[e] = activate<ACTIVATION, sizeof(T) == 4>(a[e], nullptr);
    g[k].pack(a);
    if constexpr (GATED) g[k].multiply_by(u[k]);
    g[k].store(y + row * columns, i);
  }
}

template <typename T, int ACTIVATION, bool GATED, int VEC>
__global__ void __launch_bounds__(kBackwardThreads)
    glu_backward(const T* __restrict__ dy,    // [rows, columns]
                 const T* __restrict__ gate,  // [rows, columns], rows gate_stride apart
                 const T* __restrict__ up,    // [rows, columns], rows up_stride apart, if GATED
                 T* __restrict__ dgate,       // [rows, columns], rows grad_stride apart
                 T* __restrict__ dup,         // [rows, columns], rows grad_stride apart, if GATED
                 long long columns, long long gate_stride, long long up_stride,
                 long long grad_stride, int chunks) {
  const long long row = blockIdx.x / chunks;
  const long long i = (long long)(blockIdx.x - row * chunks) * blockDim.x + threadIdx.x;
  if (i >= columns / VEC) return;
  Held<T, VEC> d, g, u;
  load_kept(d, dy + row * columns, i);
  load_kept(g, gate + row * gate_stride, i);
  if constexpr (GATED) load_kept(u, up + row * up_stride, i);
  float a[VEC], b[VEC], c[VEC];
  d.unpack(a), g.unpack(b);
  if constexpr (GATED) u.unpack(c);
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    float slope;
    const float value = activate<ACTIVATION, sizeof(T) == 4>(b[e], &slope);
    b[e] = a[e] * slope;
    if constexpr (GATED) {
      b[e] *= c[e];
      c[e] = a[e] * to_float(from_float<T>(value));
    }
  }
  g.pack(b);
  g.store(dgate + row * grad_stride, i);
  if constexpr (GATED) {
    u.pack(c);
    u.store(dup + row * grad_stride, i);
  }
}
