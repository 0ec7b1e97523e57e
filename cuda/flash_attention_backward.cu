// SPDX-License-Identifier: MIT
// Attention without its matrix of scores, backward (Dao 2023, arXiv:2307.08691, algorithm 2), in an order of
// additions that does not depend on timing.
//
// A block has BN keys and their values of one document and walks over the queries that see them, from the last
// to the first and for every head that shares the keys. The probabilities are computed again, transposed. A warp
// has its own rows of keys, so that P and dS are operands of dV += P^T dO and dK += dS^T Q as they lie in the
// registers and only dQ = dS K needs dS through shared memory; or two warps share twice the rows, which reads a
// third less from shared memory for heads whose sums leave no registers for that, but takes P through it too.
// Then dV and dK come after dQ, which goes to device memory a few sums at a time between their products: all at
// once would hold up what these read from shared memory.
//
// dQ is summed over the blocks of a document in device memory, in the order in which the blocks started: each
// waits for its turn at some steps' queries. Blocks with most work start first, and one never waits for a block
// that starts after it. The last of them has the sum, turns it back and stores it.
#include "attention_backward.cuh"

// P^T from scores, and dS^T = P^T (dP^T - delta) without the scale, both rounded. CAPPED: a score is a tanh,
// whose derivative dS gets. `statistics` are those of this lane's first pair of queries.
template <bool CAPPED, bool NEED_DS, typename T, int M, int N, int N1>
__device__ __forceinline__ void probabilities(const float (&s)[M][N][4], const float (&dp)[M][N1][4],
                                              const float2* statistics, float slope,
                                              unsigned (&p_words)[M][N][2], unsigned (&ds_words)[M][N][2]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float4 both = *reinterpret_cast<const float4*>(statistics + j * 8);  // lse and delta, twice
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float p[2], ds[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float score = s[i][j][2 * h + e];
          p[e] = exp2_fast(score * slope - (e ? both.z : both.x));
          if constexpr (NEED_DS) {
            ds[e] = p[e] * (dp[i][j][2 * h + e] - (e ? both.w : both.y));
            if (CAPPED) ds[e] = p[e] > 0.f ? ds[e] * (1.f - score * score) : 0.f;
          }
        }
        p_words[i][j][h] = pack_pair<T>(p[0], p[1]);
        if constexpr (NEED_DS) ds_words[i][j][h] = pack_pair<T>(ds[0], ds[1]);
      }
  }
}

// dS^T or P^T of a warp's keys into its rows of the tile, from this lane's first pair on.
template <int PITCH, int M, int N>
__device__ __forceinline__ void store_words(unsigned* to, const unsigned (&words)[M][N][2]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) to[(i * 16 + h * 8) * PITCH / 2 + j * 4] = words[i][j][h];
}

