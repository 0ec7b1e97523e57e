// SPDX-License-Identifier: MIT
// Cross-entropy over rows of logits, and its gradient in place of them.
//
//   z = cap * tanh(scale * x / cap)   or   scale * x         x: the product hidden @ weight.T (+ bias)
//   P = max_v z_v,  S = sum_v exp(z_v - P),  lse = P + log S            t: the row's target
//   loss = log S - (1 - s) * (z_t - P) - s * (mean_v(z) - P) + z_loss * lse^2     s: label smoothing
//   dx_v = [exp(z_v - P) / S * (1 + 2 * z_loss * lse) - s / V - (1 - s) * (v == t)]
//          * (1 - (z_v / cap)^2) * scale * row_scale
//
// Everything between load and store is fp32, the true-class term too: softmax - 1 would cancel in bf16.
//
// Floor in bytes for [N, V] of b-byte logits: one read and one write, 2*N*V*b. To read a row once it must
// stay on the chip, and 128k logits of two bytes are a little more than the shared memory of an SM: what
// fits is kept there, and the rest read again, from the L2. The memory freed by writing one row's gradient
// is filled with the next row at once, so reads and writes overlap. Clusters of blocks (sm_90 on), which
// exchange their sums through distributed shared memory, share rows of still larger vocabularies, and
// spread few rows over the chip.
//
// Rows of logits start at multiples of 16 bytes: `stride` is the vocabulary rounded up, and the columns
// past the last whole vector are taken one by one.
//
// instantiate: cross_entropy_rows<{float,__half,__nv_bfloat16},{1,2,8},{0,1},{0,1}>
// instantiate: cross_entropy_gradient<{float,__half,__nv_bfloat16},{0,1}>
#include "reduce.cuh"
#include "vector.cuh"

constexpr int kThreads = 256;  // of cross_entropy_gradient
constexpr int kGroups = 4;     // in which a row arrives in shared memory
constexpr int kVectors = 4;    // that a thread of cross_entropy_gradient has in flight
constexpr float kLowest = -1e30f;  // below all logits, and finite, so that differences of it are not NaN

// The arrays of `statistics`, [kArrays, rows], that a row kernel writes.
enum { kLoss, kPeak, kTotal, kLogProb, kEntropy, kTop1, kArrays };

// z = outer * u with u = tanh(inner * x) or x. z is in a unit whose exponential is one instruction where its
// error, 2^-22, is far below the logits' own: bits for 16-bit logits, nats for fp32.
template <typename T>
constexpr float kNats = sizeof(T) == 4 ? 1.0f : 0.693147180559945f;  // of one unit

// The parameters of the loss that are the same for all rows.
struct Loss {
  float inner, outer;
  float slope;  // of z by x at 0, in nats
  float smoothing, z_loss;
  int vocabulary;
};

template <typename T, bool SOFTCAP>
__device__ __forceinline__ Loss make_loss(float scale, float cap, float smoothing, float z_loss,
                                          int vocabulary) {
  return {scale / cap, (SOFTCAP ? cap : scale) / kNats<T>, scale, smoothing, z_loss, vocabulary};
}

template <bool SOFTCAP>
__device__ __forceinline__ float bend(float x, const Loss& loss) {
  return SOFTCAP ? tanhf(loss.inner * x) : x;
}

template <typename T>
__device__ __forceinline__ float exponential(float z) {
  if constexpr (sizeof(T) == 4) return expf(z);
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z));
  return power;
}

// What is known of a row's logits: of those a thread has seen, then of a warp, a block, a cluster.
struct Statistics {
  float peak = kLowest;    // max u
  float total = 0.0f;      // sum exp(z - peak)
  float weighted = 0.0f;   // sum exp(z - peak) * (z - peak), for the entropy
  float sum = 0.0f;        // sum u, for label smoothing
  float before = kLowest;  // max u of the columns before the target: a tie goes to the first, as in argmax
};

