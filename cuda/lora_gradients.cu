// SPDX-License-Identifier: MIT
// u = dy B and dB^T = t^T dy in one read of dy, which is nearly all there is to read: two thin products that cuBLAS
// takes two reads for.
//
// A block has a band of rows and a band of columns of dy. It goes down the rows, 256 by 64 at a time, for one chunk
// of 64 columns after another: a chunk's dB is complete for the band of rows when the next begins, and u grows in
// registers over all chunks. What other bands add comes in fp32, from a second kernel, in a fixed order.
#include "mma.cuh"

constexpr int kThreads = 512;
constexpr int kRows = 256, kColumns = 64;  // of a tile
template <int RANK>
constexpr int kTilesOf = 64 / RANK;  // of a band of rows: what u takes of the registers
constexpr int kStages = 3;
constexpr int kTile = kRows * kColumns * 2;  // bytes

// Bytes to the 16-byte piece of a row of N 16-bit elements, in a tile whose pieces are exchanged within 128 bytes so
// that eight rows' pieces of one column lie in different banks.
template <int N>
__device__ __forceinline__ unsigned place(int row, int piece) {
  return row * (N * 2) + (piece ^ row / (64 / N) % (N / 8)) * 16;
}

// Copies COUNT rows of N elements; zeros where there are none.
template <int N, int COUNT, typename T>
__device__ __forceinline__ void copy_rows(unsigned to, const T* from, long long stride, int rows, int columns) {
  constexpr int kPieces = N / 8, kDown = kThreads / kPieces;
  static_assert(kDown % 8 == 0, "pieces are exchanged alike in rows kDown apart");
  const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  const T* at = from + row * stride + piece * 8;
  to += place<N>(row, piece);
#pragma unroll
  for (int i = 0; i < COUNT; i += kDown, at += kDown * stride)
    if (COUNT >= kDown || row < COUNT) {
      const bool exists = row + i < rows && piece * 8 < columns;
      copy_async(to + i * (N * 2), exists ? at : from, exists);
    }
}

template <typename T, int RANK>
__global__ void __launch_bounds__(kThreads, 1)
    lora_gradients(const T* __restrict__ dy,   // [rows, columns]
                   const T* __restrict__ up,   // [columns, width]
                   const T* __restrict__ low,  // [rows, width]
                   float* __restrict__ u,      // [bands of columns, rows, RANK]
                   float* __restrict__ db,     // [bands of rows, columns, RANK]
                   long long dy_stride, long long low_stride, int rows, int columns,
                   int width,    // the rank or more, a multiple of 8
                   int chunks) { // of a band of columns
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kTiles = kTilesOf<RANK>, kBand = kTiles * kRows;
  const unsigned tiles = shared_address(shared), low_at = tiles + kStages * kTile;
  const unsigned up_at = low_at + kBand * RANK * 2, sums_at = up_at + 2 * kColumns * RANK * 2;
  float* sums = reinterpret_cast<float*>(shared + (sums_at - tiles));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * kBand, first_column = blockIdx.y * chunks * kColumns;
  const int left_rows = rows - first_row;
  const int steps = min(chunks, (columns - first_column + kColumns - 1) / kColumns) * kTiles;
  dy += first_row * dy_stride;

  const auto copy = [&](int step) {
    if (step < steps) {
      const int column = first_column + step / kTiles * kColumns, row = step % kTiles * kRows;
      copy_rows<kColumns, kRows>(tiles + step % kStages * kTile, dy + row * dy_stride + column, dy_stride,
                                 left_rows - row, columns - column);
      if (step % kTiles == 0)
        copy_rows<RANK, kColumns>(up_at + step / kTiles % 2 * (kColumns * RANK * 2),
                                  up + static_cast<long long>(column) * width, width, columns - column, width);
    }
    commit_copies();
  };
  copy_rows<RANK, kBand>(low_at, low + first_row * low_stride, low_stride, left_rows, width);
  copy(0);
  copy(1);

  float of_u[kTiles][RANK / 8][4] = {};
  const int group = warp % 8, half = warp / 8;  // for dB: eight columns, and one half of a tile's rows
  for (int chunk = 0; chunk * kTiles < steps; ++chunk) {
    float of_db[RANK / 16][4] = {};
    // More ranks' are read anew for every tile: there are not that many registers.
    unsigned b[kColumns / 16][RANK / 16][4];
    const unsigned b_at = up_at + chunk % 2 * (kColumns * RANK * 2);
    const auto read_b = [&](int k) {
#pragma unroll
      for (int n = 0; n < RANK / 16; ++n)
        load_matrices_transposed(b[k][n], b_at + place<RANK>(k * 16 + lane % 16, n * 2 + lane / 16));
    };
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int step = chunk * kTiles + tile;
      wait_for_copies_but<kStages - 2>();
      __syncthreads();
      copy(step + kStages - 1);
      const unsigned at = tiles + step % kStages * kTile;
      if (RANK == 16 && tile == 0) {
#pragma unroll
        for (int k = 0; k < kColumns / 16; ++k) read_b(k);
      }
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
        unsigned a[4];
        if (RANK > 16) read_b(k);
        load_matrices(a, at + place<kColumns>(warp * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < RANK / 8; ++n) mma<T>(of_u[tile][n], a, b[k][n / 2][n % 2 * 2], b[k][n / 2][n % 2 * 2 + 1]);
      }
#pragma unroll
      for (int k = 0; k < kRows / 2; k += 32) {
        unsigned columns_of_dy[4];
        load_matrices_transposed(columns_of_dy, at + place<kColumns>(half * (kRows / 2) + k + lane, group));
#pragma unroll
        for (int m = 0; m < RANK / 16; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            unsigned a[4];
            const int row = tile * kRows + half * (kRows / 2) + k + h * 16 + lane / 16 * 8 + lane % 8;
            load_matrices_transposed(a, low_at + place<RANK>(row, m * 2 + lane / 8 % 2));
            mma<T>(of_db[m], a, columns_of_dy[2 * h], columns_of_dy[2 * h + 1]);
          }
      }
    }
    // One half of the rows after the other; the next chunk's are written after further barriers.
#pragma unroll
    for (int m = 0; m < RANK / 16; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = m * 16 + lane / 4 + e / 2 * 8, column = group * 8 + lane % 4 * 2 + e % 2;
        if (half == 1) sums[column * RANK + r] = of_db[m][e];
      }
    __syncthreads();
    if (half == 0) {
#pragma unroll
      for (int m = 0; m < RANK / 16; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = m * 16 + lane / 4 + e / 2 * 8, within = group * 8 + lane % 4 * 2 + e % 2;
          const int column = first_column + chunk * kColumns + within;
          if (column < columns)
            db[(static_cast<long long>(blockIdx.x) * columns + column) * RANK + r] =
                of_db[m][e] + sums[within * RANK + r];
        }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int n = 0; n < RANK / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + tile * kRows + warp * 16 + lane / 4 + h * 8;
        if (row < rows)
          *reinterpret_cast<float2*>(u + (static_cast<long long>(blockIdx.y) * rows + row) * RANK + n * 8 +
                                     lane % 4 * 2) = {of_u[tile][n][2 * h], of_u[tile][n][2 * h + 1]};
      }
}