template <typename T, int D, int BM, int BN, int WARPS, int SPLIT, int STAGES, int UPSTREAM, int PART, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    flash_attention_backward(
        const T* __restrict__ q,     // [batch, tokens, heads, dim], strided
        const T* __restrict__ k,     // [batch, tokens, heads / group, dim], strided
        const T* __restrict__ v,     // as k
        const T* __restrict__ dout,  // as q
        const float2* __restrict__ statistics,  // [heads, batch * tokens]
        T* __restrict__ dq,               // [batch * tokens, heads, dim]
        T* __restrict__ dk,               // [batch * tokens, heads / group, dim]
        T* __restrict__ dv,               // as dk
        float* sums,                      // [heads / group, query_tiles, group, BM * D], for dq
        int* turns,                       // [1 + heads * query_tiles], zeros; the first counts blocks
        const Tile* __restrict__ tiles,   // of BN keys, in the order of work
        const void* cos, const void* sin,  // [batch or 1, row_length, rotary]: q and k are turned by them; dq, dk not
        long long q_batch, long long q_token, long long q_head,     //
        long long k_batch, long long k_token, long long k_head,     //
        long long v_batch, long long v_token, long long v_head,     //
        long long do_batch, long long do_token, long long do_head,  //
        long long angles_batch,  // rows of cos in a row of the batch, or 0 if they share them
        long long tokens, int row_length, int query_tiles, int heads, int group, int shift, int dim, float scale,
        float softcap, int causal, int window, int rotary, int interleaved, int fp32_angles) {
  constexpr bool kNeedV = PART != 2, kNeedK = PART != 1;  // which gradients this launch makes
  // SPLIT warps share rows of keys: each has a part of the scores' columns and of the gradients' columns.
  constexpr int kThreads = 32 * WARPS, kK = BN * SPLIT / (16 * WARPS), kColumn = BM / SPLIT, kQ = kColumn / 8,
                kD = D / SPLIT / 8, kP = kPitch<D>, kS = BM + 8;
  // Of dQ's tile, a warp has BM / kRows rows and D / kColumns columns.
  constexpr int kColumns = D % (16 * WARPS / (BM / 32)) == 0 && BM >= 64 ? WARPS / (BM / 32) : WARPS / (BM / 16),
                kRows = WARPS / kColumns, kA = BM / kRows / 16, kB = D / kColumns / 16;
  // Columns at a time, in groups of 16: few enough sums, of which a thread has kParts times four.
  constexpr int kPasses = kA * kB >= 8 ? kA * kB / 4 : 1, kC = kB / kPasses, kParts = kA * 2 * kC;
  constexpr int kAhead = 32;  // a thread that is not of the warp that waits for turns
  static_assert(kK * 16 * WARPS == BN * SPLIT && kD * SPLIT % 2 == 0, "whole tiles");
  static_assert(kA * kRows * 16 == BM && kB * kColumns * 16 == D, "whole tiles of dQ");
  static_assert(SPLIT == 1 ? UPSTREAM == STAGES : STAGES > 1 && PART == 0 && kPasses == 1, "dQ first, whole");
  extern __shared__ __align__(16) unsigned char shared[];
  T* k_tile = reinterpret_cast<T*>(shared);
  T* v_tile = k_tile + BN * kP;
  T* q_tile = v_tile + BN * kP;               // STAGES of them
  T* do_tile = q_tile + STAGES * BM * kP;     // UPSTREAM of them
  T* ds_tile = do_tile + UPSTREAM * BM * kP;  // transposed: [BN, BM]
  T* p_tile = ds_tile + BN * kS;              // the same for P, if SPLIT
  float2* rows = reinterpret_cast<float2*>(p_tile + (SPLIT > 1 ? BN * kS : 0));  // STAGES times the queries' statistics
  __shared__ Work<T> work;
  // The tiles of queries to load next, where one thread puts them, so that not all work them out.
  __shared__ struct {
    const T *q, *dout;
    const float2* statistics;
  } ahead;
  const int warp = warp_index(), lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4 * 2;
  const int kv_heads = heads / group;
  const Mask mask{causal, window};

  if (threadIdx.x == 0) {
    const Angles angles{cos, sin, rotary, interleaved, fp32_angles};
    work.template take<BM, D>({q, dout, statistics, dq, dk, dv, sums, turns, angles}, tiles, {q_batch, q_token, q_head},
                              {do_batch, do_token, do_head}, angles_batch, tokens, row_length, query_tiles, heads,
                              group, dim);
  }
  __syncthreads();
  const int length = work.tile.length, first = work.tile.first, number = first / BN;

  const int first_m = mask.first_query(first) / BM;
  const int end_m = (mask.end_query(min(first + BN, length) - 1, length) + BM - 1) / BM;
  const auto find_queries = [&](int g, int m) {
    ahead.q = work.q + g * q_head + static_cast<long long>(m) * BM * q_token;
    ahead.statistics = work.statistics + g * tokens + m * BM;
  };
  const auto find_upstream = [&](int g, int m) {
    ahead.dout = work.dout + g * do_head + static_cast<long long>(m) * BM * do_token;
  };
  const auto load_upstream = [&](int m, int stage) {
    load_tile<BM, D, kThreads>(shared_address(do_tile + stage * BM * kP), ahead.dout, do_token, 0, length - m * BM, dim);
    commit_copies();
  };
  const auto load_queries = [&](int m, int stage) {
    const int left = length - m * BM, own = threadIdx.x;
    load_tile<BM, D, kThreads>(shared_address(q_tile + stage * BM * kP), ahead.q, q_token, 0, left, dim);
    if (own < BM) copy_pair_async(rows + stage * BM + own, ahead.statistics + min(own, left - 1), own < left);
    if (UPSTREAM == STAGES)
      load_upstream(m, stage);
    else
      commit_copies();
  };
  // The step after: all heads of a tile of queries before the next, so that a block with fewer tiles is not held up
  // by one with more.
  const auto head_after = [&](int g) { return g == 0 ? group - 1 : g - 1; };
  k = rows_of(k, {k_batch, k_token, k_head}, work.tile, row_length, work.kv_head);
  v = rows_of(v, {v_batch, v_token, v_head}, work.tile, row_length, work.kv_head);
  load_tile<BN, D, kThreads>(shared_address(k_tile), k, k_token, first, length, dim);
  load_tile<BN, D, kThreads>(shared_address(v_tile), v, v_token, first, length, dim);
  if (threadIdx.x == kAhead) find_queries(group - 1, end_m - 1), find_upstream(group - 1, end_m - 1);
  __syncthreads();
  load_queries(end_m - 1, 0);
  if (UPSTREAM != STAGES) load_upstream(end_m - 1, 0);
  if (SPLIT > 1) {
    __syncthreads();
    const int g = head_after(group - 1), m = end_m - 1 - (group == 1);
    if (threadIdx.x == kAhead) find_queries(g, m), find_upstream(g, m);
  }

  const float slope = (softcap > 0.f ? softcap : scale) * kLog2e, cap = __fdividef(scale, softcap);
  float dk_sum[kK][kNeedK ? kD : 1][4] = {}, dv_sum[kK][kNeedV ? kD : 1][4] = {};
  const int own_key = warp / SPLIT * 16 * kK, own_query = warp % SPLIT * kColumn, own_column = warp % SPLIT * D / SPLIT;
  const unsigned own_rows = own_key * kP * sizeof(T) + rows_lane<T>(kP);
  const unsigned k_lane = shared_address(k_tile) + own_rows, v_lane = shared_address(v_tile) + own_rows;
  const int warp_first = first + own_key, warp_last = min(warp_first + 16 * kK, length) - 1;
  const int first_query = mask.first_query(warp_first);
  const int end_query = warp_first <= warp_last ? mask.end_query(warp_last, length) : 0;
  const unsigned columns = columns_lane<T>(kP) + own_query * kP * sizeof(T), across = rows_lane<T>(kP);
  unsigned* ds_own = reinterpret_cast<unsigned*>(ds_tile + (own_key + row) * kS + own_query + pair);
  unsigned* p_own = reinterpret_cast<unsigned*>(p_tile + (own_key + row) * kS + own_query + pair);

  // The blocks of a document take turns at units of 2 ** shift steps, of which there is one for each tile of
  // queries and head. How many blocks come before this one:
  const auto before = [&](int unit) {
    return window < length ? number - mask.first_key((unit << shift) / group * BM) / BN : number;
  };
  int done = -1;  // unit of the step before, if it is finished

  for (int g = group - 1, m = end_m - 1, stage = 0, begins = true; m >= first_m;) {
    const int next_g = head_after(g), next_m = m - (g == 0), next_stage = (stage + 1) % STAGES;
    const bool loads = next_m >= first_m;
    wait_for_copies_but<0>();
    __syncthreads();  // this step's queries are here; the step before has read its own, and added its dQ
    if (SPLIT == 1 && threadIdx.x == kAhead) find_queries(next_g, next_m), find_upstream(next_g, next_m);
    const unsigned q_at = shared_address(q_tile + stage * BM * kP);
    const unsigned do_at = shared_address(do_tile + (UPSTREAM > 1 ? stage : 0) * BM * kP);
    // Next to the diagonal and at the end of a document, some warps' keys are seen by none of the queries.
    const auto sees = [&](int from, int count) { return from < end_query && from + count > first_query; };
    const int query = m * BM + own_query;

    const int unit = (m * group + g) >> shift;
    int looked = 0;
    if (kNeedK && threadIdx.x == 0) {
      if (done >= 0) pass_turn(work.turns + done, before(done) + 1);
      if (begins) looked = look_at_turn(work.turns + unit);
    }

    if (sees(query, kColumn)) {
      // Scores and dP, both transposed.
      float s[kK][kQ][4], dp[kK][kNeedK ? kQ : 1][4];
      multiply_rows<kNeedK, D, T>(s, k_lane, q_at + columns, dp, v_lane, do_at + columns);
      if (SPLIT > 1 && loads) load_queries(next_m, next_stage);
      if (softcap > 0.f) {
#pragma unroll
        for (int i = 0; i < kK; ++i)
#pragma unroll
          for (int j = 0; j < kQ; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[i][j][e] = tanh_exact(s[i][j][e] * cap);
      }
      if (mask.cuts(query, kColumn, warp_first, 16 * kK, length)) {
#pragma unroll
        for (int i = 0; i < kK; ++i)
#pragma unroll
          for (int j = 0; j < kQ; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (mask.hides(query + j * 8 + pair + e % 2, warp_first + i * 16 + row + e / 2 * 8, length))
                s[i][j][e] = -kInfinity;
      }
      unsigned p_words[kK][kQ][2], ds_words[kK][kQ][2];
      if (softcap > 0.f)
        probabilities<true, kNeedK, T>(s, dp, rows + stage * BM + own_query + pair, slope, p_words, ds_words);
      else
        probabilities<false, kNeedK, T>(s, dp, rows + stage * BM + own_query + pair, slope, p_words, ds_words);
      if constexpr (kNeedK) store_words<kS>(ds_own, ds_words);
      // dV += P^T dO and dK += dS^T Q
      if constexpr (SPLIT > 1)
        store_words<kS>(p_own, p_words);
      else
        multiply_words<kNeedV, kNeedK, D, T>(dv_sum, p_words, do_at + across, dk_sum, ds_words, q_at + across);
    } else {
      if (SPLIT > 1 && loads) load_queries(next_m, next_stage);
      const unsigned none[kK][kQ][2] = {};
      if constexpr (kNeedK) store_words<kS>(ds_own, none);
      if constexpr (SPLIT > 1) store_words<kS>(p_own, none);
    }
    if (kNeedK && threadIdx.x == 0 && begins && looked != before(unit))
      wait_for_turn(work.turns + unit, before(unit));
    __syncthreads();  // dS is whole; it is this block's turn; the queries have been read
    if (SPLIT > 1 && threadIdx.x == kAhead) {
      const int g2 = head_after(next_g), m2 = next_m - (next_g == 0);
      find_queries(g2, m2);
      UPSTREAM == STAGES ? find_upstream(g2, m2) : find_upstream(next_g, next_m);
    }
    // Which of the blocks that meet these queries this one is.
    const int lowest = mask.first_key(m * BM) / BN,
              highest = (mask.end_key(min((m + 1) * BM, length) - 1, length) - 1) / BN;
    // With one stage the next queries take the place of these, through which the last block's dQ passes.
    const bool early = STAGES > 1 || !kNeedK || number != highest;
    if (SPLIT == 1 && loads && early) load_queries(next_m, next_stage);
    if constexpr (kNeedK) {
      constexpr int kApart = kThreads * 4;
      const int d_warp = warp / kRows * kB * 16, m_warp = warp % kRows * kA * 16;
      T* const read_tile = q_tile + stage * BM * kP;
      float* sum_at = work.sums + (m * group + g) * static_cast<long long>(BM * D) + threadIdx.x * 4;
      float sum[kA][2 * kC][4];
      float(*parts)[4] = &sum[0][0];

      const auto multiply_dq = [&](int pass) {
        const unsigned ds_lane = shared_address(ds_tile) + columns_lane<T>(kS) + m_warp * sizeof(T);
        const unsigned k_across = shared_address(k_tile) + across + (d_warp + pass * kC * 16) * sizeof(T);
#pragma unroll
        for (int n = 0; n < BN / 16; ++n) {
          unsigned a[kA][4];
#pragma unroll
          for (int i = 0; i < kA; ++i)
            load_matrices_transposed(a[i], ds_lane + (n * 16 * kS + i * 16) * sizeof(T));
          const auto multiply = n == 0 ? mma_first<T> : mma<T>;
#pragma unroll
          for (int d = 0; d < kC; ++d) {
            unsigned b[4];
            load_matrices_transposed(b, k_across + (n * 16 * kP + d * 16) * sizeof(T));
#pragma unroll
            for (int i = 0; i < kA; ++i) {
              multiply(sum[i][2 * d], a[i], b[0], b[1]);
              multiply(sum[i][2 * d + 1], a[i], b[2], b[3]);
            }
          }
        }
      };
      const auto add_dq = [&](int from, int end) {
        if (number == highest) return;
#pragma unroll
        for (int f = from; f < end; ++f) {
          float* const to = sum_at + f * kApart;
          if (number == lowest)
            *reinterpret_cast<float4*>(to) = {parts[f][0], parts[f][1], parts[f][2], parts[f][3]};
          else
            add_in_memory(to, parts[f]);
        }
      };
      const auto finish_dq = [&](int pass) {
        if (number != lowest) {
#pragma unroll
          for (int f = 0; f < kParts; ++f) {
            const float4 before = __ldcg(reinterpret_cast<const float4*>(sum_at + f * kApart));
            parts[f][0] += before.x, parts[f][1] += before.y;
            parts[f][2] += before.z, parts[f][3] += before.w;
          }
        }
#pragma unroll
        for (int f = 0; f < kParts; ++f)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int at = m_warp + f / (2 * kC) * 16 + row + h * 8;
            const int column = d_warp + pass * kC * 16 + f % (2 * kC) * 8 + pair;
            *reinterpret_cast<unsigned*>(read_tile + at * kP + column) =
                pack_pair<T>(parts[f][2 * h] * scale, parts[f][2 * h + 1] * scale);
          }
      };

      if constexpr (SPLIT > 1) {
        const unsigned p_lane = shared_address(p_tile) + own_key * kS * sizeof(T) + rows_lane<T>(kS);
        const unsigned ds_lane = p_lane - BN * kS * sizeof(T), part = across + own_column * sizeof(T);
        const bool meets = sees(m * BM, BM);
        constexpr int kGroups = BM / 16;
        if (UPSTREAM < STAGES) {
          if (meets) {
#pragma unroll
            for (int j = 0; j < kGroups; ++j) multiply_tile<D, kS, T>(j, dv_sum, p_lane, do_at + part);
          }
          __syncthreads();  // dO has been read
          if (loads) load_upstream(next_m, 0);
        }
        multiply_dq(0);
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          if (meets) {
            if (UPSTREAM < STAGES)
              multiply_tile<D, kS, T>(j, dk_sum, ds_lane, q_at + part);
            else
              multiply_tiles<D, kS, T>(j, dv_sum, p_lane, do_at + part, dk_sum, ds_lane, q_at + part);
          }
          add_dq(j * kParts / kGroups, (j + 1) * kParts / kGroups);
        }
        if (number == highest) {
          __syncthreads();  // all have read the queries, whose tile dQ is to pass through
          finish_dq(0);
        }
      } else {
#pragma unroll 1
        for (int pass = 0; pass < kPasses; ++pass) {
          multiply_dq(pass);
          add_dq(0, kParts);
          if (number == highest) finish_dq(pass);
          sum_at += kParts * kApart;
        }
      }
      if (number == highest) {
        __syncthreads();
        store_turned_back<BM, D, kThreads>(work.dq + g * dim, heads * dim, m * BM, length, dim, read_tile,
                                           work.angles);
      }
    }
    if (SPLIT == 1 && loads && !early) {
      __syncthreads();
      load_queries(next_m, 0);
    }
    begins = next_m < first_m || (next_m * group + next_g) >> shift != unit;
    done = begins ? unit : -1;
    g = next_g, m = next_m, stage = next_stage;
  }
  __syncthreads();
  if (kNeedK && threadIdx.x == 0) pass_turn(work.turns + done, before(done) + 1);

#pragma unroll
  for (int i = 0; i < kK; ++i)
#pragma unroll
    for (int d = 0; d < kD; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = (own_key + i * 16 + row + h * 8) * kP + own_column + d * 8 + pair;
        if constexpr (kNeedK)
          *reinterpret_cast<unsigned*>(k_tile + at) =
              pack_pair<T>(dk_sum[i][d][2 * h] * scale, dk_sum[i][d][2 * h + 1] * scale);
        if constexpr (kNeedV)
          *reinterpret_cast<unsigned*>(v_tile + at) = pack_pair<T>(dv_sum[i][d][2 * h], dv_sum[i][d][2 * h + 1]);
      }
  __syncthreads();
  const int stride = kv_heads * dim;
  if constexpr (kNeedK)
    store_turned_back<BN, D, kThreads>(work.dk, stride, first, length, dim, k_tile, work.angles);
  if constexpr (kNeedV) store_tile<BN, D, kThreads>(work.dv, stride, first, length, dim, v_tile);
}