__device__ __forceinline__ float lanes_max(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Statistics of the union over groups of `width` lanes.
template <typename T>
__device__ __forceinline__ Statistics merge(Statistics s, int width, const Loss& loss) {
  Statistics all;
  all.peak = lanes_max(s.peak, width);
  const float shift = (s.peak - all.peak) * loss.outer, factor = exponential<T>(shift);
  all.total = warp_sum(s.total * factor, width);
  all.weighted = warp_sum((s.weighted + s.total * shift) * factor, width);
  all.sum = warp_sum(s.sum, width);
  all.before = lanes_max(s.before, width);
  return all;
}

// Adds N logits of a row from column N * i on. Kept short: on an H200 at copy speed there are about 20
// instructions an element for this and for the gradient.
template <typename T, bool SOFTCAP, bool TOKENS, int N>
__device__ __forceinline__ void add(Statistics& s, const float (&x)[N], int i, int target,
                                    const Loss& loss) {
  float u[N], highest = kLowest, total = 0.0f, weighted = 0.0f;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    u[e] = bend<SOFTCAP>(x[e], loss);
    highest = fmaxf(highest, u[e]);
  }
  if (loss.smoothing != 0.0f) {
#pragma unroll
    for (int e = 0; e < N; ++e) s.sum += u[e];
  }
  if (TOKENS && i < target / N) s.before = fmaxf(s.before, highest);
  if (TOKENS && i == target / N) {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < target % N) s.before = fmaxf(s.before, u[e]);
  }
  if (highest > s.peak) {
    const float shift = (s.peak - highest) * loss.outer, factor = exponential<T>(shift);
    if (TOKENS) s.weighted = (s.weighted + s.total * shift) * factor;
    s.total *= factor;
    s.peak = highest;
  }
  const float offset = -s.peak * loss.outer;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float shift = fmaf(u[e], loss.outer, offset), power = exponential<T>(shift);
    total += power;
    if (TOKENS) weighted += power * fmaxf(shift, kLowest);  // a logit of -inf adds 0, not NaN
  }
  s.total += total;
  s.weighted += weighted;
}

// Adds the sixteen bytes at vector i of a row.
template <typename T, bool SOFTCAP, bool TOKENS>
__device__ __forceinline__ void add(Statistics& s, const uint4& raw, int i, int target, const Loss& loss) {
  float x[16 / sizeof(T)];
  unpack<T>(raw, x);
  add<T, SOFTCAP, TOKENS>(s, x, i, target, loss);
}

// The gradient of one row: minus its peak in z, and the factors of exp(z - peak), of every column, of the
// target's column.
struct Gradient {
  float offset, power, every, target;
};

template <typename T>
__device__ __forceinline__ Gradient gradient_of(float peak, float total, float row_scale, const Loss& loss) {
  const float slope = loss.slope * row_scale, z = peak * loss.outer, lse = z * kNats<T> + logf(total);
  return {-z, slope * (1.0f + 2.0f * loss.z_loss * lse) / total,
          slope * loss.smoothing / loss.vocabulary, slope * (1.0f - loss.smoothing)};
}

// dx of N logits in place of them; `hit` is the index of the target's, or out of range.
template <typename T, bool SOFTCAP, int N>
__device__ __forceinline__ void differentiate(float (&x)[N], long long hit, const Gradient& g,
                                              const Loss& loss) {
  float slope[N];
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float u = bend<SOFTCAP>(x[e], loss);
    slope[e] = 1.0f - u * u;
    x[e] = exponential<T>(fmaf(u, loss.outer, g.offset)) * g.power - g.every;
  }
  if (hit >= 0 && hit < N) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] -= e == hit ? g.target : 0.0f;
  }
  if constexpr (SOFTCAP) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] *= slope[e];
  }
}

// The same for the sixteen bytes at vector i of a row.
template <typename T, bool SOFTCAP>
__device__ __forceinline__ uint4 differentiate(const uint4& raw, int i, long long target, const Gradient& g,
                                               const Loss& loss) {
  constexpr int VEC = 16 / sizeof(T);
  float x[VEC];
  unpack<T>(raw, x);
  differentiate<T, SOFTCAP>(x, target - (long long)i * VEC, g, loss);
  return pack<T>(x);
}

// And for one element.
template <typename T, bool SOFTCAP>
__device__ __forceinline__ T differentiate(T raw, int column, long long target, const Gradient& g,
                                           const Loss& loss) {
  float x[1] = {to_float(raw)};
  differentiate<T, SOFTCAP>(x, target - column, g, loss);
  return from_float<T>(x[0]);
}

// Sixteen bytes from global to shared memory for the calling thread, asynchronously from sm_80 on.
__device__ __forceinline__ void fetch(uint4* shared, const uint4* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global)
               : "memory");
#else
  *shared = *global;
