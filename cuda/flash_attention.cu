// SPDX-License-Identifier: MIT
// Attention without its matrix of scores, forward (Dao 2023, arXiv:2307.08691, algorithm 1).
//
// A block has BM queries of one head of one document and walks over the keys they see, BN at a time, from the
// last to the first: scores of the tile in registers, the softmax's maximum and sum carried along per row,
// and the values' weighted sum rescaled whenever a maximum moves. Keys arrive while the values of the tile
// before are multiplied, values while the scores are. Every warp has whole rows, so that no sum leaves it.
#include "attention.cuh"

template <typename T, int D, int BM, int BN, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    flash_attention(const T* __restrict__ q,    // [batch, tokens, heads, dim], strided
                    const T* __restrict__ k,    // [batch, tokens, heads / group, dim], strided
                    const T* __restrict__ v,    // as k
                    T* __restrict__ out,        // [batch, tokens, heads, dim], strided
                    float* __restrict__ lse,    // [heads, batch * tokens], log2 of the sum of exp(score)
                    const Tile* __restrict__ tiles,  // in the order of work
                    long long q_batch, long long q_token, long long q_head,  //
                    long long k_batch, long long k_token, long long k_head,  //
                    long long v_batch, long long v_token, long long v_head,  //
                    long long o_batch, long long o_token, long long o_head,  //
                    long long tokens,  // of all rows of the batch
                    int row_length,    // tokens of a row of the batch, or 0 if all documents are in one row
                    int heads, int group, int dim, float scale, float softcap, int causal, int window) {
  constexpr int kThreads = 32 * WARPS, kM = BM / (16 * WARPS), kN = BN / 8, kD = D / 8, kP = kPitch<D>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* q_tile = reinterpret_cast<T*>(shared);
  const unsigned q_at = shared_address(q_tile), k_at = q_at + BM * kP * sizeof(T),
                 v_at = k_at + BN * kP * sizeof(T);
  const int warp = warp_index(), lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4 * 2;

  const Tile tile = tiles[blockIdx.x / heads];
  const int length = tile.length, first = tile.first, kv_head = blockIdx.x % heads / group;
  const Mask mask{causal, window};
  q = rows_of(q, {q_batch, q_token, q_head}, tile, row_length, blockIdx.x % heads);
  k = rows_of(k, {k_batch, k_token, k_head}, tile, row_length, kv_head);
  v = rows_of(v, {v_batch, v_token, v_head}, tile, row_length, kv_head);

  load_tile<BM, D, kThreads>(q_at, q, q_token, first, length, dim);
  const int first_tile = mask.first_key(first) / BN;
  int n = (mask.end_key(min(first + BM, length) - 1, length) - 1) / BN;
  load_tile<BN, D, kThreads>(k_at, k, k_token, n * BN, length, dim);

  // Scores times `slope` are exponents of 2.
  const float slope = (softcap > 0.f ? softcap : scale) * kLog2e, cap = __fdividef(scale, softcap);
  float o[kM][kD][4] = {}, most[kM][2], sum[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) most[m][0] = most[m][1] = -kInfinity;

  const unsigned q_lane = q_at + warp * 16 * kM * kP * sizeof(T) + rows_lane<T>(kP);
  const unsigned k_lane = k_at + columns_lane<T>(kP), v_lane = v_at + rows_lane<T>(kP);
  const int warp_first = first + warp * 16 * kM;
  // Next to the diagonal and at the end of a document, some warps' rows see none of a tile's keys.
  const int end_tile =
      warp_first < length ? (mask.end_key(min(warp_first + 16 * kM, length) - 1, length) + BN - 1) / BN : 0;

  for (; n >= first_tile; --n) {
    wait_for_copies();
    __syncthreads();  // the keys are here, and the values of the tile before have been read
    load_tile<BN, D, kThreads>(v_at, v, v_token, n * BN, length, dim);

    float s[kM][kN][4];
    if (n < end_tile) multiply_rows<false, D, T>(s, q_lane, k_lane, s, 0, 0);
    wait_for_copies();
    __syncthreads();  // the values are here, and the keys have been read
    if (n > first_tile) load_tile<BN, D, kThreads>(k_at, k, k_token, (n - 1) * BN, length, dim);
    if (n >= end_tile) continue;

    if (softcap > 0.f) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][j][e] = tanh_exact(s[m][j][e] * cap);
    }
    if (mask.cuts(warp_first, 16 * kM, n * BN, BN, length)) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (mask.hides(warp_first + m * 16 + row + e / 2 * 8, n * BN + j * 8 + pair + e % 2, length))
              s[m][j][e] = -kInfinity;
    }

    bool moved = false;
    float shrink[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = most[m][h];
#pragma unroll
        for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        // A row that has seen no key yet: any finite maximum gives it zeros.
        const float base = top == -kInfinity ? 0.f : top * slope;
        // One, exactly, where the maximum stays: a rounding of it would be repeated in every tile.
        shrink[m][h] = top == most[m][h] ? 1.f : exp2_fast((most[m][h] - top) * slope);
        moved |= top != most[m][h];
        most[m][h] = top;
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[m][j][e] = exp2_fast(s[m][j][e] * slope - base);
            total += s[m][j][e];
          }
        sum[m][h] = sum[m][h] * shrink[m][h] + total;
      }
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int d = 0; d < kD; ++d)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[m][d][e] *= shrink[m][e / 2];
    }
    multiply_scores<D, T>(o, s, v_lane);
  }

  const int head = blockIdx.x % heads;
  // Through this warp's own rows of the queries' tile, to be stored in whole lines.
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[m][h];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = 1.f / total;
      const int at = (warp * kM + m) * 16 + row + h * 8;
      if (lane % 4 == 0 && first + at < length)
        lse[head * tokens + tile.start + first + at] = most[m][h] * slope + log2f(total);
#pragma unroll
      for (int d = 0; d < kD; ++d)
        *reinterpret_cast<unsigned*>(q_tile + at * kP + d * 8 + pair) =
            pack_pair<T>(o[m][d][2 * h] * inverse, o[m][d][2 * h + 1] * inverse);
    }
  __syncthreads();
  out = const_cast<T*>(rows_of(out, {o_batch, o_token, o_head}, tile, row_length, head));
  store_tile<BM, D, kThreads>(out, o_token, first, length, dim, q_tile);
}
// instantiate sm_80 sm_100: flash_attention<{__nv_bfloat16,__half},64,128,128,4,2>
// instantiate sm_80 sm_100: flash_attention<{__nv_bfloat16,__half},96,128,64,4,2>
// instantiate sm_80 sm_100: flash_attention<{__nv_bfloat16,__half},128,128,64,4,2>
// instantiate sm_80 sm_90a sm_100: flash_attention<{__nv_bfloat16,__half},256,64,64,4,1>
// instantiate sm_86 sm_89 sm_120: flash_attention<{__nv_bfloat16,__half},64,128,64,4,2>
// instantiate sm_86 sm_89 sm_120: flash_attention<{__nv_bfloat16,__half},96,128,64,8,1>
// instantiate sm_86 sm_89 sm_120: flash_attention<{__nv_bfloat16,__half},128,128,64,8,1>
// instantiate sm_86 sm_89 sm_120: flash_attention<{__nv_bfloat16,__half},256,64,64,4,1>
// instantiate sm_75: flash_attention<__half,64,128,64,4,1>
// instantiate sm_75: flash_attention<__half,96,64,64,4,1>
// instantiate sm_75: flash_attention<__half,128,64,64,4,1>
