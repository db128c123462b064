// Token log-probabilities on the CPU; compiled once per instruction set with GRPO_TABLE naming the result.
//
// Shapes as in token_logps.h.  Sums are kept in float32 in 4 vectors of lanes and added up in float64, in an order that
// depends on the instruction set and V alone: a row is one thread's, so any number of threads gives the same bits.
// Memory: forward reads rows * V elements, backward reads and writes as many; nothing is allocated.

#include "token_logps.h"

#include <float.h>

#include "elements.h"

namespace grpo_kernels {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;
constexpr int64_t kBlock = 16 * kStep;          // elements summed up before they join the sum of the row
constexpr int64_t kSerialElements = 16384;      // below this many, starting threads costs more than it saves
constexpr int64_t kStreamedBytes = 16 << 20;    // gradients larger than this would only push others out of the cache
constexpr uintptr_t kStreamAlignment = 64;

inline int64_t offset_of(const Rows& rows, int64_t row) {
  return row / rows.length * rows.stride_sequence + row % rows.length * rows.stride_token;
}

inline int64_t count_of(const Rows& rows) { return rows.sequences * rows.length; }

inline int threads_for(const Rows& rows, int threads) {
  return count_of(rows) * rows.vocabulary <= kSerialElements ? 1 : threads;
}

// Rows that are ignored cost nothing, so threads fetch rows as they go; many at a time where rows are short.
inline int rows_at_a_time(const Rows& rows) {
  const int64_t count = kSerialElements / (rows.vocabulary + 1);
  return count < 1 ? 1 : static_cast<int>(count);
}

// ---- forward

// sum_v exp(z[v] - top), for a top that follows the largest element seen.  In two levels: where one element holds
// nearly all the mass, a long float32 sum beside it would swallow the rest one by one, and 1 - p with it.
struct RunningSum {
  float top = -FLT_MAX;  // finite, so that -inf - top is -inf and not NaN
  Vec block[kUnroll], row[kUnroll];

  RunningSum() {
    for (auto& s : block) s = broadcast(0.0f);
    for (auto& s : row) s = broadcast(0.0f);
  }

  inline void end_block() {
    for (int u = 0; u < kUnroll; ++u) {
      row[u] = row[u] + block[u];
      block[u] = broadcast(0.0f);
    }
  }

  // Rare: on rows in random order some log(V / kStep) times.
  __attribute__((noinline)) void raise_top(Vec candidates) {
    float lanes[kLanes];
    memcpy(lanes, &candidates, sizeof lanes);
    float raised = top;
    for (float x : lanes) raised = x > raised ? x : raised;
    const Vec factor = broadcast(exp(top - raised));
    for (auto& s : block) s = s * factor;
    for (auto& s : row) s = s * factor;
    top = raised;
  }

