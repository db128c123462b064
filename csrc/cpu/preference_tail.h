// From token log-probabilities to losses, slopes and per-group sums.
//
//   logp_i  = sum of the sequence's token logps        (both in float64)
//   margin  = ratio_w - ratio_l,  ratio = (logp - ref) [/ max(length, 1)]
//   reward  = beta * ratio
//   loss, slope = pair weight * margin_loss(margin)
//   group_sums[g] = sum of losses over the pairs of g, in the order of pairs;  group_losses[g] = their mean
//
// B pairs are 2B sequences, the B chosen first.  See backends/__init__.py for each argument.
#pragma once

#include <stdint.h>

namespace grpo_kernels {

struct TailArgs {
  bool float64;  // of token_logps and of whatever is void* below; float32 otherwise
  int64_t rows, pairs, groups;
  const void* token_logps;
  const int64_t* targets;      // null: lengths is read, where length_normalize asks for it
  const int32_t* cu_seqlens;   // null: rows / (2 * pairs) rows each
  const double* ref_logps;     // null: zeros
  const int64_t* group_ids;
  const double* pair_weights;  // null: ones
  void* policy_logps;
  double* lengths;             // null: neither asked for nor given
  void* margins;
  void* rewards;
  void* losses;
  void* slopes;
  double* group_sums;
  int64_t* group_counts;
  void* group_losses;
  int loss_type;
  double beta, label_smoothing;
  bool length_normalize;
  int64_t ignore_index;
  int threads;
};

// weights[i] = group_weights[group_ids[i]],  loss = (1/B) sum_i weights[i] losses[i]: summed in float64, in a fixed order.
// An id that is no group's has a loss of NaN already, and takes any weight.
struct RobustLossArgs {
  bool float64;  // of whatever is void*; float32 otherwise
  int64_t pairs, groups;
  const void* losses;
  const int64_t* group_ids;
  const void* group_weights;
  void* weights;
  void* loss;
};

void preference_tail(const TailArgs& args);
void robust_loss(const RobustLossArgs& args);

}  // namespace grpo_kernels
