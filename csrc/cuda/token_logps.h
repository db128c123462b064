// Token log-probabilities on NVIDIA GPUs, sm_80 and up.  The formulas are those of cpu/token_logps.h.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../dtypes.h"

namespace grpo_kernels {

// Where row r = s * length + t lies: base + s * stride_sequence + t * stride_token, in elements; last stride 1.
struct Rows {
  int64_t sequences, length, vocabulary;
  int64_t stride_sequence, stride_token;
};

struct ForwardArgs {
  DType dtype;
  Rows rows;
  const void* logits;
  const int64_t* targets;
  float* logps;
  float* lse;
  int64_t ignore_index;
};

struct BackwardArgs {
  DType dtype;
  Rows rows;
  const void* logits;
  const int64_t* targets;
  const float* lse;
  const float* grad_logps;
  Rows grad_rows;  // only the strides are looked at
  void* grad_logits;
  int64_t ignore_index;
};

// Both launch on the stream and return; they throw std::runtime_error where the launch itself fails.
void token_logps_fwd(const ForwardArgs& args, cudaStream_t stream);
void token_logps_bwd(const BackwardArgs& args, cudaStream_t stream);

}  // namespace grpo_kernels