// instantiate sm_80 sm_90a sm_100: flash_attention_backward<{__nv_bfloat16,__half},64,32,128,4,1,2,2,0,2>
// instantiate sm_80 sm_90a sm_100: flash_attention_backward<{__nv_bfloat16,__half},96,64,128,8,2,2,2,0,1>
// instantiate sm_80: flash_attention_backward<{__nv_bfloat16,__half},128,64,128,8,2,2,1,0,1>
// instantiate sm_90a sm_100: flash_attention_backward<{__nv_bfloat16,__half},128,64,128,8,2,2,2,0,1>
// instantiate sm_80 sm_90a sm_100: flash_attention_backward<{__nv_bfloat16,__half},256,32,64,4,1,1,1,{1,2},1>
// instantiate sm_86 sm_89 sm_120: flash_attention_backward<{__nv_bfloat16,__half},64,64,64,4,1,1,1,0,2>
// instantiate sm_86 sm_89 sm_120: flash_attention_backward<{__nv_bfloat16,__half},96,64,64,4,1,1,1,0,1>
// instantiate sm_86 sm_89 sm_120: flash_attention_backward<{__nv_bfloat16,__half},128,32,64,4,1,1,1,0,1>
// instantiate sm_86 sm_89 sm_120: flash_attention_backward<{__nv_bfloat16,__half},256,32,32,2,1,1,1,{1,2},1>
// instantiate sm_75: flash_attention_backward<__half,64,64,64,4,1,1,1,0,1>
// instantiate sm_75: flash_attention_backward<__half,96,32,64,4,1,1,1,0,1>
// instantiate sm_75: flash_attention_backward<__half,128,32,64,4,1,1,1,{1,2},1>
