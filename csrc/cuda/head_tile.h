// One tile of the LM head's logits, just out of the GEMM, on NVIDIA GPUs; the formulas are those of cpu/head_tile.h.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../dtypes.h"

namespace grpo_kernels {

struct Tile {
  DType dtype;      // of logits: what the GEMM answers in
  DType out_dtype;  // of exps or grads: what goes into the next one; another only where logits are float32
  int64_t rows, words, start;
  const void* logits;
  int64_t stride;
  const float* bias;  // null for none
  const int64_t* targets;
  float softcap, inverse_cap;  // 0 and 1 stand for none
  float slope;                 // logit_scale, over softcap where there is one
};

struct TileForwardArgs {
  Tile tile;
  float *top, *rest, *picked, *factor;
  void* exps;  // null where they are not wanted; may be the logits where the dtypes agree
  int64_t exps_stride;
  float exps_scale;
};

struct TileBackwardArgs {
  Tile tile;
  const float *top, *scale, *at_target;
  void* grads;  // may be the logits where the dtypes agree
  int64_t grads_stride;
};

// Both launch on the stream and return; they throw std::runtime_error where the launch itself fails.
void head_tile_fwd(const TileForwardArgs& args, cudaStream_t stream);
void head_tile_bwd(const TileBackwardArgs& args, cudaStream_t stream);

}  // namespace grpo_kernels
