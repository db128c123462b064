// Single elements and the ends of rows, through the vectors of simd.h and with their internal linkage.
#pragma once

#include "simd.h"

namespace grpo_kernels {
namespace {

// The last few elements of a row, completed by -inf, which neither moves a maximum nor adds to a sum.
template <class T>
inline void copy_padded(T* padded, const T* z, int64_t n);
template <>
inline void copy_padded(float* padded, const float* z, int64_t n) {
  for (int i = 0; i < kLanes; ++i) padded[i] = i < n ? z[i] : -INFINITY;
}
template <>
inline void copy_padded(BFloat16* padded, const BFloat16* z, int64_t n) {
  for (int i = 0; i < kLanes; ++i) padded[i].bits = i < n ? z[i].bits : 0xff80;
}
template <>
inline void copy_padded(Float16* padded, const Float16* z, int64_t n) {
  for (int i = 0; i < kLanes; ++i) padded[i].bits = i < n ? z[i].bits : 0xfc00;
}

template <class T>
inline float to_float(const T* z) {
  T padded[kLanes];
  copy_padded(padded, z, 1);
  return first_lane(load(padded));
}

template <class T>
inline void from_float(T* out, float x) {
  T padded[kLanes];
  store<false>(padded, broadcast(x));
  *out = padded[0];
}

}  // namespace
}  // namespace grpo_kernels
