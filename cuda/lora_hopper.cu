// SPDX-License-Identifier: MIT
// Products with frozen weights and with their adapters in one sum, on Hopper:
//
//     out = left0 right0 + left1 right1 + ... (+ bias)
//
// left0 has as many columns as an adapter has ranks. Forward y = t (s B)^T + x W^T, backward dx = u A + dy W, with
// one more product for every further layer of one input. cuBLAS would have to write the first of them to memory.
//
// A cluster is two blocks, one above the other in `out`, that share what they read of the right-hand matrices: each
// loads half of it for both. A block has 128 x 256 of `out` at a time, in the registers of two warpgroups; a third
// warpgroup only loads, up to four steps of 64 ahead, into the next tile too. The blocks stay for all of the work,
// so that one warpgroup's output leaves while the other still multiplies.
#include "tma.cuh"

constexpr int kRows = 128, kColumns = 256, kDepth = 64;  // of a block's tile; of a step of the sum
constexpr int kStages = 4;
constexpr int kGroup = 128, kThreads = 3 * kGroup;
constexpr int kLeft = kRows * kDepth * 2, kRight = kColumns * kDepth * 2, kStage = kLeft + kRight;  // in bytes
constexpr int kPanel = 64 * 64 * 2;  // of output on its way to memory, two for a warpgroup
constexpr int kOut = kStages * kStage, kBarriers = kOut + 4 * kPanel;
constexpr int kProducts = 4;
constexpr int kBand = 8;  // tiles side by side that are worked on together, so that what they read stays in L2

struct Matrices {
  TensorMap left[kProducts], right[kProducts], out;
};

// The two tiles, one above the other, of a piece of work: down the rows of bands of columns.
__device__ __forceinline__ void locate(int work, int tile_rows, int tile_columns, int& row, int& column) {
  const int band = work / (tile_rows * kBand), first = band * kBand, width = min(kBand, tile_columns - first);
  const int within = work - band * tile_rows * kBand;
  row = within / width * 2 * kRows;
  column = (first + within % width) * kColumns;
}

// TRANSPOSED: the right-hand matrices are [columns, terms], else [terms, columns]. FIRST: how many times 16 terms a
// step of the first product has at most; one of 4 may have any number of steps, others have one.
template <typename T, bool TRANSPOSED, int FIRST>
__global__ void BARQ_CLUSTER_OF_TWO __launch_bounds__(kThreads, 1)
    lora_hopper(const __grid_constant__ Matrices of,
                const T* __restrict__ bias,  // [columns] or null
                int rows, int columns,       // of `out`
                int products, int steps0, int steps1, int steps2, int steps3) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const unsigned base = shared_address(shared), full = base + kBarriers, empty = full + 8 * kStages;
  const int rank = cluster_rank(), warp = warp_index(), lane = threadIdx.x % 32;
  const int tile_rows = (rows + 2 * kRows - 1) / (2 * kRows), tile_columns = (columns + kColumns - 1) / kColumns;
  const int works = tile_rows * tile_columns, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      make_barrier(full + 8 * stage, 1);
      make_barrier(empty + 8 * stage, 2 * 8);  // the warps that multiply, of both blocks
    }
    publish_barriers();
  }
  wait_for_cluster();

  int stage = 0, parity = 0;
  const auto next = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };
  if (warp >= 8) {
    leave_registers<40>();
    if (warp == 8 && lane == 0) {
      for (int work = blockIdx.x / 2; work < works; work += clusters) {
        int row, column;
        locate(work, tile_rows, tile_columns, row, column);
        row += rank * kRows, column += rank * (kColumns / 2);
        for (int product = 0; product < products; ++product) {
          const int steps = product == 0 ? steps0 : product == 1 ? steps1 : product == 2 ? steps2 : steps3;
          const TensorMap &left = of.left[product], &right = of.right[product];
          for (int step = 0; step < steps; ++step, next()) {
            const unsigned at = base + stage * kStage, half = at + kLeft + rank * (kRight / 2);
            const unsigned barrier = full + 8 * stage;
            wait_for(empty + 8 * stage, parity ^ 1);
            expect(barrier, kStage);
            load_tile(left, at, step * kDepth, row, barrier);
            if constexpr (TRANSPOSED) {
              load_tile_for_both(right, half, step * kDepth, column, barrier);
            } else {
              load_tile_for_both(right, half, column, step * kDepth, barrier);
              load_tile_for_both(right, half + kRight / 4, column + 64, step * kDepth, barrier);
            }
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int group = warp / 4, steps = steps0 + steps1 + steps2 + steps3;
    const bool leads = threadIdx.x % kGroup == 0;
    float d[kColumns / 8][4];
    const auto multiply = [&](int k, bool add) {
      const unsigned at = base + stage * kStage, left = by_rows(at + group * 64 * 128) + row_step<kRows>(k);
      if constexpr (TRANSPOSED)
        multiply_shared<T, false, false>(d, left, by_rows(at + kLeft) + row_step<kColumns>(k), add);
      else
        multiply_shared<T, false, true>(d, left, by_columns<kDepth>(at + kLeft) + column_step(k), add);
    };
    const auto release = [&](int stage) {
      if (lane < 2) arrive_at(empty + 8 * stage, lane);
    };
    for (int work = blockIdx.x / 2; work < works; work += clusters) {
      int row, column;
      locate(work, tile_rows, tile_columns, row, column);
      row += rank * kRows + group * 64;
      wait_for(full + 8 * stage, parity);
      begin_products();
#pragma unroll
      for (int k = 0; k < FIRST; ++k) multiply(k, k > 0);
      end_products();
      int before = stage;
      next();
      for (int step = 1; step < steps; ++step) {
        wait_for(full + 8 * stage, parity);
        begin_products();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) multiply(k, true);
        end_products();
        wait_for_products<1>();
        release(before);
        before = stage;
        next();
      }
      wait_for_products<0>();
      pin(d);
      release(before);

#pragma unroll
      for (int panel = 0; panel < kColumns / 64; ++panel) {
        const unsigned to = base + kOut + (2 * group + panel % 2) * kPanel;
        if (leads) wait_for_stores_but<1>();
        wait_for_group<kGroup>(1 + group);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          unsigned words[4];
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            const float(&four)[4] = d[panel * 8 + j + h / 2];
            float pair[2] = {four[h % 2 * 2], four[h % 2 * 2 + 1]};
            const int at = column + panel * 64 + (j + h / 2) * 8 + lane % 4 * 2;
            if (bias != nullptr && at < columns) pair[0] += to_float(bias[at]), pair[1] += to_float(bias[at + 1]);
            words[h] = pack_pair<T>(pair[0], pair[1]);
          }
          store_matrices(to + piece_at<64>(warp % 4 * 16 + lane % 16, j * 8 + lane / 16 * 8), words);
        }
        publish_shared();
        wait_for_group<kGroup>(1 + group);
        if (leads) store_tile(of.out, to, column + panel * 64, row);
      }
    }
    if (leads) wait_for_stores_but<0>();
  }
  __syncwarp();
  wait_for_cluster();  // until then the other block arrives and copies here
}
// instantiate sm_90a: lora_hopper<{__nv_bfloat16,__half},{true,false},{1,2,4}>
