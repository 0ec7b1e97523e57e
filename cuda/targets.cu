// SPDX-License-Identifier: MIT
// How many targets count, and the smallest and largest of them: what the host must know before it can drop
// rows without a target. One launch in place of seven, since the host waits for it.
//
// instantiate: count_targets<0>
#include "reduce.cuh"

constexpr int kThreads = 1024;

// numbers: [3]: count, smallest, largest; the latter two at least cover 0.
template <int>
__global__ void __launch_bounds__(kThreads, 1)
    count_targets(const long long* __restrict__ targets, long long* __restrict__ numbers, long long rows,
                  long long ignore_index) {
  __shared__ long long found[3][kMaxWarps];
  long long count = 0, low = 0, high = 0;
  for (long long i = threadIdx.x; i < rows; i += kThreads) {
    const long long target = targets[i];
    if (target == ignore_index) continue;
    ++count;
    low = min(low, target);
    high = max(high, target);
  }
  const auto reduce = [&] {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      count += __shfl_xor_sync(kAllLanes, count, offset);
      low = min(low, __shfl_xor_sync(kAllLanes, low, offset));
      high = max(high, __shfl_xor_sync(kAllLanes, high, offset));
    }
  };
  reduce();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) {
    found[0][warp] = count;
    found[1][warp] = low;
    found[2][warp] = high;
  }
  __syncthreads();
  if (warp != 0) return;
  count = found[0][lane];
  low = found[1][lane];
  high = found[2][lane];
  reduce();
  if (lane == 0) {
    numbers[0] = count;
    numbers[1] = low;
    numbers[2] = high;
  }
}
