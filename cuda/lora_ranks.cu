// SPDX-License-Identifier: MIT
// An adapter as products read it: A and B in the dtype that is computed in, B times the scaling, rounded once, and
// the rank filled up with zeros to a multiple of 8.
#include "vector.cuh"

// A thread has an element of A, or, after those, of B.
template <typename T, typename S>
__global__ void __launch_bounds__(256)
    lora_ranks(const S* __restrict__ a,  // [rank, in]
               const S* __restrict__ b,  // [out, rank]
               T* __restrict__ to_a,     // [width, in]
               T* __restrict__ to_b,     // [out, width]
               int rank, int width, int in, int out, float scaling) {
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long of_a = static_cast<long long>(width) * in, of_b = static_cast<long long>(width) * out;
  if (i < of_a) {
    to_a[i] = from_float<T>(i < static_cast<long long>(rank) * in ? to_float(a[i]) : 0.f);
  } else if ((i -= of_a) < of_b) {
    const int column = i % width;
    to_b[i] = from_float<T>(column < rank ? to_float(b[i / width * rank + column]) * scaling : 0.f);
  }
}
// instantiate: lora_ranks<__half,{__half,float}>
// instantiate sm_80 sm_86 sm_89 sm_90a sm_100 sm_120: lora_ranks<__nv_bfloat16,{__nv_bfloat16,float}>
