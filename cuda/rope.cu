// SPDX-License-Identifier: MIT
// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys in one launch.
//
//   y1 = x1 * cos1 - x2 * sin1     y2 = x2 * cos2 + x1 * sin2     fp32, rounded once
// x1 and x2 are the halves of the first `rotary` dimensions of a head, or its even and odd ones; the other
// dimensions are copied. The backward pass is the transpose: the same with (sin1, sin2) = (-sin2, -sin1).
//
// Floor: q and k read and written once, cos and sin read once. All heads of a token share its angles: the
// threads of a token are units x lanes, and each has a unit, two vectors, of kUnroll heads. Block (units,
// lanes, tokens) and grid (token groups, head groups, batch): no division before the first load.
// Tensors have strides: transformers passes [B, T, H, D] transposed to [B, H, T, D].
//
// <I of x, C of cos and sin, O of y, VEC, PAIRS_INSIDE: neighbours of an interleaved pair share a vector,
//  BACKWARD>. VEC == 1 is the path for misaligned views and odd sizes, of both layouts.
// instantiate: rope<float,float,float,4,{false,true},{false,true}>
// instantiate: rope<float,float,float,1,false,{false,true}>
// instantiate: rope<__half,{__half,float},__half,8,{false,true},{false,true}>
// instantiate: rope<__half,{__half,float},__half,1,false,{false,true}>
// instantiate: rope<__nv_bfloat16,{__nv_bfloat16,float},__nv_bfloat16,8,{false,true},{false,true}>
// instantiate: rope<__nv_bfloat16,{__nv_bfloat16,float},__nv_bfloat16,1,false,{false,true}>
// instantiate: rope<{__half,__nv_bfloat16},float,float,8,{false,true},false>
// instantiate: rope<{__half,__nv_bfloat16},float,float,1,false,false>
// instantiate: rope<float,float,{__half,__nv_bfloat16},8,{false,true},true>
// instantiate: rope<float,float,{__half,__nv_bfloat16},1,false,true>
#include "keep.cuh"

constexpr int kThreads = 512;
constexpr int kUnroll = 2;  // more would leave registers for fewer threads

// The pair (a, b), turned by the angles of its two members.
template <bool BACKWARD>
__device__ __forceinline__ void turn(float& a, float& b, float cos_a, float cos_b, float sin_a,
                                     float sin_b) {
  const float before = a;
  a = a * cos_a - b * (BACKWARD ? -sin_b : sin_a);
  b = b * cos_b + before * (BACKWARD ? -sin_a : sin_b);
}

// Blocks an SM should have room for, where 64 registers suffice.
template <typename I, typename C, typename O>
constexpr int kBlocks =
    !kIsHalf<I> && sizeof(I) == sizeof(C) && sizeof(I) == sizeof(O) ? 2 : 1;

template <typename I, typename C, typename O, int VEC, bool PAIRS_INSIDE, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, kBlocks<I, C, O>)
    rope(const I* __restrict__ q,             // [batch, q_heads, length, dim], strided
         const I* __restrict__ k,             // [batch, heads - q_heads, length, dim], strided
         const C* __restrict__ cos,           // [batch or 1, length, rotary], or [positions, rotary]
         const C* __restrict__ sin,           // as cos
         const long long* __restrict__ positions,  // [batch or 1, length], or null: cos has a row per token
         O* __restrict__ q_out,               // like q, strided
         O* __restrict__ k_out,               // like k, strided
         long long q_batch, long long q_head, long long q_token,        //
         long long k_batch, long long k_head, long long k_token,        //
         long long qo_batch, long long qo_head, long long qo_token,     //
         long long ko_batch, long long ko_head, long long ko_token,     //
         int length, int shared_rows, int q_heads, int heads, int rotary, int interleaved) {
  const int unit = threadIdx.x, pairs = rotary / (2 * VEC);
  const int lane = blockIdx.y * blockDim.y + threadIdx.y, lanes = gridDim.y * blockDim.y;
  const int at = blockIdx.x * blockDim.z + threadIdx.z;
  const long long batch = blockIdx.z;
  if (at >= length) return;
  q += batch * q_batch + at * q_token;
  k += batch * k_batch + at * k_token;
  // k's heads come after q's: one index for both.
  k -= q_heads * k_head;

  // Where the two vectors of this unit start in a head.
  const bool turns = unit < pairs;
  int first = rotary + (unit - pairs) * VEC, second = first;
  if (turns) {
    // Any two vectors serve where pairs lie inside them; these two are read in whole lines.
    const bool apart = !interleaved || PAIRS_INSIDE;
    first = (apart ? unit : 2 * unit) * VEC;
    second = apart ? first + rotary / 2 : first + VEC;
  }

  // All loads before the first use, those that come from memory first.
  Held<I, VEC> a[kUnroll], b[kUnroll];
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    const int head = min(lane + j * lanes, heads - 1);  // past the last: loaded, not stored
    const bool of_q = head < q_heads;
    const I* from = (of_q ? q : k) + head * (of_q ? q_head : k_head);
    load_kept(a[j], from + first, 0);
    load_kept(b[j], from + second, 0);
  }
  Held<C, VEC> cosines[2], sines[2];
  if (turns) {
    long long angles = (shared_rows ? 0 : batch * length) + at;
    if (positions != nullptr) angles = positions[angles];
    cos += angles * rotary;
    sin += angles * rotary;
    load_kept(cosines[0], cos + first, 0), load_kept(cosines[1], cos + second, 0);
    load_kept(sines[0], sin + first, 0), load_kept(sines[1], sin + second, 0);
  }
  q_out += batch * qo_batch + at * qo_token;
  k_out += batch * ko_batch + at * ko_token - q_heads * ko_head;
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    const int head = lane + j * lanes;
    if (head >= heads) return;
    float x[2][VEC];
    a[j].unpack(x[0]);
    b[j].unpack(x[1]);
    if (turns) {
      float c[2][VEC], s[2][VEC];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        cosines[v].hide(), sines[v].hide();
        cosines[v].unpack(c[v]), sines[v].unpack(s[v]);
      }
      if constexpr (PAIRS_INSIDE) {
#pragma unroll
        for (int v = 0; v < 2; ++v)
#pragma unroll
          for (int e = 0; e < VEC; e += 2)
            turn<BACKWARD>(x[v][e], x[v][e + 1], c[v][e], c[v][e + 1], s[v][e], s[v][e + 1]);
      } else {
#pragma unroll
        for (int e = 0; e < VEC; ++e)
          turn<BACKWARD>(x[0][e], x[1][e], c[0][e], c[1][e], s[0][e], s[1][e]);
      }
    }
    const bool of_q = head < q_heads;
    O* to = (of_q ? q_out : k_out) + head * (of_q ? qo_head : ko_head);
    Held<O, VEC> out;
    out.pack(x[0]);
    out.store(to + first, 0);
    if (turns) {
      out.pack(x[1]);
      out.store(to + second, 0);
    }
  }
}
