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

// The elements of sixteen bytes in fp32, and back. Data that a thread keeps for a second look is best kept
// in words: as 16-bit elements it would take twice the registers.
template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float* x) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 4) {
      x[k] = __uint_as_float(words[k]);
    } else if constexpr (kIsHalf<T>) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[k]));
      x[2 * k] = pair.x;
      x[2 * k + 1] = pair.y;
    } else {  // bf16 is the upper half of fp32
      x[2 * k] = __uint_as_float(words[k] << 16);
      x[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float* x) {
  unsigned words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 4) {
      words[k] = __float_as_uint(x[k]);
    } else if constexpr (kIsHalf<T>) {
      const __half2 pair = __floats2half2_rn(x[2 * k], x[2 * k + 1]);
      words[k] = *reinterpret_cast<const unsigned*>(&pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * k], x[2 * k + 1]);
      words[k] = *reinterpret_cast<const unsigned*>(&pair);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// The products of two words of 16-bit elements, each rounded once.
template <typename T>
__device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) {
  if constexpr (kIsHalf<T>) {
    const __half2 product =
        __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const unsigned&>(product);
  } else {
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a),
                                           reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const unsigned&>(product);
  }
}

// VEC elements as the words they were read as: unpacked they would take twice the registers.
template <typename T, int VEC>
struct Held {
  static_assert(VEC * sizeof(T) % 16 == 0, "whole 16-byte words, or VEC == 1");
  static constexpr int kWords = VEC * sizeof(T) / 16, kEach = 16 / sizeof(T);
  uint4 words[kWords];

  Held() = default;
  __device__ __forceinline__ Held(const T* from, long long index) { load(from, index); }
  __device__ __forceinline__ void load(const T* from, long long index) {
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      words[k] = reinterpret_cast<const uint4*>(from)[index * kWords + k];
  }
  // What is not read again soon is the first to leave the caches.
  __device__ __forceinline__ void load_streaming(const T* from) {
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = __ldcs(reinterpret_cast<const uint4*>(from) + k);
  }
  __device__ __forceinline__ void store(T* to, long long index) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) reinterpret_cast<uint4*>(to)[index * kWords + k] = words[k];
  }
  __device__ __forceinline__ void unpack(float* x) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) ::unpack<T>(words[k], x + k * kEach);
  }
  __device__ __forceinline__ void pack(const float* x) {
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = ::pack<T>(x + k * kEach);
  }
  __device__ __forceinline__ void multiply_by(const Held& other) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        words[k].x = ::multiply<T>(words[k].x, other.words[k].x);
        words[k].y = ::multiply<T>(words[k].y, other.words[k].y);
        words[k].z = ::multiply<T>(words[k].z, other.words[k].z);
        words[k].w = ::multiply<T>(words[k].w, other.words[k].w);
      }
    } else {
      float a[VEC], b[VEC];
      unpack(a), other.unpack(b);
#pragma unroll
      for (int e = 0; e < VEC; ++e) a[e] *= b[e];
      pack(a);
    }
  }
  // Makes the compiler unpack again instead of keeping the elements of an earlier look.
  __device__ __forceinline__ void hide() {
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      asm volatile("" : "+r"(words[k].x), "+r"(words[k].y), "+r"(words[k].z), "+r"(words[k].w));
  }
};

template <typename T>
struct Held<T, 1> {
  T value;

  Held() = default;
  __device__ __forceinline__ Held(const T* from, long long index) : value(from[index]) {}
  __device__ __forceinline__ void load(const T* from, long long index) { value = from[index]; }
  __device__ __forceinline__ void store(T* to, long long index) const { to[index] = value; }
  __device__ __forceinline__ void unpack(float* x) const { x[0] = to_float(value); }
  __device__ __forceinline__ void pack(const float* x) { value = from_float<T>(x[0]); }
  __device__ __forceinline__ void multiply_by(const Held& other) {
    value = from_float<T>(to_float(value) * to_float(other.value));
  }
  __device__ __forceinline__ void hide() {}
};
