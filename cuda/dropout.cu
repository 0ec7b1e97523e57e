// SPDX-License-Identifier: MIT
// Dropout of whose mask nothing is kept: it is made again from a seed.
//
//   out = m * in, with ADD out += m * in;  m = 0 with probability p, else 1 / (1 - p)
//
// Element i is kept if word i % 4 of Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as
// 1, 2, 3") is at least p * 2^32. The generator's counter is i / 4 and, above it, the stream; its key is the
// seed, which is read from memory, so that the host need not know it. Products and sums are in fp32, and
// rounded once.
//
// Floor for N elements of b bytes: 2*N*b, with ADD 3*N*b, and 20 wide multiplications for 4 elements.
//
// A thread takes 16 bytes. `in` may be `out`.
#include "vector.cuh"

constexpr int kThreads = 256;

__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned long long a = 0xD2511F53ull * counter.x, b = 0xCD9E8D57ull * counter.z;
    counter = {(unsigned)(b >> 32) ^ counter.y ^ key.x, (unsigned)b,
               (unsigned)(a >> 32) ^ counter.w ^ key.y, (unsigned)a};
    key.x += 0x9E3779B9u, key.y += 0xBB67AE85u;
  }
  return counter;
}

// Elements from `first` on, up to `count`: at once if they are `whole`.
template <typename T>
__device__ __forceinline__ void read(const T* from, long long first, long long count, bool whole, float* x) {
  constexpr int VEC = 16 / sizeof(T);
  if (whole) {
    unpack<T>(*reinterpret_cast<const uint4*>(from + first), x);
  } else {
#pragma unroll
    for (int e = 0; e < VEC; ++e) x[e] = first + e < count ? to_float(from[first + e]) : 0.f;
  }
}

template <typename T, bool ADD>
__global__ void __launch_bounds__(kThreads)
    dropout(const T* in,  // [count]
            T* out,       // [count]
            const unsigned long long* __restrict__ seed,  // [1]
            long long count,
            long long least,  // of the words of elements that are kept: p * 2^32
            int stream, float scale,
            int aligned) {  // whether both begin at a multiple of 16 bytes
  constexpr int VEC = 16 / sizeof(T);
  const long long first = ((long long)blockIdx.x * kThreads + threadIdx.x) * VEC;
  if (first >= count) return;
  const bool whole = aligned && first + VEC <= count;
  float x[VEC], sum[VEC];
  read(in, first, count, whole, x);
  if constexpr (ADD) read(out, first, count, whole, sum);
  const uint2 key = {(unsigned)*seed, (unsigned)(*seed >> 32)};
#pragma unroll
  for (int k = 0; k < VEC; k += 4) {
    const unsigned long long at = (first + k) >> 2;
    const uint4 words = philox({(unsigned)at, (unsigned)(at >> 32), (unsigned)stream, 0}, key);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // Not contracted to one operation: the reference rounds twice too.
      const float kept = word[e] >= (unsigned)least ? __fmul_rn(x[k + e], scale) : 0.f;
      x[k + e] = ADD ? __fadd_rn(sum[k + e], kept) : kept;
    }
  }
  if (whole) {
    *reinterpret_cast<uint4*>(out + first) = pack<T>(x);
  } else {
#pragma unroll
    for (int e = 0; e < VEC; ++e)
      if (first + e < count) out[first + e] = from_float<T>(x[e]);
  }
}
// instantiate: dropout<{float,__half,__nv_bfloat16},{true,false}>
