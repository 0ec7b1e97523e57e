// SPDX-License-Identifier: MIT
// What attention's backward passes start from.
#include "vector.cuh"

// What a row of scores needs beside them: the forward pass's log of their sum, and the sum over the head of dO
// times O. Also zeros for the turns. LANES threads have a token, and two heads of it, in a grid of (tokens, heads):
// neighbouring rows of lse are neighbouring tokens.
template <typename T, int LANES>
__global__ void __launch_bounds__(256)
    attention_statistics(const T* __restrict__ dout,     // [batch, row_length, heads, dim], strided
                         const T* __restrict__ out,      // the same, strided
                         const float* __restrict__ lse,  // [heads, batch * row_length]
                         float2* __restrict__ statistics,  // [heads, batch * row_length]
                         int* __restrict__ turns,          // [count], becomes zero
                         long long do_batch, long long do_token, long long do_head,  //
                         long long o_batch, long long o_token, long long o_head,     //
                         long long tokens, int row_length, int heads, int dim, int count) {
  constexpr int kThreads = 256, kHeads = 2;  // as many rows of a thread's are on their way at once
  const long long thread = (blockIdx.y * gridDim.x + blockIdx.x) * static_cast<long long>(kThreads) + threadIdx.x;
  for (long long i = thread; i < count; i += gridDim.x * gridDim.y * static_cast<long long>(kThreads)) turns[i] = 0;
  const int own = blockIdx.x * (kThreads / LANES) + threadIdx.x / LANES, first_head = blockIdx.y * kHeads;
  const int column = threadIdx.x % LANES * 8;
  const long long token = min(static_cast<long long>(own), tokens - 1);
  const int batch = static_cast<int>(token) / row_length, at = static_cast<int>(token) % row_length;
  dout += batch * do_batch + at * do_token, out += batch * o_batch + at * o_token;
  Held<T, 8> a[kHeads], b[kHeads];
  float log_sum[kHeads];
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    // Past the last, or the head's end, something is loaded and not used.
    const int head = min(first_head + j, heads - 1), from = column < dim ? column : 0;
    log_sum[j] = lse[head * tokens + token];
    a[j].load_streaming(dout + head * do_head + from);
    b[j].load_streaming(out + head * o_head + from);
  }
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    float x[8], y[8], sum = 0.f;
    a[j].unpack(x), b[j].unpack(y);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += x[e] * y[e];
    if (column >= dim) sum = 0.f;
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (own < tokens && first_head + j < heads && column == 0)
      statistics[(first_head + j) * tokens + own] = {log_sum[j], sum};
  }
}

// instantiate: attention_statistics<{__nv_bfloat16,__half},{8,16,32}>
