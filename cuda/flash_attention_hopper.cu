// SPDX-License-Identifier: MIT
// Attention's forward pass on Hopper: what flash_attention.cu computes, by warpgroups (wgmma.cuh).
//
// A warpgroup has 64 of a block's queries. What it waits for is hidden by the block's other warpgroup and by those
// of a second block on the SM: one's products run while another is at its exponentials. That leaves a scheduler
// four warps to hide the latency of ordinary instructions, so that the time is that of their number: hence the
// maximum that is followed late, the masks by one comparison, and the copies by running pointers.
#include "attention.cuh"
#include "wgmma.cuh"

constexpr int kThreads = 256;  // two warpgroups

// A thread's part in copies of tiles of ROWS rows: a 16-byte piece of every panel, in rows kDown apart.
template <int ROWS, int D, typename T>
struct Copies {
  static constexpr int kDown = kThreads / 8;
  const T* from;
  unsigned to;  // in a tile
  int stride, row, column;

  // `head` points to row 0; the tile begins with row `first`.
  __device__ __forceinline__ Copies(const T* head, int stride, int first)
      : stride(stride), row(threadIdx.x / 8), column(threadIdx.x % 8 * 8) {
    from = head + static_cast<long long>(first + row) * stride + column;
    to = piece_at<ROWS>(row, column);
  }
  // Zeros past `dim` and, unless the document has the WHOLE tile, from its row `left` on.
  template <bool WHOLE = false>
  __device__ __forceinline__ void copy(unsigned tile, int dim, int left = 0) const {
#pragma unroll
    for (int i = 0; i < ROWS / kDown; ++i)
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel)
        copy_async(tile + to + i * kDown * 128 + panel * ROWS * 128, from + i * kDown * stride + panel * 64,
                   column + panel * 64 < dim && (WHOLE || row + i * kDown < left));
  }
  // Of the tile before.
  __device__ __forceinline__ void copy_before(unsigned tile, int dim) {
    from -= ROWS * stride;
    copy<true>(tile, dim);
  }
};

// Until at most LEFT groups of the block's copies are unfinished; the others may be multiplied.
template <int LEFT>
__device__ __forceinline__ void receive_copies_but() {
  wait_for_copies_but<LEFT>();
  publish_shared();
  __syncthreads();
}

// The softmax of a thread's two rows so far. Its exponents of 2 are relative to `base`, which need not be the
// maximum: it becomes the maximum when a score exceeds `bound`, that is, would have an exponent above 8. After a
// row's first tile that is rare. Nothing overflows: 2^8 is far from the largest number of either dtype.
struct Softmax {
  float base[2] = {}, bound[2] = {-kInfinity, -kInfinity}, sum[2] = {};

  // Whether any of the warp's scores exceeds its row's bound.
  template <int N>
  __device__ __forceinline__ bool outgrown(const float (&s)[N][4], float (&top)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
      for (int j = 1; j < N; ++j) top[h] = fmaxf(top[h], fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    }
    return __any_sync(0xffffffffu, top[0] > bound[0] || top[1] > bound[1]);
  }
  // Moves the base of such rows and shrinks their sums; others' shrink by one, exactly.
  template <int N>
  __device__ __forceinline__ void follow(float (&top)[2], float slope, float room, float (&o)[N][4]) {
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
      shrink[h] = 1.f;
      if (top[h] > bound[h]) {
        if (bound[h] > -kInfinity) shrink[h] = exp2_fast(base[h] - top[h] * slope);  // else all sums are zero
        base[h] = top[h] * slope;
        bound[h] = top[h] + room;
      }
      sum[h] *= shrink[h];
    }
#pragma unroll
    for (int d = 0; d < N; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[d][e] *= shrink[e / 2];
  }
  template <int N>
  __device__ __forceinline__ void exponentials(float (&s)[N][4], float slope) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = 0.f;
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[j][e] = exp2_fast(s[j][e] * slope - base[h]);
          total += s[j][e];
        }
      sum[h] += total;
    }
  }
};

