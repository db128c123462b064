// Element types of the logits, as storage only: arithmetic is done on float32 vectors.
#pragma once

#include <stdint.h>

namespace grpo_kernels {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The order of _DTYPES in backends/native_cpu.py and native_cuda.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace grpo_kernels
