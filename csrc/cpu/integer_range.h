// Smallest and largest of 0 and some integers, but for the ignored ones: what the checks of labels and ids ask.
#pragma once

#include <stdint.h>

#include <utility>

namespace grpo_kernels {

template <class T>
std::pair<int64_t, int64_t> integer_range(const T* x, int64_t n, int64_t ignored) {
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t value = x[i] == ignored ? 0 : x[i];
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  return {low, high};
}

}  // namespace grpo_kernels