// A warpgroup's 64 queries and their output so far.
template <typename T, int D, int BM, int BN>
struct Attention {
  Mask mask;
  int length, warp_first, last_tile;
  int clear_first, clear_last;         // tiles that begin from one to the other are seen by all rows of the warp
  unsigned q_rows, k_rows, v_columns;  // matrices, of keys and values those of even tiles
  float slope, room, softcap, cap;     // scores times `slope` are exponents of 2; `room` times it is 8
  float o[D / 8][4] = {};
  Softmax softmax;

  // Adds the first KEYS keys of tile n.
  template <int KEYS>
  __device__ __forceinline__ void attend(int n) {
    constexpr int kN = KEYS / 8;
    const unsigned half = (n & 1) * (BN * D * sizeof(T) >> 4);
    float s[kN][4];
    unsigned p[kN / 2][4];
    begin_products();
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
      multiply_shared<T, false, false>(s, q_rows + row_step<BM>(d), k_rows + half + row_step<BN>(d), d > 0);
    end_products();
    wait_for_products<0>();
    pin(s);

    if (softcap > 0.f) {
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = tanh_exact(s[j][e] * cap);
    }
    const int query = warp_first + threadIdx.x % 32 / 4, key = n * BN + threadIdx.x % 4 * 2;
    if (n * BN > clear_last) {
      const int end[2] = {mask.end_key(query, length) - key, mask.end_key(query + 8, length) - key};
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (j * 8 + e % 2 >= end[e / 2]) s[j][e] = -kInfinity;
    }
    if (n * BN < clear_first) {
      const int begin[2] = {query - mask.window + 1 - key, query + 8 - mask.window + 1 - key};
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (j * 8 + e % 2 < begin[e / 2]) s[j][e] = -kInfinity;
    }

    float top[2];
    if (softmax.outgrown(s, top)) softmax.follow(top, slope, room, o);
    softmax.exponentials(s, slope);
#pragma unroll
    for (int j = 0; j < kN / 2; ++j)
#pragma unroll
      for (int h = 0; h < 4; ++h)
        p[j][h] = pack_pair<T>(s[2 * j + h / 2][h % 2 * 2], s[2 * j + h / 2][h % 2 * 2 + 1]);

    if (n == last_tile) receive_copies_but<1>();  // its values; others come with their keys
    pin(o), pin(p);
    begin_products();
#pragma unroll
    for (int j = 0; j < kN / 2; ++j)
      multiply_registers<T, true>(o, p[j], v_columns + half + column_step(j), true);
    end_products();
    wait_for_products<0>();
    pin(o);
  }
};

