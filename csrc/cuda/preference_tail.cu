// Token log-probabilities to losses, slopes and group sums, in one launch.
//
// Every block owns a range of groups and looks for their pairs among all group ids, kThreads at a time.  A warp sums
// the two sequences of a pair and takes the loss; then a thread per group adds up the losses of its pairs in their
// order.  No block needs another's results, so there is neither a second launch nor a counter to reset, and no
// floating-point atomic: two runs give the same bits.  Accumulation in float64.
// Memory: rows * (4 + 8) bytes, and the group ids once per block.

#include "preference_tail.h"

#include "../margin_loss.h"
#include "common.h"

namespace grpo_kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 256;

// The groups [begin, end) of a block; block 0 also takes the pairs that are in no group.
struct GroupRange {
  int64_t begin, end;
};

inline __device__ bool in_some_group(const TailArgs& args, int64_t id) { return id >= 0 && id < args.groups; }

inline __device__ bool owns(const TailArgs& args, GroupRange range, int64_t id) {
  if (!in_some_group(args, id)) return blockIdx.x == 0;
  return id >= range.begin && id < range.end;
}

// The log-ratio of a sequence, in every lane of the warp; writes policy_logps, rewards and, where asked, lengths.
template <class T>
inline __device__ double log_ratio(const TailArgs& args, int64_t sequence) {
  const int lane = threadIdx.x % kWarp;
  int64_t begin, end;
  if (args.cu_seqlens == nullptr) {
    const int64_t length = args.rows / (2 * args.pairs);
    begin = sequence * length;
    end = begin + length;
  } else {
    // Held inside the rows: a wrong boundary may give a wrong sum, never a stray read.
    begin = max(args.cu_seqlens[sequence], 0);
    end = min(static_cast<int64_t>(args.cu_seqlens[sequence + 1]), args.rows);
  }
  const T* token_logps = static_cast<const T*>(args.token_logps);
  double logp = 0;
#pragma unroll 4
  for (int64_t i = begin + lane; i < end; i += kWarp) logp += token_logps[i];
  logp = static_cast<T>(warp_sum(logp));  // rounded first, as the reference was: see cpu/preference_tail.cpp
  double length = 0;
  if (args.targets != nullptr) {
#pragma unroll 4
    for (int64_t i = begin + lane; i < end; i += kWarp) length += args.targets[i] != args.ignore_index;
    length = warp_sum(length);
    if (lane == 0) args.lengths[sequence] = length;
  } else if (args.length_normalize) {
    length = args.lengths[sequence];
  }
  double ratio = args.ref_logps == nullptr ? logp : logp - args.ref_logps[sequence];
  if (args.length_normalize) ratio /= length < 1 ? 1.0 : length;
  if (lane == 0) {
    static_cast<T*>(args.policy_logps)[sequence] = static_cast<T>(logp);
    static_cast<T*>(args.rewards)[sequence] = static_cast<T>(args.beta * ratio);
  }
  return ratio;
}

// The loss of a pair, unrounded, for the group sums; writes what belongs to the pair.
template <class T>
inline __device__ double finish_pair(const TailArgs& args, int64_t pair, double margin, bool valid) {
  ValueAndSlope loss = margin_loss(margin, static_cast<LossType>(args.loss_type), args.beta, args.label_smoothing);
  const double weight = args.pair_weights == nullptr ? 1.0 : args.pair_weights[pair];
  loss.value *= weight;
  loss.slope *= weight;
  static_cast<T*>(args.margins)[pair] = static_cast<T>(margin);
  static_cast<T*>(args.losses)[pair] = static_cast<T>(valid ? loss.value : NAN);
  static_cast<T*>(args.slopes)[pair] = static_cast<T>(valid ? loss.slope : NAN);
  return loss.value;
}

template <class T>
__global__ void __launch_bounds__(kThreads) preference_tail_kernel(TailArgs args) {
  __shared__ int64_t ids[kThreads];
  __shared__ double values[kThreads];
  const int64_t span = (args.groups + gridDim.x - 1) / gridDim.x;
  const GroupRange range{blockIdx.x * span, min((blockIdx.x + 1) * span, args.groups)};
  for (int64_t g = range.begin + threadIdx.x; g < range.end; g += kThreads) {
    args.group_sums[g] = 0;
    args.group_counts[g] = 0;
  }
  for (int64_t first = 0; first < args.pairs; first += kThreads) {
    const int here = static_cast<int>(min(static_cast<int64_t>(kThreads), args.pairs - first));
    const int64_t id = threadIdx.x < here ? args.group_ids[first + threadIdx.x] : 0;
    ids[threadIdx.x] = id;
    // Most blocks own none of these pairs when there are many groups.  Also the barrier before ids is read.
    if (!__syncthreads_or(threadIdx.x < here && owns(args, range, id))) continue;
    for (int slot = threadIdx.x / kWarp; slot < here; slot += kWarps) {
      if (!owns(args, range, ids[slot])) continue;
      const int64_t pair = first + slot;
      const double margin = log_ratio<T>(args, pair) - log_ratio<T>(args, pair + args.pairs);
      if (threadIdx.x % kWarp == 0) values[slot] = finish_pair<T>(args, pair, margin, in_some_group(args, ids[slot]));
    }
    __syncthreads();
    for (int64_t g = range.begin + threadIdx.x; g < range.end; g += kThreads) {
      double sum = args.group_sums[g];
      int64_t count = args.group_counts[g];
      for (int slot = 0; slot < here; ++slot) {
        if (ids[slot] != g) continue;
        sum += values[slot];
        ++count;
      }
      args.group_sums[g] = sum;
      args.group_counts[g] = count;
    }
    __syncthreads();  // ids and values are about to be overwritten
  }
  for (int64_t g = range.begin + threadIdx.x; g < range.end; g += kThreads) {  // the thread that summed them
    const int64_t count = args.group_counts[g];
    static_cast<T*>(args.group_losses)[g] = static_cast<T>(args.group_sums[g] / static_cast<double>(max(count, int64_t{1})));
  }
}

// One block: each thread adds up every kThreads-th pair, then warps and the block, in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads) robust_loss_kernel(RobustLossArgs args) {
  __shared__ double of_warp[kWarps];
  const T* losses = static_cast<const T*>(args.losses);
  const T* group_weights = static_cast<const T*>(args.group_weights);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < args.pairs; i += kThreads) {
    const int64_t id = args.group_ids[i];
    const T weight = group_weights[id < 0 || id >= args.groups ? 0 : id];
    static_cast<T*>(args.weights)[i] = weight;
    sum += static_cast<double>(weight) * losses[i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += of_warp[i];
  *static_cast<T*>(args.loss) = static_cast<T>(total / static_cast<double>(max(args.pairs, int64_t{1})));
}

}  // namespace

void robust_loss(const RobustLossArgs& args, cudaStream_t stream) {
  if (args.float64)
    robust_loss_kernel<double><<<1, kThreads, 0, stream>>>(args);
  else
    robust_loss_kernel<float><<<1, kThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "robust_loss");
}

void preference_tail(const TailArgs& args, cudaStream_t stream) {
  // A block for every group up to a full GPU; one even without groups, for the pairs that are in none.
  const int64_t blocks = args.groups < 1 ? 1 : args.groups < kMaxBlocks ? args.groups : kMaxBlocks;
  if (args.groups == 0 && args.pairs == 0) return;
  if (args.float64)
    preference_tail_kernel<double><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
  else
    preference_tail_kernel<float><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
  check(cudaGetLastError(), "preference_tail");
}

}  // namespace grpo_kernels
