// SPDX-License-Identifier: MIT
// A gradient times its upstream gradient, a number on the device that is nearly always 1.
//
// scale_in_place: x *= factor. A factor of 1 costs one launch and no pass over x; another costs the floor, a
// read and a write of x.
// scale_to: out = factor * x, rounded from fp32. The floor is a read of x and a write of out.
//
// instantiate: scale_in_place<{float,__half,__nv_bfloat16}>
// instantiate: scale_to<{__half,__nv_bfloat16}>
#include "vector.cuh"

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    scale_in_place(T* __restrict__ x, const float* __restrict__ factor, long long count) {
  const float f = *factor;
  if (f == 1.0f) return;
  constexpr int VEC = 16 / sizeof(T);
  const long long stride = (long long)gridDim.x * kThreads;
  const long long thread = (long long)blockIdx.x * kThreads + threadIdx.x;
  uint4* const vector = reinterpret_cast<uint4*>(x);
  for (long long i = thread; i < count / VEC; i += stride) {
    float v[VEC];
    unpack<T>(vector[i], v);
#pragma unroll
    for (int e = 0; e < VEC; ++e) v[e] *= f;
    vector[i] = pack<T>(v);
  }
  for (long long i = count / VEC * VEC + thread; i < count; i += stride)
    x[i] = from_float<T>(to_float(x[i]) * f);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    scale_to(const float* __restrict__ x, T* __restrict__ out, const float* __restrict__ factor,
             long long count) {
  constexpr int VEC = 16 / sizeof(T);
  const float f = *factor;
  const long long stride = (long long)gridDim.x * kThreads;
  const long long thread = (long long)blockIdx.x * kThreads + threadIdx.x;
  for (long long i = thread; i < count / VEC; i += stride) {
    float v[VEC];
#pragma unroll
    for (int k = 0; k < VEC / 4; ++k)
      unpack<float>(reinterpret_cast<const uint4*>(x)[i * (VEC / 4) + k], v + 4 * k);
#pragma unroll
    for (int e = 0; e < VEC; ++e) v[e] *= f;
    reinterpret_cast<uint4*>(out)[i] = pack<T>(v);
  }
  for (long long i = count / VEC * VEC + thread; i < count; i += stride) out[i] = from_float<T>(x[i] * f);
}
