// SPDX-License-Identifier: MIT
// What the passes of attention share: tiles of documents in shared memory, and which keys a query sees.
#pragma once
#include "fast_math.cuh"
#include "mma.cuh"

// Rows of a tile in shared memory lie 16 bytes further apart than they are long, so that the eight rows which
// ldmatrix reads at once are in different banks, for every D that is a multiple of 16.
template <int D>
constexpr int kPitch = D + 8;

// A [batch, tokens, heads, dim] tensor; strides in elements.
struct Layout {
  long long batch, token, head;
};

// One tile of one document. `first` is a row of the document.
struct Tile {
  int start;     // of the document among all tokens of all rows of the batch
  int length;    // of the document
  int first;     // row of the document
  int document;  // its number
};

// Which keys a query sees: `window` counts itself, and is at least `length` where there is none.
struct Mask {
  int causal, window;

  // First and one past the last row of the other side that rows [first, last] meet.
  __device__ __forceinline__ int first_key(int first) const { return max(0, first - window + 1); }
  __device__ __forceinline__ int end_key(int last, int length) const {
    return min(length, causal ? last + 1 : last + min(window, length));
  }
  __device__ __forceinline__ int first_query(int first) const {
    return causal ? first : max(0, first - window + 1);
  }
  __device__ __forceinline__ int end_query(int last, int length) const {
    return min(length, last + min(window, length));
  }
  // Whether some query of [q, q + queries) does not see some key of [k, k + keys).
  __device__ __forceinline__ bool cuts(int q, int queries, int k, int keys, int length) const {
    return k + keys > length || (causal ? k + keys - 1 > q : k + keys - 1 - q >= window) ||
           q + queries - 1 - k >= window;
  }
  __device__ __forceinline__ bool hides(int query, int key, int length) const {
    const int distance = query - key;
    return key >= length || distance >= window || (causal ? distance < 0 : -distance >= window);
  }
};

template <typename T>
__device__ __forceinline__ const T* rows_of(const T* tensor, const Layout& layout, const Tile& tile,
                                            int row_length, int head) {
  const long long token = tile.start - static_cast<long long>(tile.document) * row_length;
  return tensor + tile.document * layout.batch + token * layout.token + head * layout.head;
}

// How the 16-byte pieces of a tile's rows are spread over a block: a thread keeps its column.
template <int ROWS, int D, int THREADS>
struct Pieces {
  static constexpr int kAcross = D <= 64 ? 8 : D <= 128 ? 16 : 32;  // threads to a row
  static constexpr int kDown = THREADS / kAcross, kCount = ROWS / kDown;
  static_assert(kDown <= ROWS && ROWS % kDown == 0, "whole passes");
  int row, column;
  __device__ __forceinline__ Pieces(unsigned thread = threadIdx.x)
      : row(thread / kAcross), column(thread % kAcross * 8) {}
  __device__ __forceinline__ bool idle() const { return D / 8 != kAcross && column >= D; }
};

// Copies ROWS rows of a document, from `first` on, into shared memory; zeros past its end and past `dim`.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void load_tile(unsigned to, const T* rows, int stride, int first, int length,
                                          int dim) {
  const Pieces<ROWS, D, THREADS> piece;
  if (piece.idle()) return;
  const T* from = rows + static_cast<long long>(first) * stride + (piece.row * stride + piece.column);
  to += (piece.row * kPitch<D> + piece.column) * sizeof(T);
  constexpr unsigned kStep = piece.kDown * kPitch<D> * sizeof(T);
  if (first + ROWS <= length && dim == D) {
#pragma unroll
    for (int i = 0; i < piece.kCount; ++i) copy_async(to + i * kStep, from + i * piece.kDown * stride, true);
  } else {
    const int left = piece.column < dim ? length - first - piece.row : 0;
#pragma unroll
    for (int i = 0; i < piece.kCount; ++i) {
      const bool exists = i * piece.kDown < left;
      copy_async(to + i * kStep, exists ? from + i * piece.kDown * stride : rows, exists);
    }
  }
}

// The reverse, after the tile was written to shared memory.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void store_tile(T* rows, int stride, int first, int length, int dim,
                                           const T* from) {
  const Pieces<ROWS, D, THREADS> piece;
  if (piece.column >= dim) return;
  rows += static_cast<long long>(first) * stride + (piece.row * stride + piece.column);
#pragma unroll
  for (int i = 0; i < piece.kCount; ++i) {
    const int row = piece.row + i * piece.kDown;
    if (first + row < length)
      *reinterpret_cast<uint4*>(rows + i * piece.kDown * stride) =
          *reinterpret_cast<const uint4*>(from + row * kPitch<D> + piece.column);
  }
}

