// One vector type and one exponential for the instruction set that this translation unit is compiled for.
//
// Everything here has internal linkage: an inline function shared between translation units compiled for different
// instruction sets would be merged by the linker, and could then run AVX-512 on a machine that lacks it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../dtypes.h"

namespace grpo_kernels {
namespace {

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

// exp x for x <= 88.7, which is all there is: a logit less a bound on its row.  2^n exp r with n = round(x / ln 2) and
// |r| <= ln(2)/2, within 1 ulp, subnormal results included.  Adding 1.5 * 2^23 leaves no bits for a fraction.  ln 2 is
// taken off in two parts, the first short enough that its product with n is exact.  The polynomial has the exact
// leading terms 1 + r, so exp 0 is exactly 1, and a minimax remainder of 3e-9.  NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  x = max_keeping_nan_of_second(broadcast(-104.0f), x);  // 0 from there on; keeps -inf out of n
  const Vec n = multiply_add(x, broadcast(1.44269504f), magic) - magic;
  Vec r = negative_multiply_add(n, broadcast(0.693359375f), x);
  r = negative_multiply_add(n, broadcast(-2.12194440e-4f), r);
  Vec p = broadcast(0.00138145406f);
  p = multiply_add(p, r, broadcast(0.00836874545f));
  p = multiply_add(p, r, broadcast(0.041668389f));
  p = multiply_add(p, r, broadcast(0.166665211f));
  p = multiply_add(p, r, broadcast(0.49999994f));
  p = multiply_add(p, r, broadcast(1.0f));
  p = multiply_add(p, r, broadcast(1.0f));
  return scale_by_power_of_two(p, n);
}

inline float first_lane(Vec a) {
  float lanes[kLanes];
  memcpy(lanes, &a, sizeof lanes);
  return lanes[0];
}

inline float exp(float x) { return first_lane(exp(broadcast(x))); }

}  // namespace
}  // namespace grpo_kernels
