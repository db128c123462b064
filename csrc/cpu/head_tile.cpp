// The tile operations of the LM head on the CPU; compiled once per instruction set with GRPO_TABLE naming the result.
//
// Formulas as in head_tile.h.  A row's sum is kept in float32 in 4 vectors of lanes and added up in float64, in an order
// that depends on the instruction set and the tile's width alone.  Without bias, scale and cap a row is taken as it
// lies; otherwise its z are made once, in float32, in a buffer of one row for each thread.

#include "head_tile.h"

#include <float.h>

#include <memory>

#include "elements.h"

namespace grpo_kernels {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;
constexpr int64_t kSerialElements = 16384;  // below this many, starting threads costs more than it saves

inline int threads_for(const Tile& tile) { return tile.rows * tile.words <= kSerialElements ? 1 : tile.threads; }

inline bool is_plain(const Tile& tile) { return tile.bias == nullptr && tile.softcap == 0 && tile.logit_scale == 1; }

template <class T>
inline T* row_of(void* base, int64_t stride, int64_t row) {
  return static_cast<T*>(base) + row * stride;
}

// Calls `whole(v)` at every multiple of kStep and `part(v, n)` for what is left, n <= kLanes at a time.
template <class Whole, class Part>
inline void along(int64_t words, Whole whole, Part part) {
  int64_t v = 0;
  for (; v + kStep <= words; v += kStep) whole(v);
  for (; v < words; v += kLanes) part(v, words - v < kLanes ? words - v : kLanes);
}

template <class T>
inline Vec load_padded(const T* x, int64_t n) {
  T padded[kLanes];
  copy_padded(padded, x, n);
  return load(padded);
}

template <class T>
inline void store_some(T* out, Vec a, int64_t n) {
  T padded[kLanes];
  store<false>(padded, a);
  memcpy(out, padded, n * sizeof(T));
}

// exp x - 1 for |x| <= 80, with the digits of a small x: the exponential of simd.h, its last + 1 left off.
inline Vec expm1(Vec x) {
  const Vec magic = broadcast(12582912.0f), one = broadcast(1.0f);
  const Vec n = multiply_add(x, broadcast(1.44269504f), magic) - magic;
  Vec r = negative_multiply_add(n, broadcast(0.693359375f), x);
  r = negative_multiply_add(n, broadcast(-2.12194440e-4f), r);
  Vec p = broadcast(0.00138145406f);
  p = multiply_add(p, r, broadcast(0.00836874545f));
  p = multiply_add(p, r, broadcast(0.041668389f));
  p = multiply_add(p, r, broadcast(0.166665211f));
  p = multiply_add(p, r, broadcast(0.49999994f));
  p = multiply_add(p, r * r, r);
  return scale_by_power_of_two(p, n) + (scale_by_power_of_two(one, n) - one);
}

// tanh x = expm1(2x) / (expm1(2x) + 2); beyond |x| = 20 it is 1 to the last bit.
inline Vec tanh(Vec x) {
  const Vec low = broadcast(-40.0f), minus = broadcast(-1.0f);
  const Vec bounded = minus * max_keeping_nan_of_second(low, minus * max_keeping_nan_of_second(low, x + x));
  const Vec e = expm1(bounded);
  return e / (e + broadcast(2.0f));
}

// z of one row into a buffer.
template <class T>
inline void make_logits(const T* x, const Tile& tile, float* z) {
  const float* bias = tile.bias;
  const Vec scale = broadcast(tile.logit_scale), cap = broadcast(tile.softcap);
  const bool capped = tile.softcap != 0;
  const auto transform = [&](Vec a) { return capped ? cap * tanh(a * scale / cap) : a * scale; };
  along(
      tile.words,
      [&](int64_t v) {
        for (int u = 0; u < kUnroll; ++u, v += kLanes) {
          const Vec a = load(x + v);
          store<false>(z + v, transform(bias == nullptr ? a : a + load(bias + v)));
        }
      },
      [&](int64_t v, int64_t n) {
        const Vec a = load_padded(x + v, n);
        store_some(z + v, transform(bias == nullptr ? a : a + load_padded(bias + v, n)), n);
      });
}

inline float largest_lane(Vec a) {
  float lanes[kLanes];
  memcpy(lanes, &a, sizeof lanes);
  float largest = lanes[0];
  for (float x : lanes) largest = x > largest ? x : largest;
  return largest;
}

// A NaN may get lost here; it comes back in the sum.
template <class T>
inline float largest_of(const T* z, int64_t words) {
  Vec top[kUnroll];
  for (auto& t : top) t = broadcast(-INFINITY);
  along(
      words,
      [&](int64_t v) {
        for (int u = 0; u < kUnroll; ++u) top[u] = max_keeping_nan_of_second(load(z + v + u * kLanes), top[u]);
      },
      [&](int64_t v, int64_t n) { top[0] = max_keeping_nan_of_second(load_padded(z + v, n), top[0]); });
  for (int u = 1; u < kUnroll; ++u) top[0] = max_keeping_nan_of_second(top[u], top[0]);
  return largest_lane(top[0]);
}

inline Vec slope_of(Vec z, Vec inverse_cap) {
  const Vec t = z * inverse_cap;
  return negative_multiply_add(t, t, broadcast(1.0f));
}

// Sum of exp(z - top); with kWrite also out = scale * exp(z - top) * d.  `out` may be z.
template <bool kWrite, bool kCap, class T, class Out>
inline double sum_of_exps(const T* z, int64_t words, float top, float scale, float softcap, Out* out) {
  const Vec t = broadcast(top), s = broadcast(scale), inverse_cap = broadcast(kCap ? 1 / softcap : 0);
  Vec sum[kUnroll];
  for (auto& x : sum) x = broadcast(0.0f);
  const auto written = [&](Vec e, Vec x) { return kCap ? e * s * slope_of(x, inverse_cap) : e * s; };
  along(
      words,
      [&](int64_t v) {
        Vec x[kUnroll];
        for (int u = 0; u < kUnroll; ++u) x[u] = load(z + v + u * kLanes);
        for (int u = 0; u < kUnroll; ++u) {
          const Vec e = exp(x[u] - t);
          sum[u] = sum[u] + e;
          if (kWrite) store<false>(out + v + u * kLanes, written(e, x[u]));
        }
      },
      [&](int64_t v, int64_t n) {
        const Vec x = load_padded(z + v, n), e = exp(x - t);
        sum[0] = sum[0] + e;
        if (kWrite) store_some(out + v, written(e, x), n);
      });
  double total = 0;
  for (const auto& x : sum) {
    float lanes[kLanes];
    memcpy(lanes, &x, sizeof lanes);
    for (float lane : lanes) total += lane;
  }
  return total;
}

template <class T, class Out>
inline void forward_row(const TileForwardArgs& args, int64_t row, T* z, Out* exps) {
  const int64_t words = args.tile.words, y = args.tile.targets[row] - args.tile.start;
  const bool inside = y >= 0 && y < words;
  if (inside) {
    args.picked[row] = to_float(z + y);
    from_float(z + y, -INFINITY);  // out of the maximum and of the sum
  }
  const float old_top = args.top[row], largest = largest_of(z, words);
  const float top = largest > old_top ? largest : old_top;
  const float factor = exp(old_top - top);
  const float softcap = args.tile.softcap;
  double sum;
  if (exps == nullptr) {
    sum = sum_of_exps<false, false>(z, words, top, 1.0f, 0.0f, exps);
  } else if (softcap != 0) {
    sum = sum_of_exps<true, true>(z, words, top, args.exps_scale, softcap, exps);
  } else {
    sum = sum_of_exps<true, false>(z, words, top, args.exps_scale, 0.0f, exps);
  }
  if (inside && exps != nullptr) from_float(exps + y, 0.0f);
  args.top[row] = top;
  args.rest[row] = static_cast<float>(static_cast<double>(args.rest[row]) * factor + sum);
  args.factor[row] = factor;
}

template <class T>
void forward_rows(const TileForwardArgs& args) {
  const Tile& tile = args.tile;
#pragma omp parallel num_threads(threads_for(tile))
  {
    std::unique_ptr<float[]> buffer(is_plain(tile) ? nullptr : new float[tile.words]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tile.rows; ++row) {
      T* x = row_of<T>(tile.logits, tile.stride, row);
      T* exps = args.exps == nullptr ? nullptr : row_of<T>(args.exps, args.exps_stride, row);
      if (buffer) {
        make_logits(x, tile, buffer.get());
        forward_row(args, row, buffer.get(), exps);
      } else {
        forward_row(args, row, x, exps);
      }
    }
  }
}

template <bool kCap, class T, class Out>
inline void row_gradient(const T* z, int64_t words, float top, float scale, float softcap, Out* out) {
  const Vec t = broadcast(top), s = broadcast(scale), inverse_cap = broadcast(kCap ? 1 / softcap : 0);
  const auto gradient = [&](Vec x) {
    const Vec g = exp(x - t) * s;
    return kCap ? g * slope_of(x, inverse_cap) : g;
  };
  along(
      words,
      [&](int64_t v) {
        Vec x[kUnroll];
        for (int u = 0; u < kUnroll; ++u) x[u] = load(z + v + u * kLanes);
        for (int u = 0; u < kUnroll; ++u) store<false>(out + v + u * kLanes, gradient(x[u]));
      },
      [&](int64_t v, int64_t n) { store_some(out + v, gradient(load_padded(z + v, n)), n); });
}

template <class T, class Out>
inline void backward_row(const TileBackwardArgs& args, int64_t row, const T* z, Out* out) {
  const Tile& tile = args.tile;
  const int64_t y = tile.targets[row] - tile.start;
  const float softcap = tile.softcap;
  if (softcap != 0) {
    row_gradient<true>(z, tile.words, args.top[row], args.scale[row], softcap, out);
  } else {
    row_gradient<false>(z, tile.words, args.top[row], args.scale[row], softcap, out);
  }
  if (y < 0 || y >= tile.words) return;
  float slope = 1;
  if (softcap != 0) {
    // Then z is a buffer of its own, which the row did not overwrite.
    const float t = to_float(z + y) / softcap;
    slope = 1 - t * t;
  }
  from_float(out + y, args.at_target[row] * slope);
}

template <class T>
void backward_rows(const TileBackwardArgs& args) {
  const Tile& tile = args.tile;
#pragma omp parallel num_threads(threads_for(tile))
  {
    std::unique_ptr<float[]> buffer(is_plain(tile) ? nullptr : new float[tile.words]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tile.rows; ++row) {
      const T* x = row_of<T>(tile.logits, tile.stride, row);
      T* out = row_of<T>(args.grads, args.grads_stride, row);
      if (buffer) {
        make_logits(x, tile, buffer.get());
        backward_row(args, row, buffer.get(), out);
      } else {
        backward_row(args, row, x, out);
      }
    }
  }
}

void forward(const TileForwardArgs& args) {
  switch (args.tile.dtype) {
    case DType::kFloat32: return forward_rows<float>(args);
    case DType::kBFloat16: return forward_rows<BFloat16>(args);
    case DType::kFloat16: return forward_rows<Float16>(args);
  }
}

void backward(const TileBackwardArgs& args) {
  switch (args.tile.dtype) {
    case DType::kFloat32: return backward_rows<float>(args);
    case DType::kBFloat16: return backward_rows<BFloat16>(args);
    case DType::kFloat16: return backward_rows<Float16>(args);
  }
}

}  // namespace

extern const HeadTile GRPO_TABLE{forward, backward};

}  // namespace grpo_kernels