// Where a lane reads fragments in a tile with rows PITCH apart: A, or B from its transpose, and B by its columns.
template <typename T>
__device__ __forceinline__ unsigned rows_lane(int pitch) {
  const int lane = threadIdx.x % 32;
  return (lane % 16 * pitch + lane / 16 * 8) * sizeof(T);
}
template <typename T>
__device__ __forceinline__ unsigned columns_lane(int pitch) {
  const int lane = threadIdx.x % 32;
  return ((lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8) * sizeof(T);
}

// C = A B^T of M groups of rows of A and N of B, D long, both in shared memory. With TWICE another pair of the
// same shape: two sums in flight hide each other's latency.
template <bool TWICE, int D, typename T, int M, int N2, int N1>
__device__ __forceinline__ void multiply_rows(float (&c0)[M][N2][4], unsigned a0, unsigned b0,  //
                                              float (&c1)[M][N1][4], unsigned a1, unsigned b1) {
  constexpr int kP = kPitch<D>;
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    unsigned x[M][4], y[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      load_matrices(x[i], a0 + (i * 16 * kP + d * 16) * sizeof(T));
      if constexpr (TWICE) load_matrices(y[i], a1 + (i * 16 * kP + d * 16) * sizeof(T));
    }
    const auto multiply = d == 0 ? mma_first<T> : mma<T>;
#pragma unroll
    for (int j = 0; j < N2 / 2; ++j) {
      unsigned b[4];
      load_matrices(b, b0 + (j * 16 * kP + d * 16) * sizeof(T));
#pragma unroll
      for (int i = 0; i < M; ++i) {
        multiply(c0[i][2 * j], x[i], b[0], b[1]);
        multiply(c0[i][2 * j + 1], x[i], b[2], b[3]);
      }
      if constexpr (TWICE) {
        load_matrices(b, b1 + (j * 16 * kP + d * 16) * sizeof(T));
#pragma unroll
        for (int i = 0; i < M; ++i) {
          multiply(c1[i][2 * j], y[i], b[0], b[1]);
          multiply(c1[i][2 * j + 1], y[i], b[2], b[3]);
        }
      }
    }
  }
}

// Sixteen columns of C, from 16 * d on, += A B: A as fragments, B in shared memory by rows.
template <typename T, int M, int N>
__device__ __forceinline__ void multiply_columns(float (&c)[M][N][4], int d, const unsigned (&a)[M][4],
                                                 unsigned b_at) {
  unsigned b[4];
  load_matrices_transposed(b, b_at);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    mma<T>(c[i][2 * d], a[i], b[0], b[1]);
    mma<T>(c[i][2 * d + 1], a[i], b[2], b[3]);
  }
}

// C += A B: A another product's result, rounded here, and B in shared memory by rows of D.
template <int D, typename T, int M, int N, int N2>
__device__ __forceinline__ void multiply_scores(float (&c)[M][N2][4], const float (&a)[M][N][4],
                                                unsigned b_at) {
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    unsigned x[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int h = 0; h < 4; ++h)
        x[i][h] = pack_pair<T>(a[i][2 * j + h / 2][h % 2 * 2], a[i][2 * j + h / 2][h % 2 * 2 + 1]);
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
      multiply_columns<T>(c, d, x, b_at + (j * 16 * kPitch<D> + d * 16) * sizeof(T));
  }
}

// Two of them, of which either may be left out, with A as words that are needed elsewhere too.
template <bool FIRST, bool SECOND, int D, typename T, int M, int N, int D0, int D1>
__device__ __forceinline__ void multiply_words(float (&c0)[M][D0][4], const unsigned (&a0)[M][N][2],
                                               unsigned b0, float (&c1)[M][D1][4],
                                               const unsigned (&a1)[M][N][2], unsigned b1) {
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    unsigned x[M][4], y[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        x[i][h] = a0[i][2 * j + h / 2][h % 2];
        y[i][h] = a1[i][2 * j + h / 2][h % 2];
      }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      const unsigned at = (j * 16 * kPitch<D> + d * 16) * sizeof(T);
      if constexpr (FIRST) multiply_columns<T>(c0, d, x, b0 + at);
      if constexpr (SECOND) multiply_columns<T>(c1, d, y, b1 + at);
    }
  }
}

// Step j of C += A B, sixteen of A's columns, with A in shared memory by rows PITCH apart.
template <int D, int PITCH, typename T, int M, int N>
__device__ __forceinline__ void multiply_tile(int j, float (&c)[M][N][4], unsigned a_at, unsigned b_at) {
  unsigned a[M][4];
#pragma unroll
  for (int i = 0; i < M; ++i) load_matrices(a[i], a_at + (i * 16 * PITCH + j * 16) * sizeof(T));
#pragma unroll
  for (int d = 0; d < N / 2; ++d)
    multiply_columns<T>(c, d, a, b_at + (j * 16 * kPitch<D> + d * 16) * sizeof(T));
}