  inline double total() const {
    double result = 0;
    for (const auto& s : row) {
      float lanes[kLanes];
      memcpy(lanes, &s, sizeof lanes);
      for (float x : lanes) result += x;
    }
    return result;
  }
};

template <class T>
inline RunningSum running_sum(const T* z, int64_t n) {
  RunningSum running;
  Vec top = broadcast(running.top);
  const auto follow = [&](Vec candidates) {
    if (__builtin_expect(any_greater(candidates, top), 0)) {
      running.raise_top(candidates);
      top = broadcast(running.top);
    }
  };
  int64_t v = 0;
  while (v + kStep <= n) {
    const int64_t end = v + kBlock <= n ? v + kBlock : n;
    for (; v + kStep <= end; v += kStep) {
      Vec x[kUnroll];
      for (int u = 0; u < kUnroll; ++u) x[u] = load(z + v + u * kLanes);
      follow(max_keeping_nan_of_second(max_keeping_nan_of_second(x[0], x[1]),
                                       max_keeping_nan_of_second(x[2], x[3])));
      for (int u = 0; u < kUnroll; ++u) running.block[u] = running.block[u] + exp(x[u] - top);
    }
    running.end_block();
  }
  for (; v < n; v += kLanes) {
    T padded[kLanes];
    const bool whole = v + kLanes <= n;
    if (!whole) copy_padded(padded, z + v, n - v);
    const Vec x = load(whole ? z + v : padded);
    follow(x);
    running.block[0] = running.block[0] + exp(x - top);
  }
  running.end_block();
  return running;
}

template <class T>
void forward_rows(const ForwardArgs& args) {
  const Rows rows = args.rows;
  const int64_t count = count_of(rows);
#pragma omp parallel for schedule(dynamic, rows_at_a_time(rows)) num_threads(threads_for(rows, args.threads))
  for (int64_t row = 0; row < count; ++row) {
    const int64_t target = args.targets[row];
    if (target == args.ignore_index) {
      args.logps[row] = 0;
      args.lse[row] = 0;
      continue;
    }
    const T* z = static_cast<const T*>(args.logits) + offset_of(rows, row);
    const RunningSum running = running_sum(z, rows.vocabulary);
    const double total = running.total();
    // A sum of 0 is a row of -inf only, which is NaN in torch.log_softmax too (-inf - -inf).
    const double log_total = total > 0 ? ::log(total) : NAN;
    args.lse[row] = static_cast<float>(running.top + log_total);
    // Not z - lse: at |z| = 1e4, rounding lse to float32 would cost 5e-4.
    const bool in_range = target >= 0 && target < rows.vocabulary;
    const double logp = in_range ? (static_cast<double>(to_float(z + target)) - running.top) - log_total : NAN;
    args.logps[row] = static_cast<float>(logp);
  }
}

// ---- backward

template <class T>
inline void fill(T* out, int64_t n, float x) {
  T value;
  from_float(&value, x);
  for (int64_t v = 0; v < n; ++v) out[v] = value;
}

// out[v] = minus_scale * exp(z[v] - lse) for n elements; out may be z.
template <bool kStream, class T>
inline void row_gradient(const T* z, T* out, int64_t n, Vec lse, Vec minus_scale) {
  int64_t v = 0;
  for (; v + kStep <= n; v += kStep) {
    Vec x[kUnroll];
    for (int u = 0; u < kUnroll; ++u) x[u] = load(z + v + u * kLanes);
    for (int u = 0; u < kUnroll; ++u) store<kStream>(out + v + u * kLanes, minus_scale * exp(x[u] - lse));
  }
  for (; v < n; v += kLanes) {
    T padded[kLanes];
    const int64_t left = n - v < kLanes ? n - v : kLanes;
    copy_padded(padded, z + v, left);
    store<false>(padded, minus_scale * exp(load(padded) - lse));
    memcpy(out + v, padded, left * sizeof(T));
  }
}

// Streaming stores go past the cache, which saves reading the line that is about to be overwritten.
template <class T>
inline void row_gradient_streamed(const T* z, T* out, int64_t n, Vec lse, Vec minus_scale) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(out) % kStreamAlignment;
  int64_t head = past == 0 ? 0 : static_cast<int64_t>((kStreamAlignment - past) / sizeof(T));
  if (head > n) head = n;
  row_gradient<false>(z, out, head, lse, minus_scale);
  row_gradient<true>(z + head, out + head, n - head, lse, minus_scale);
  finish_streaming();
}

template <class T>
void backward_rows(const BackwardArgs& args) {
  const Rows rows = args.rows, grad_rows = args.grad_rows;
  const int64_t count = count_of(rows), n = rows.vocabulary;
  const bool streamed = args.logits != args.grad_logits && count * n * static_cast<int64_t>(sizeof(T)) > kStreamedBytes;
#pragma omp parallel for schedule(dynamic, rows_at_a_time(rows)) num_threads(threads_for(rows, args.threads))
  for (int64_t row = 0; row < count; ++row) {
    const int64_t target = args.targets[row];
    const T* z = static_cast<const T*>(args.logits) + offset_of(rows, row);
    T* out = static_cast<T*>(args.grad_logits) + offset_of(grad_rows, row);
    if (target == args.ignore_index || target < 0 || target >= n) {
      fill(out, n, target == args.ignore_index ? 0.0f : NAN);
      continue;
    }
    const float lse = args.lse[row], scale = args.grad_logps[row];
    // Read before the row is overwritten, and computed in float64: 1 - exp would lose the entry as p nears 1.
    const double at_target = -static_cast<double>(scale) * ::expm1(static_cast<double>(to_float(z + target)) - lse);
    if (streamed)
      row_gradient_streamed(z, out, n, broadcast(lse), broadcast(-scale));
    else
      row_gradient<false>(z, out, n, broadcast(lse), broadcast(-scale));
    from_float(out + target, static_cast<float>(at_target));
  }
}

// ---- what the table points to

void forward(const ForwardArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32: return forward_rows<float>(args);
    case DType::kBFloat16: return forward_rows<BFloat16>(args);
    case DType::kFloat16: return forward_rows<Float16>(args);
  }
}

void backward(const BackwardArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32: return backward_rows<float>(args);
    case DType::kBFloat16: return backward_rows<BFloat16>(args);
    case DType::kFloat16: return backward_rows<Float16>(args);
  }
}

void exp_of_array(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes];
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    copy_padded(lanes, x + i, left);
    store<false>(lanes, exp(load(lanes)));
    memcpy(y + i, lanes, left * sizeof(float));
  }
}

}  // namespace

extern const TokenLogps GRPO_TABLE{forward, backward, exp_of_array};

}  // namespace grpo_kernels
