// SPDX-License-Identifier: MIT
// Attention without its matrix of scores, backward, for Hopper: the algorithm, the order of additions and the
// turns at dQ of flash_attention_backward.cu, with its products by wgmma (Shah et al. 2024, arXiv:2407.08608).
//
// Two warpgroups have 64 keys each, a third loads. A step's five products are in flight while the warps compute:
// P while dP = V dO^T is multiplied, dS while dV += P^T dO, and dQ is added up in device memory while the next
// step's scores K Q^T are. Three stages of queries and two of dS leave one barrier to a step.
#include "attention_backward.cuh"
#include "wgmma.cuh"

// Where shared memory begins, found anew wherever it is asked for: registers that would keep it are wanted.
__device__ __forceinline__ unsigned shared_start(const void* shared) {
  unsigned at;
  asm volatile("{ .reg .b64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(at) : "l"(shared));
  return at;
}

// As load_tile, into panels.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void load_panels(unsigned to, const T* rows, int stride, int first, int length,
                                            int dim, unsigned thread = threadIdx.x) {
  const Pieces<ROWS, D, THREADS> piece(thread);
  static_assert(piece.kDown % 8 == 0, "a thread's pieces are exchanged alike");
  const T* from = rows + static_cast<long long>(first) * stride + (piece.row * stride + piece.column);
  to += piece_at<ROWS>(piece.row, piece.column);
  int left = piece.column < dim ? length - first - piece.row : 0;
#pragma unroll 4
  for (int i = 0; i < piece.kCount; ++i) {
    copy_async(to, from, left > 0);
    to += piece.kDown * 128, from += piece.kDown * stride, left -= piece.kDown;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(384, 1)
    flash_attention_backward_hopper(
        const T* __restrict__ q,     // [batch, tokens, heads, dim], strided
        const T* __restrict__ k,     // [batch, tokens, heads / group, dim], strided
        const T* __restrict__ v,     // as k
        const T* __restrict__ dout,  // as q
        const float2* __restrict__ statistics,  // [heads, batch * tokens]
        T* __restrict__ dq,               // [batch * tokens, heads, dim]
        T* __restrict__ dk,               // [batch * tokens, heads / group, dim]
        T* __restrict__ dv,               // as dk
        float* sums,                      // [heads / group, query_tiles, group, kM * D], for dq
        int* turns,                       // [1 + heads * query_tiles], zeros; the first counts blocks
        const Tile* __restrict__ tiles,   // of 128 keys, in the order of work
        const void* cos, const void* sin,  // [batch or 1, row_length, rotary]: q and k are turned by them; dq, dk not
        long long q_batch, long long q_token, long long q_head,     //
        long long k_batch, long long k_token, long long k_head,     //
        long long v_batch, long long v_token, long long v_head,     //
        long long do_batch, long long do_token, long long do_head,  //
        long long angles_batch,  // rows of cos in a row of the batch, or 0 if they share them
        long long tokens, int row_length, int query_tiles, int heads, int group, int shift, int dim, float scale,
        float,  // the portable kernel's softcap
        int causal, int window, int rotary, int interleaved, int fp32_angles) {
  constexpr int kThreads = 256, kLoaders = 128, kM = 64, kN = 128, kStages = 3;
  constexpr int kMeeting = 1, kEmpty = 2;  // barriers: of those that compute; of each stage, with the loaders
  constexpr int kParts = kM * D / 4 / kThreads;  // of dQ's tile, each four elements, a thread has
  // dK's product takes dS from registers where the sums leave enough of them.
  constexpr bool kKeepDs = D == 64;
  constexpr unsigned kQueries = kM * D * sizeof(T), kKeys = kN * D * sizeof(T), kScores = kN * kM * sizeof(T);
  // Shared memory begins with K; then V, the stages of Q and dO, two of dS, and dQ.
  constexpr unsigned kV = kKeys, kQ = 2 * kKeys, kDs = kQ + 2 * kStages * kQueries;
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* const rest = shared + kDs + 2 * kScores;
  T* const dq_tile = reinterpret_cast<T*>(rest);
  float* const landing = reinterpret_cast<float*>(rest);  // the other blocks' dQ of a step, until it is the tile
  float2* const rows = reinterpret_cast<float2*>(landing + kM * D);  // kStages times the queries' statistics
  Work<T>& work = *reinterpret_cast<Work<T>*>(rows + kStages * kM);
  const unsigned full_at = shared_address(&work + 1);
  const int warp = warp_index(), warpgroup = warp / 4, lane = threadIdx.x % 32, row = lane / 4, pair = lane % 4 * 2;
  const int kv_heads = heads / group;
  const Mask mask{causal, window};

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) make_barrier(full_at + i * 8, kLoaders);
    const Angles angles{cos, sin, rotary, interleaved, fp32_angles};
    work.template take<kM, D>({q, dout, statistics, dq, dk, dv, sums, turns, angles}, tiles, {q_batch, q_token, q_head},
                              {do_batch, do_token, do_head}, angles_batch, tokens, row_length, query_tiles, heads,
                              group, dim);
  }
  __syncthreads();
  const int length = work.tile.length, first = work.tile.first, number = first / kN;

  const int first_m = mask.first_query(first) / kM;
  const int end_m = (mask.end_query(min(first + kN, length) - 1, length) + kM - 1) / kM;
  const int steps = (end_m - first_m) * group;
  // All heads of a tile of queries before the next: a block with fewer tiles is not held up by one with more.
  if (warp >= kThreads / 32) {
    leave_registers<24>();  // 24 * 128 + 240 * 256 are what 384 threads have at the start
    const unsigned thread = threadIdx.x - kThreads;
    // After the last load come the stages whose leaving nobody has waited for.
    for (int step = 0, stage = 0, m = end_m - 1, g = group - 1; step < steps + kStages - 1; ++step) {
      if (step >= kStages) wait_for_group<kThreads + kLoaders>(kEmpty + stage);
      if (step < steps) {
        const int at = m * kM;
        const unsigned to = shared_start(shared) + kQ + 2 * stage * kQueries;
        load_panels<kM, D, kLoaders>(to, work.q + g * q_head, q_token, at, length, dim, thread);
        load_panels<kM, D, kLoaders>(to + kQueries, work.dout + g * do_head, do_token, at, length, dim, thread);
        if (thread < kM)
          copy_pair_async(rows + stage * kM + thread, work.statistics + g * tokens + min(at + thread, length - 1),
                          at + thread < length);
        arrive_with_copies(full_at + stage * 8);
        if (--g < 0) g = group - 1, --m;
      }
      if (++stage == kStages) stage = 0;
    }
    wait_for_copies();
    return;
  }
  k = rows_of(k, {k_batch, k_token, k_head}, work.tile, row_length, work.kv_head);
  v = rows_of(v, {v_batch, v_token, v_head}, work.tile, row_length, work.kv_head);
  load_panels<kN, D, kThreads>(shared_address(shared), k, k_token, first, length, dim);
  load_panels<kN, D, kThreads>(shared_address(shared) + kV, v, v_token, first, length, dim);
  take_registers<240>();

  const float slope = scale * kLog2e;
  float dk_sum[D / 8][4] = {}, dv_sum[D / 8][4] = {};
  const int own_key = warp * 16, warp_first = first + own_key;
  const int dq_column = warpgroup * (D / 2);  // a warpgroup has half of dQ's columns
  const unsigned ds_row = own_key + lane / 8 % 2 * 8 + lane % 8;

  float s[kM / 8][4];
  unsigned ds_words[kM / 16][4];
  // Scores of the queries in a stage.
  const auto multiply_scores = [&](int stage) {
    const unsigned start = shared_start(shared), queries = by_rows(start + kQ + 2 * stage * kQueries);
    const unsigned k_own = by_rows(start + warpgroup * 64 * 128);
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
      multiply_shared<T, false, false>(s, k_own + row_step<kN>(i), queries + row_step<kM>(i), i > 0);
    end_products();
  };
  // P of a tile of queries, whose scores are on their way; dV and dS from it.
  const auto weigh = [&](int m, int stage, int buffer) {
    const unsigned start = shared_start(shared), do_at = start + kQ + (2 * stage + 1) * kQueries;
    const unsigned v_own = by_rows(start + kV + warpgroup * 64 * 128);
    const float2* const statistics_at = rows + stage * kM + pair;
    float dp[kM / 8][4];
    begin_products();
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
      multiply_shared<T, false, false>(dp, v_own + row_step<kN>(i), by_rows(do_at) + row_step<kM>(i), i > 0);
    end_products();

    wait_for_products<1>();
    pin(s);
    float p[kM / 8][4];
#pragma unroll
    for (int j = 0; j < kM / 8; ++j) {
      const float4 both = *reinterpret_cast<const float4*>(statistics_at + j * 8);  // lse and delta, twice
#pragma unroll
      for (int e = 0; e < 4; ++e) p[j][e] = exp2_fast(s[j][e] * slope - (e % 2 ? both.z : both.x));
    }
    if (mask.cuts(m * kM, kM, warp_first, 16, length)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // A key is seen by a range of queries, so that one comparison without sign tells.
        const int key = warp_first + row + h * 8, from = mask.first_query(key);
        const unsigned seen = key < length ? max(mask.end_query(key, length) - from, 0) : 0;
#pragma unroll
        for (int j = 0; j < kM / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (static_cast<unsigned>(m * kM + pair - from + j * 8 + e) >= seen) p[j][2 * h + e] = 0.f;
      }
    }
    unsigned p_words[kM / 16][4];
#pragma unroll
    for (int j = 0; j < kM / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) p_words[j / 2][j % 2 * 2 + h] = pack_pair<T>(p[j][2 * h], p[j][2 * h + 1]);
    begin_products();
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
      multiply_registers<T, true>(dv_sum, p_words[i], by_columns<kM>(do_at) + column_step(i), true);
    end_products();

    wait_for_products<1>();
    pin(dp);
#pragma unroll
    for (int j = 0; j < kM / 8; ++j) {
      const float4 both = *reinterpret_cast<const float4*>(statistics_at + j * 8);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        ds_words[j / 2][j % 2 * 2 + h] = pack_pair<T>(p[j][2 * h] * (dp[j][2 * h] - both.y),
                                                      p[j][2 * h + 1] * (dp[j][2 * h + 1] - both.w));
    }
#pragma unroll
    for (int i = 0; i < kM / 16; ++i)
      store_matrices(start + kDs + buffer * kScores + piece_at<kN>(ds_row, i * 16 + lane / 16 * 8), ds_words[i]);
    wait_for_products<0>();
    publish_shared();  // before the wait it crashes NVRTC 12.8 and 12.9
  };

  float sum[kParts][4];
  const auto multiply_dq = [&](int buffer) {
    const unsigned start = shared_start(shared), ds_at = start + kDs + buffer * kScores;
    const unsigned ds = by_columns<kN>(ds_at);
    const unsigned k_columns = by_columns<kN>(start + dq_column / 64 * kN * 128 + dq_column % 64 * 2);
    begin_products();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i)
      multiply_shared<T, true, true>(sum, ds + column_step(i), k_columns + column_step(i), i > 0);
    end_products();
  };
  const auto multiply_dk = [&](int stage, int buffer) {
    const unsigned start = shared_start(shared), queries = by_columns<kM>(start + kQ + 2 * stage * kQueries);
    const unsigned own_ds = by_rows(start + kDs + buffer * kScores + warpgroup * 64 * 128);
    begin_products();
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      if constexpr (kKeepDs)
        multiply_registers<T, true>(dk_sum, ds_words[i], queries + column_step(i), true);
      else
        multiply_shared<T, false, true>(dk_sum, own_ds + row_step<kN>(i), queries + column_step(i), true);
    }
  };
  // Where this block is among those that meet a step's queries, and its part of their sum in device memory.
  float* sum_at;
  bool lowest, highest;
  const auto meet_queries = [&](int m, int g) {
    lowest = number == mask.first_key(m * kM) / kN;
    highest = number == (mask.end_key(min((m + 1) * kM, length) - 1, length) - 1) / kN;
    sum_at = work.sums + (m * group + g) * static_cast<long long>(kM * D) + threadIdx.x * 4;
    if (highest && !lowest) {
#pragma unroll
      for (int f = 0; f < kParts; ++f)
        copy_async(shared_address(landing + (f * kThreads + threadIdx.x) * 4), sum_at + f * kThreads * 4, true);
    }
  };
  const auto add_dq = [&](int m, int g) {
    pin(sum);
    if (!highest) {
#pragma unroll
      for (int f = 0; f < kParts; ++f) {
        float* const to = sum_at + f * kThreads * 4;
        if (lowest)
          *reinterpret_cast<float4*>(to) = {sum[f][0], sum[f][1], sum[f][2], sum[f][3]};
        else
          add_in_memory(to, sum[f]);
      }
      return;
    }
    if (!lowest) {
      wait_for_copies();
#pragma unroll
      for (int f = 0; f < kParts; ++f) {
        const float4 others = *reinterpret_cast<const float4*>(landing + (f * kThreads + threadIdx.x) * 4);
        sum[f][0] += others.x, sum[f][1] += others.y, sum[f][2] += others.z, sum[f][3] += others.w;
      }
      wait_for_group<kThreads>(kMeeting);
    }
#pragma unroll
    for (int f = 0; f < kParts; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<unsigned*>(dq_tile + (warp % 4 * 16 + row + h * 8) * kPitch<D> + dq_column + f * 8 +
                                     pair) = pack_pair<T>(sum[f][2 * h] * scale, sum[f][2 * h + 1] * scale);
    wait_for_group<kThreads>(kMeeting);
    store_turned_back<kM, D, kThreads>(work.dq + g * dim, heads * dim, m * kM, length, dim, dq_tile, work.angles);
  };

  // The blocks of a document take turns at units of 2 ** shift steps; a step's place counts the steps of all tiles
  // of queries and heads. How many blocks come before this one:
  const auto before = [&](int unit) {
    return window >= length ? number : number - mask.first_key((unit << shift) / group * kM) / kN;
  };
  const int in_unit = (1 << shift) - 1, last_place = end_m * group - 1;
  int unit, looked;
  bool begins;  // a unit, and this is the thread that tells the other blocks
  const auto look = [&](int step) {
    const int place = last_place - step;
    unit = place >> shift;
    begins = threadIdx.x == 0 && (step == 0 || (place & in_unit) == in_unit);
    if (begins) looked = look_at_turn(work.turns + unit);
  };
  int m = end_m - 1, g = group - 1, stage = 0, passage = 0;
  // After it dS is whole, the next queries are here, and it is this block's turn. The step before has added its
  // dQ, and its queries and dS have been read.
  const auto meet = [&](int step) {
    if (begins && looked != before(unit)) wait_for_turn(work.turns + unit, before(unit));
    wait_for_group<kThreads>(kMeeting);
    if (step > 0) leave_group<kThreads + kLoaders>(kEmpty + (stage == 0 ? kStages - 1 : stage - 1));
    if (begins && step > 0) pass_turn(work.turns + unit + 1, before(unit + 1) + 1);
  };

  look(0);
  wait_for_copies();
  wait_for(full_at, 0);
  publish_shared();
  wait_for_group<kThreads>(kMeeting);
  pin(dk_sum);
  pin(dv_sum);
  begin_products();
  multiply_scores(0);
  wait_for_products<0>();
  weigh(m, 0, 0);
  // The compiler overlaps products of a loop only if nothing leaves it in the middle.
  for (int step = 0; step + 1 < steps; ++step) {
    const int next_stage = stage == kStages - 1 ? 0 : stage + 1;
    if (next_stage == 0) passage ^= 1;
    meet(step);
    multiply_dq(step % 2);
    meet_queries(m, g);
    wait_for(full_at + next_stage * 8, passage);
    publish_shared();
    multiply_scores(next_stage);
    wait_for_products<1>();
    add_dq(m, g);
    multiply_dk(stage, step % 2);

    if (--g < 0) g = group - 1, --m;
    stage = next_stage;
    look(step + 1);
    weigh(m, stage, (step + 1) % 2);
  }
  meet(steps - 1);
  multiply_dq((steps + 1) % 2);
  meet_queries(m, g);
  wait_for_products<0>();
  add_dq(m, g);
  multiply_dk(stage, (steps + 1) % 2);
  end_products();
  wait_for_products<0>();
  pin(dk_sum);
  pin(dv_sum);
  wait_for_group<kThreads>(kMeeting);
  if (threadIdx.x == 0) {
    const int unit = first_m * group >> shift;
    pass_turn(work.turns + unit, before(unit) + 1);
  }

  T* const dk_tile = reinterpret_cast<T*>(shared);
  T* const dv_tile = dk_tile + kN * kPitch<D>;
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = (own_key + row + h * 8) * kPitch<D> + d * 8 + pair;
      *reinterpret_cast<unsigned*>(dk_tile + at) =
          pack_pair<T>(dk_sum[d][2 * h] * scale, dk_sum[d][2 * h + 1] * scale);
      *reinterpret_cast<unsigned*>(dv_tile + at) = pack_pair<T>(dv_sum[d][2 * h], dv_sum[d][2 * h + 1]);
    }
  wait_for_group<kThreads>(kMeeting);
  const int stride = kv_heads * dim;
  store_turned_back<kN, D, kThreads, 2>(work.dk, stride, first, length, dim, dk_tile, work.angles);
  store_tile<kN, D, kThreads>(work.dv, stride, first, length, dim, dv_tile);
}
// instantiate sm_90a: flash_attention_backward_hopper<{__nv_bfloat16,__half},{64,128}>
