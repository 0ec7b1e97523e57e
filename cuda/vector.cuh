// SPDX-License-Identifier: MIT
// Vector loads and stores, and conversion to and from fp32, for the three training dtypes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// N consecutive elements. A Vec of 16 bytes or more is accessed in 16-byte pieces, the widest a thread
// can issue, so the pointer it is read through must be 16-byte aligned; narrower ones, to their size.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T at[N];
};

template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load(const T* pointer, int index) {
  return reinterpret_cast<const Vec<T, N>*>(pointer)[index];
}

template <int N, typename T>
__device__ __forceinline__ void store(T* pointer, int index, const Vec<T, N>& value) {
  reinterpret_cast<Vec<T, N>*>(pointer)[index] = value;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