// Two of them at once.
template <int D, int PITCH, typename T, int M, int N>
__device__ __forceinline__ void multiply_tiles(int j, float (&c0)[M][N][4], unsigned a0, unsigned b0,
                                               float (&c1)[M][N][4], unsigned a1, unsigned b1) {
  unsigned x[M][4], y[M][4];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    load_matrices(x[i], a0 + (i * 16 * PITCH + j * 16) * sizeof(T));
    load_matrices(y[i], a1 + (i * 16 * PITCH + j * 16) * sizeof(T));
  }
#pragma unroll
  for (int d = 0; d < N / 2; ++d) {
    const unsigned at = (j * 16 * kPitch<D> + d * 16) * sizeof(T);
    multiply_columns<T>(c0, d, x, b0 + at);
    multiply_columns<T>(c1, d, y, b1 + at);
  }
}

// RoPE's angles of one document's rows. The first `rotary` columns turn, a multiple of 16, or none.
struct Angles {
  const void *cos, *sin;  // [rows, rotary], in fp32 or T
  int rotary, interleaved, fp32;

  // Where the angles of a document begin; `per_row` is 0 if all rows of the batch share them.
  __device__ __forceinline__ Angles of(const Tile& tile, int row_length, long long per_row) const {
    const long long row = tile.document * per_row + tile.start - static_cast<long long>(tile.document) * row_length;
    const long long bytes = row * rotary * (fp32 ? 4 : 2);
    return {static_cast<const char*>(cos) + bytes, static_cast<const char*>(sin) + bytes, rotary, interleaved, fp32};
  }
};

template <typename T>
__device__ __forceinline__ void load_angles(float (&to)[8], const void* from, int index, bool fp32) {
  if (fp32)
    Held<float, 8>(static_cast<const float*>(from) + index, 0).unpack(to);
  else
    Held<T, 8>(static_cast<const T*>(from) + index, 0).unpack(to);
}

// Sixteen columns of a tile's row that turn together, or are left as they are, in two vectors.
template <typename T>
struct Sixteen {
  int column[2];
  Held<T, 8> at[2];
  __device__ __forceinline__ Sixteen(const T* row, int unit, const Angles& angles) {
    const bool halves = unit * 16 < angles.rotary && !angles.interleaved;
    column[0] = halves ? unit * 8 : unit * 16;
    column[1] = column[0] + (halves ? angles.rotary / 2 : 8);
    at[0].load(row + column[0], 0);
    at[1].load(row + column[1], 0);
  }
  __device__ __forceinline__ void turn_back(int row, const Angles& angles) {
    float x[2][8], c[2][8], s[2][8];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      at[v].unpack(x[v]);
      load_angles<T>(c[v], angles.cos, row * angles.rotary + column[v], angles.fp32);
      load_angles<T>(s[v], angles.sin, row * angles.rotary + column[v], angles.fp32);
    }
    if (angles.interleaved) {
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int e = 0; e < 8; e += 2)
          turn_pair_back(x[v][e], x[v][e + 1], c[v][e], c[v][e + 1], s[v][e], s[v][e + 1]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) turn_pair_back(x[0][e], x[1][e], c[0][e], c[1][e], s[0][e], s[1][e]);
    }
    at[0].pack(x[0]);
    at[1].pack(x[1]);
  }
  // The transpose of the turn. It is not assumed that the angles of a pair are alike.
  static __device__ __forceinline__ void turn_pair_back(float& a, float& b, float cos_a, float cos_b,
                                                        float sin_a, float sin_b) {
    const float before = a;
    a = a * cos_a + b * sin_b;
    b = b * cos_b - before * sin_a;
  }
};

// Stores a tile of gradients of turned rows, turned back. AHEAD pieces' loads are in flight at once.
template <int ROWS, int D, int THREADS, int AHEAD = 1, typename T>
__device__ __forceinline__ void store_turned_back(T* rows, int stride, int first, int length, int dim,
                                                  const T* tile, const Angles& angles) {
#pragma unroll AHEAD
  for (int i = threadIdx.x; i < ROWS * (D / 16); i += THREADS) {
    const int row = i / (D / 16), unit = i % (D / 16);
    if (first + row >= length) continue;
    Sixteen<T> columns(tile + row * kPitch<D>, unit, angles);
    if (unit * 16 < angles.rotary) columns.turn_back(first + row, angles);
    T* const to = rows + static_cast<long long>(first + row) * stride;
#pragma unroll
    for (int v = 0; v < 2; ++v)
      if (columns.column[v] < dim) columns.at[v].store(to + columns.column[v], 0);
  }
}

// tanh by exp2: its absolute error of some 1e-7 is what counts for a score. The fast instruction has 5e-4.
__device__ __forceinline__ float tanh_exact(float x) {
  return 1.f - __fdividef(2.f, 1.f + exp2_fast(2.f * kLog2e * x));
}