// A block for every tile (z), head of keys (y) and head of its group (x): what shares keys runs side by side.
template <typename T, int D, int BM, int BN, int BLOCKS>
__global__ void __launch_bounds__(kThreads, BLOCKS)
    flash_attention_hopper(const T* __restrict__ q,    // [batch, tokens, heads, dim], strided
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
  static_assert(BM == kThreads / 2, "64 rows to a warpgroup");
  constexpr int kD = D / 8;  // groups of columns
  constexpr unsigned kBytes = BN * D * sizeof(T);  // of a tile of keys or values
  extern __shared__ __align__(1024) unsigned char shared[];
  const unsigned q_at = shared_address(shared), k_at = q_at + BM * D * sizeof(T), v_at = k_at + 2 * kBytes;
  const int warp = warp_index(), lane = threadIdx.x % 32, row = lane / 4;

  const Tile tile = tiles[blockIdx.z];
  const int length = tile.length, first = tile.first, kv_head = blockIdx.y, head = kv_head * group + blockIdx.x;
  const Mask mask{causal, window};
  const int begin = tile.start - tile.document * row_length;  // the document's, in its row of the batch
  const auto head_at = [&](const T* tensor, long long batch, int stride, int head) {
    return tensor + tile.document * batch + static_cast<long long>(head) * stride;
  };
  // Tiles of keys come from the last to the first, the next one into the other half of the memory for them.
  const int first_tile = mask.first_key(first) / BN;
  const int last_tile = (mask.end_key(min(first + BM, length) - 1, length) - 1) / BN;
  const Copies<BM, D, T> queries(head_at(q, q_batch, q_head, head), q_token, begin + first);
  Copies<BN, D, T> keys(head_at(k, k_batch, k_head, kv_head), k_token, begin + last_tile * BN);
  Copies<BN, D, T> values(head_at(v, v_batch, v_head, kv_head), v_token, begin + last_tile * BN);
  queries.copy(q_at, dim, length - first);
  keys.copy(k_at + (last_tile & 1) * kBytes, dim, length - last_tile * BN);
  commit_copies();
  values.copy(v_at + (last_tile & 1) * kBytes, dim, length - last_tile * BN);
  commit_copies();

  const int group_first = first + warp / 4 * 64, warp_first = first + warp * 16;
  // Next to the diagonal and at a document's end, a warpgroup's rows may see nothing of a tile, or of its 2nd half.
  const int end_key = group_first < length ? mask.end_key(min(group_first + 64, length) - 1, length) : 0;
  Attention<T, D, BM, BN> rows{mask, length, warp_first, last_tile};
  rows.clear_first = warp_first + 16 - window, rows.clear_last = mask.end_key(warp_first, length) - BN;
  rows.q_rows = by_rows(q_at + warp / 4 * 64 * 128), rows.k_rows = by_rows(k_at);
  rows.v_columns = by_columns<BN>(v_at);
  rows.slope = (softcap > 0.f ? softcap : scale) * kLog2e, rows.room = fminf(__fdividef(8.f, rows.slope), 1e30f);
  rows.softcap = softcap, rows.cap = __fdividef(scale, softcap);

  for (int n = last_tile; n >= first_tile; --n) {
    // The tile has come, and the one after it has been read.
    if (n == last_tile)
      receive_copies_but<1>();
    else
      receive_copies_but<0>();
    if (n > first_tile) {
      keys.copy_before(k_at + (~n & 1) * kBytes, dim);
      values.copy_before(v_at + (~n & 1) * kBytes, dim);
    }
    commit_copies();
    if (n * BN >= end_key) {
      if (n == last_tile) receive_copies_but<1>();
    } else if (BN > 64 && n * BN + 64 >= end_key) {
      rows.template attend<64>(n);
    } else {
      rows.template attend<BN>(n);
    }
  }

  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = rows.softmax.sum[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    inverse[h] = reciprocal_fast(total);
    const int at = warp_first + row + h * 8;
    if (lane % 4 == 0 && at < length) lse[head * tokens + tile.start + at] = rows.softmax.base[h] + __log2f(total);
  }
  // Through the warp's own rows of the queries' tile, to be stored in whole lines.
  wait_for_group<128>(1 + warp / 4);  // the warpgroup has read them
#pragma unroll
  for (int d = 0; d < kD; d += 2) {
    unsigned words[4];
#pragma unroll
    for (int h = 0; h < 4; ++h)
      words[h] = pack_pair<T>(rows.o[d + h / 2][h % 2 * 2] * inverse[h % 2],
                              rows.o[d + h / 2][h % 2 * 2 + 1] * inverse[h % 2]);
    store_matrices(q_at + piece_at<BM>(warp * 16 + lane % 16, d * 8 + lane / 16 * 8), words);
  }
  __syncwarp();
  constexpr int kDown = 32 / kD;  // rows that a warp stores at once
  const int at = warp * 16 + lane / kD, column = lane % kD * 8, left = column < dim ? length - first - at : 0;
  const unsigned piece = piece_at<BM>(at, column);
  T* to = const_cast<T*>(head_at(out, o_batch, o_head, head)) + (begin + first + at) * o_token + column;
#pragma unroll
  for (int i = 0; i < 16; i += kDown, to += kDown * o_token)
    if (i < left)  // piece_at of row at + i: the bits of i are zero in at
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(shared + ((piece ^ i % 8 * 16) + i * 128));
}
// instantiate sm_90a: flash_attention_hopper<{__nv_bfloat16,__half},64,128,128,2>
// instantiate sm_90a: flash_attention_hopper<{__nv_bfloat16,__half},128,128,64,2>