#endif
}
__device__ __forceinline__ void end_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the last `pending` groups are there.
__device__ __forceinline__ void await_groups(int pending) {
#if __CUDA_ARCH__ >= 800
  if (pending == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (pending == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (pending == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (pending == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF(n) __cluster_dims__(n, 1, 1)
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A float in the shared memory of another block of the cluster.
__device__ __forceinline__ float load_remote(const float* local, int rank) {
  float value;
  asm volatile(
      "{.reg .u32 remote; mapa.shared::cluster.u32 remote, %1, %2; ld.shared::cluster.f32 %0, [remote];}"
      : "=f"(value)
      : "r"((unsigned)__cvta_generic_to_shared(local)), "r"(rank)
      : "memory");
  return value;
}
#else
// Clusters start with sm_90; the launcher asks for one block per row elsewhere.
#define CLUSTER_OF(n)
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ float load_remote(const float* local, int) { return *local; }
#endif

// Statistics of the whole row in every thread; the blocks of a cluster meet here.
template <typename T, int CLUSTER>
__device__ __forceinline__ Statistics merge_row(Statistics s, const Loss& loss) {
  __shared__ Statistics warps[kMaxWarps];
  __shared__ Statistics block, row;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  s = merge<T>(s, kWarp, loss);
  if (lane == 0) warps[warp] = s;
  __syncthreads();
  if (warp == 0) {
    s = merge<T>(lane < blockDim.x / kWarp ? warps[lane] : Statistics(), kWarp, loss);
    if (lane == 0) (CLUSTER > 1 ? block : row) = s;
  }
  if constexpr (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
    if (warp == 0) {
      const int rank = lane % CLUSTER;
      s.peak = load_remote(&block.peak, rank);
      s.total = load_remote(&block.total, rank);
      s.weighted = load_remote(&block.weighted, rank);
      s.sum = load_remote(&block.sum, rank);
      s.before = load_remote(&block.before, rank);
      s = merge<T>(s, CLUSTER, loss);
      if (lane == 0) row = s;
    }
    cluster_arrive();  // the caller waits before it exits: others may still read `block`
  }
  __syncthreads();
  return row;
}

// Loss, statistics (TOKENS: entropy and top-1 too) and (write != 0) the gradient of `rows` rows; a cluster
// takes one after the other.
// Dynamic shared memory: `capacity` vectors of 16 bytes.
template <typename T, int CLUSTER, bool SOFTCAP, bool TOKENS>
__global__ void CLUSTER_OF(CLUSTER) __launch_bounds__(kWarp* kMaxWarps, 1)
    cross_entropy_rows(T* __restrict__ x,                      // [rows, stride]: in, logits; out, dx
                       const long long* __restrict__ targets,  // [all_rows]
                       const float* __restrict__ row_scale,    // [1] or, with scale_stride 1, [all_rows]
                       float* __restrict__ statistics,         // [kArrays, all_rows]
                       long long all_rows, long long first_row, int rows, int scale_stride, int write,
                       long long ignore_index, int vocabulary, int stride, int capacity, float scale,
                       float cap, float smoothing, float z_loss) {
  extern __shared__ uint4 kept[];
  constexpr int VEC = 16 / sizeof(T);
  const Loss loss = make_loss<T, SOFTCAP>(scale, cap, smoothing, z_loss, vocabulary);
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  const int clusters = gridDim.x / CLUSTER, threads = blockDim.x, thread = threadIdx.x;
  const bool writes_row = rank == 0 && thread == 0;
  // This block's share of a row's vectors: `share`, of which the first `keeps` stay in shared memory, from
  // vector `origin` on. The columns past the last whole vector go to the last block.
  const int vectors = vocabulary / VEC, most = (vectors + CLUSTER - 1) / CLUSTER, origin = rank * most;
  const int share = max(min(most, vectors - origin), 0), keeps = min(share, capacity);
  const int single = vectors * VEC + thread;
  const bool has_single = rank == CLUSTER - 1 && single < vocabulary;
  // A thread reads only what it has fetched itself, in kGroups groups, so that the first can be worked on
  // while the others are on their way.
  const int group = ((keeps + threads - 1) / threads + kGroups - 1) / kGroups * threads;

  const auto row_of = [&](int r) {
    return reinterpret_cast<uint4*>(x + (long long)r * stride) + origin;
  };
  const auto fetch_row = [&](int r) {
    const uint4* const vector = row_of(r);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      for (int i = g * group + thread; i < min((g + 1) * group, keeps); i += threads)
        fetch(kept + i, vector + i);
      end_group();
    }
  };
  int r = blockIdx.x / CLUSTER;
  if (r < rows) fetch_row(r);
  for (; r < rows; r += clusters) {
    const long long row = first_row + r, label = targets[row];
    const int next = r + clusters;
    T* const x_row = x + (long long)r * stride;
    uint4* const vector = row_of(r);

    if (label < 0 || label >= vocabulary) {  // the same in all blocks of the cluster
      if (writes_row) {
        for (int k = 0; k < kArrays; ++k) statistics[k * all_rows + row] = 0.0f;
        // Neither a class nor ignored: an error that the host raises when it looks. Until then it shows.
        if (label != ignore_index) statistics[kLoss * all_rows + row] = __int_as_float(0x7fc00000);
      }
      await_groups(0);
      if (next < rows) fetch_row(next);
      if (write) {
        for (int i = thread; i < share; i += threads) vector[i] = uint4{};
        if (has_single) x_row[single] = from_float<T>(0.0f);
      }
      continue;
    }

    const int target = label;
    const float at_target = writes_row ? bend<SOFTCAP>(to_float(x_row[target]), loss) : 0.0f;
    Statistics s;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      await_groups(kGroups - 1 - g);
      for (int i = g * group + thread; i < min((g + 1) * group, keeps); i += threads)
        add<T, SOFTCAP, TOKENS>(s, kept[i], origin + i, target, loss);
    }
    for (int i = keeps + thread; i < share; i += 2 * threads) {
      const bool both = i + threads < share;
      const uint4 first = vector[i], second = both ? vector[i + threads] : uint4{};
      add<T, SOFTCAP, TOKENS>(s, first, origin + i, target, loss);
      if (both) add<T, SOFTCAP, TOKENS>(s, second, origin + i + threads, target, loss);
    }
    if (has_single) {
      const float x_single[1] = {to_float(x_row[single])};
      add<T, SOFTCAP, TOKENS>(s, x_single, single, target, loss);
    }
    s = merge_row<T, CLUSTER>(s, loss);

    if (writes_row) {
      const float nats = kNats<T> * loss.outer;  // of u
      const float log_total = logf(s.total), difference = (at_target - s.peak) * nats;
      const float mean = (s.sum / vocabulary - s.peak) * nats, lse = s.peak * nats + log_total;
      float* const out = statistics + row;
      out[kLoss * all_rows] =
          log_total - ((1.0f - smoothing) * difference + smoothing * mean) + z_loss * lse * lse;
      out[kPeak * all_rows] = s.peak;
      out[kTotal * all_rows] = s.total;
      out[kLogProb * all_rows] = difference - log_total;
      out[kEntropy * all_rows] = log_total - s.weighted / s.total * kNats<T>;
      out[kTop1 * all_rows] = at_target >= s.peak && at_target > s.before;
    }
    if (write) {
      const Gradient d = gradient_of<T>(s.peak, s.total, row_scale[row * scale_stride], loss);
      // First what is freshest in the L2, then what makes room for the next row.
      for (int i = keeps + thread; i < share; i += threads)
        vector[i] = differentiate<T, SOFTCAP>(vector[i], origin + i, target, d, loss);
      if (has_single) x_row[single] = differentiate<T, SOFTCAP>(x_row[single], single, target, d, loss);
      const uint4* const next_vector = row_of(next);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        for (int i = g * group + thread; i < min((g + 1) * group, keeps); i += threads) {
          vector[i] = differentiate<T, SOFTCAP>(kept[i], origin + i, target, d, loss);
          if (next < rows) fetch(kept + i, next_vector + i);
        }
        end_group();
      }
    } else if (next < rows) {
      fetch_row(next);
    }
    if constexpr (CLUSTER > 1) cluster_wait();
  }
}

// The gradient alone, for a strip of columns whose logits were computed again.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_gradient(T* __restrict__ x,                      // [rows, stride]: in, logits; out, dx
                           const long long* __restrict__ targets,  // [all_rows]
                           const float* __restrict__ row_scale,    // [1] or [all_rows]
                           const float* __restrict__ statistics,   // [kArrays, all_rows]
                           long long all_rows, long long first_row, int scale_stride, int columns,
                           int stride, int first_column, int vocabulary, float scale, float cap,
                           float smoothing, float z_loss) {
  constexpr int VEC = 16 / sizeof(T);
  const Loss loss = make_loss<T, SOFTCAP>(scale, cap, smoothing, z_loss, vocabulary);
  constexpr int SPAN = kThreads * kVectors;
  const int vectors = columns / VEC, singles = columns % VEC;
  const int blocks = (vectors + SPAN - 1) / SPAN + (vectors == 0);  // per row
  const int slab_row = blockIdx.x / blocks, part = blockIdx.x % blocks;
  const long long row = first_row + slab_row, target = targets[row], column = target - first_column;
  T* const x_row = x + (long long)slab_row * stride;
  uint4* const vector = reinterpret_cast<uint4*>(x_row);
  const int begin = part * SPAN + threadIdx.x;
  uint4 held[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    if (begin + k * kThreads < vectors) held[k] = vector[begin + k * kThreads];
  const bool counts = target >= 0 && target < vocabulary;
  const Gradient g = gradient_of<T>(statistics[kPeak * all_rows + row], statistics[kTotal * all_rows + row],
                                    row_scale[row * scale_stride], loss);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int i = begin + k * kThreads;
    if (i < vectors) vector[i] = counts ? differentiate<T, SOFTCAP>(held[k], i, column, g, loss) : uint4{};
  }
  if (part == 0 && threadIdx.x < singles) {
    const int single = vectors * VEC + threadIdx.x;
    x_row[single] =
        counts ? differentiate<T, SOFTCAP>(x_row[single], single, column, g, loss) : from_float<T>(0.0f);
  }
}
