// See preference_tail.h.  A sequence is one thread's and its sum has a fixed order, and group sums are added pair by
// pair on one thread, after the others have done their part, so any number of threads gives the same bits.

#include "preference_tail.h"

#include <math.h>

#include <vector>

#include "../margin_loss.h"

namespace grpo_kernels {
namespace {

constexpr int kPartials = 8;                // independent chains, so that additions do not wait for one another
constexpr int64_t kSerialElements = 16384;  // below this many tokens, starting threads costs more than it saves

struct Segment {
  int64_t begin, end;
};

// Held inside the rows whatever cu_seqlens says: a wrong boundary may give a wrong sum, never a stray read.
inline Segment segment_of(const TailArgs& args, int64_t sequence) {
  if (args.cu_seqlens == nullptr) {
    const int64_t length = args.rows / (2 * args.pairs);
    return {sequence * length, (sequence + 1) * length};
  }
  const int64_t begin = args.cu_seqlens[sequence], end = args.cu_seqlens[sequence + 1];
  return {begin < 0 ? 0 : begin, end > args.rows ? args.rows : end};
}

template <class T>
double sum_of(const T* x, Segment segment) {
  double partial[kPartials] = {};
  int64_t i = segment.begin;
  for (; i + kPartials <= segment.end; i += kPartials)
    for (int k = 0; k < kPartials; ++k) partial[k] += x[i + k];
  for (; i < segment.end; ++i) partial[0] += x[i];
  double sum = 0;
  for (double p : partial) sum += p;
  return sum;
}

int64_t labelled_in(const int64_t* targets, Segment segment, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t i = segment.begin; i < segment.end; ++i) count += targets[i] != ignore_index;
  return count;
}

// The log-ratio of a sequence; writes policy_logps, rewards and, where asked, lengths.  The sum is rounded to T first: whoever
// made the reference in float32 rounded it so, and a policy that equals its reference has margin 0 to the bit.
template <class T>
double log_ratio(const TailArgs& args, int64_t sequence) {
  const Segment segment = segment_of(args, sequence);
  const T logp = static_cast<T>(sum_of(static_cast<const T*>(args.token_logps), segment));
  static_cast<T*>(args.policy_logps)[sequence] = logp;
  if (args.targets != nullptr)
    args.lengths[sequence] = static_cast<double>(labelled_in(args.targets, segment, args.ignore_index));
  double ratio = args.ref_logps == nullptr ? logp : logp - args.ref_logps[sequence];
  if (args.length_normalize) {
    const double length = args.lengths[sequence];
    ratio /= length < 1 ? 1.0 : length;
  }
  static_cast<T*>(args.rewards)[sequence] = static_cast<T>(args.beta * ratio);
  return ratio;
}

inline bool in_range(const TailArgs& args, int64_t group) { return group >= 0 && group < args.groups; }

inline ValueAndSlope weighted_loss(const TailArgs& args, int64_t pair, double margin) {
  ValueAndSlope loss =
      margin_loss(margin, static_cast<LossType>(args.loss_type), args.beta, args.label_smoothing);
  if (args.pair_weights != nullptr) {
    loss.value *= args.pair_weights[pair];
    loss.slope *= args.pair_weights[pair];
  }
  return loss;
}

template <class T>
void tail(const TailArgs& args) {
  T* margins = static_cast<T*>(args.margins);
  T* losses = static_cast<T*>(args.losses);
  T* slopes = static_cast<T*>(args.slopes);
  std::vector<double> unrounded(args.pairs);  // what group sums take
  const int threads = args.rows <= kSerialElements ? 1 : args.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < args.pairs; ++i) {
    const double margin = log_ratio<T>(args, i) - log_ratio<T>(args, i + args.pairs);
    const ValueAndSlope loss = weighted_loss(args, i, margin);
    const bool valid = in_range(args, args.group_ids[i]);
    unrounded[i] = loss.value;
    margins[i] = static_cast<T>(margin);
    losses[i] = static_cast<T>(valid ? loss.value : NAN);
    slopes[i] = static_cast<T>(valid ? loss.slope : NAN);
  }
  for (int64_t g = 0; g < args.groups; ++g) {
    args.group_sums[g] = 0;
    args.group_counts[g] = 0;
  }
  for (int64_t i = 0; i < args.pairs; ++i) {
    const int64_t group = args.group_ids[i];
    if (in_range(args, group)) {
      args.group_sums[group] += unrounded[i];
      args.group_counts[group] += 1;
    }
  }
  T* group_losses = static_cast<T*>(args.group_losses);
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t count = args.group_counts[g];
    group_losses[g] = static_cast<T>(args.group_sums[g] / static_cast<double>(count < 1 ? 1 : count));
  }
}

template <class T>
void robust(const RobustLossArgs& args) {
  const T* losses = static_cast<const T*>(args.losses);
  const T* group_weights = static_cast<const T*>(args.group_weights);
  T* weights = static_cast<T*>(args.weights);
  double sum = 0;
  for (int64_t i = 0; i < args.pairs; ++i) {
    const int64_t id = args.group_ids[i];
    weights[i] = group_weights[id < 0 || id >= args.groups ? 0 : id];
    sum += static_cast<double>(weights[i]) * losses[i];
  }
  *static_cast<T*>(args.loss) = static_cast<T>(sum / static_cast<double>(args.pairs < 1 ? 1 : args.pairs));
}

}  // namespace

void robust_loss(const RobustLossArgs& args) { args.float64 ? robust<double>(args) : robust<float>(args); }

void preference_tail(const TailArgs& args) { args.float64 ? tail<double>(args) : tail<float>(args); }

}  // namespace grpo_kernels
