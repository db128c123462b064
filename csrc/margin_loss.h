// The loss of one pair as a function of its margin, and the derivative: once, for host and device.
//
//   x = beta * m                      the scaled margin
//   sigmoid   -(1-e) log s(x) - e log s(-x)               label smoothing e (cDPO)
//   robust    the same, divided by 1 - 2e, with -e: unbiased where labels were flipped with probability e
//   hinge     max(0, 1 - x)
//   ipo       (m - 1/(2 beta))^2
//
// Float64 throughout: a margin is a difference of sums in the hundreds.  Both members must stay in step with
// `_value_and_slope` in backends/torch_ops.py; the parity tests hold them together.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define GRPO_HOST_DEVICE __host__ __device__
#else
#define GRPO_HOST_DEVICE
#endif

namespace grpo_kernels {

// The order of types.LOSS_TYPES, which is part of the boundary.
enum class LossType : int { kSigmoid = 0, kRobust = 1, kHinge = 2, kIpo = 3 };
constexpr int kLossTypes = 4;

struct ValueAndSlope {
  double value;
  double slope;  // d value / d margin
};

GRPO_HOST_DEVICE inline ValueAndSlope margin_loss(double margin, LossType type, double beta, double smoothing) {
  const double x = beta * margin;
  if (type == LossType::kIpo) {
    const double gap = margin - 1 / (2 * beta);
    return {gap * gap, 2 * gap};
  }
  if (type == LossType::kHinge) {
    // A NaN margin fails both comparisons and has to come out as NaN, not as a loss of zero.
    if (x < 1) return {1 - x, -beta};
    if (x >= 1) return {0.0, 0.0};
    return {x, x};
  }
  // exp of a negative number only, so that nothing overflows at either end.
  const double e = exp(-fabs(x));
  const double soft = log1p(e);
  const double win = (x < 0 ? -x : 0.0) + soft;    // -log s(x)
  const double lose = (x > 0 ? x : 0.0) + soft;    // -log s(-x)
  const double small = e / (1 + e), large = 1 / (1 + e);
  const double s_pos = x < 0 ? small : large;      // s(x)
  const double s_neg = x < 0 ? large : small;      // s(-x)
  const double scale = type == LossType::kRobust ? 1 / (1 - 2 * smoothing) : 1.0;
  const double a = (1 - smoothing) * scale;
  const double b = (type == LossType::kRobust ? -smoothing : smoothing) * scale;
  if (b == 0) return {win, -beta * s_neg};  // not 0 * lose: a rejected reply that is impossible has lose = inf
  return {a * win + b * lose, beta * (b * s_pos - a * s_neg)};
}

}  // namespace grpo_kernels