// The sum over bands of four numbers of one row.
__device__ __forceinline__ float4 add_bands(const float* parts, long long at, long long band, int bands) {
  float4 sum = {0.f, 0.f, 0.f, 0.f};
  for (int i = 0; i < bands; ++i) {
    const float4 part = *reinterpret_cast<const float4*>(parts + i * band + at);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  return sum;
}

// A thread has four ranks of a row of u, or, in the blocks after those, of dB, which is scaled.
template <typename T, typename G, int RANK>
__global__ void __launch_bounds__(256)
    lora_gradients_sum(const float* __restrict__ u_parts, const float* __restrict__ db_parts,
                       T* __restrict__ u,    // [rows, width]
                       G* __restrict__ db,   // [columns, rank], contiguous
                       long long u_stride, int rows, int columns, int column_bands, int row_bands, int width, int rank,
                       float scaling) {
  constexpr int kFours = RANK / 4;
  const int blocks = (rows * kFours + 255) / 256, block = blockIdx.x;
  if (block < blocks) {
    const int i = block * 256 + threadIdx.x, row = i / kFours, r = i % kFours * 4;
    if (row >= rows || r >= width) return;
    const float4 sum = add_bands(u_parts, static_cast<long long>(row) * RANK + r, static_cast<long long>(rows) * RANK,
                                 column_bands);
    store<4>(u + row * u_stride + r, 0,
             Vec<T, 4>{from_float<T>(sum.x), from_float<T>(sum.y), from_float<T>(sum.z), from_float<T>(sum.w)});
  } else {
    const int i = (block - blocks) * 256 + threadIdx.x, column = i / kFours, r = i % kFours * 4;
    if (column >= columns) return;
    const float4 sum = add_bands(db_parts, static_cast<long long>(column) * RANK + r,
                                 static_cast<long long>(columns) * RANK, row_bands);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (r + e < rank) db[static_cast<long long>(column) * rank + r + e] = from_float<G>(values[e] * scaling);
  }
}
// Where a block may have so much shared memory:
// instantiate sm_80 sm_90a sm_100: lora_gradients<{__nv_bfloat16,__half},16>
// instantiate sm_90a sm_100: lora_gradients<{__nv_bfloat16,__half},32>
// instantiate sm_80 sm_90a sm_100: lora_gradients_sum<__nv_bfloat16,{__nv_bfloat16,float},16>
// instantiate sm_80 sm_90a sm_100: lora_gradients_sum<__half,{__half,float},16>
// instantiate sm_90a sm_100: lora_gradients_sum<__nv_bfloat16,{__nv_bfloat16,float},32>
// instantiate sm_90a sm_100: lora_gradients_sum<__half,{__half,float},32>
