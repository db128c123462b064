// One tile of the LM head's logits, just out of the GEMM: rows x words, one row a thread at a time.
//
//   z = softcap * tanh(logit_scale * (x + bias) / softcap), or without the cap;   d = 1 - (z / softcap)^2, or 1
//   forward    over v != y:  top' = max(top, max z),  rest' = rest exp(top - top') + sum e,  e = exp(z - top')
//              exps = 2^-shift e d, 0 at y;  picked = z[y] where y is in the tile                reads the tile twice
//   backward   grads = scale exp(z - top) d,  at_target d at y                                   reads and writes once
//
// The second reading of forward finds its row in the first-level cache.
#pragma once

#include <stdint.h>

#include "../dtypes.h"

namespace grpo_kernels {

struct Tile {
  DType dtype;  // of logits, and of exps or grads
  int64_t rows, words, start;
  void* logits;  // scratch: the target's entry is overwritten
  int64_t stride;
  const float* bias;  // null for none
  const int64_t* targets;
  float softcap, logit_scale;  // a softcap of 0 stands for none
  int threads;
};

struct TileForwardArgs {
  Tile tile;
  float *top, *rest, *picked, *factor;
  void* exps;  // null where they are not wanted; may be the logits
  int64_t exps_stride;
  float exps_scale;
};

struct TileBackwardArgs {
  Tile tile;
  const float *top, *scale, *at_target;
  void* grads;  // may be the logits
  int64_t grads_stride;
};

struct HeadTile {
  void (*forward)(const TileForwardArgs&);
  void (*backward)(const TileBackwardArgs&);
};

// One definition per instruction set that is part of this build; see isa.h.
extern const HeadTile kHeadTileBaseline;
#ifdef GRPO_X86
extern const HeadTile kHeadTileAvx2;
extern const HeadTile kHeadTileAvx512;
extern const HeadTile kHeadTileAvx512Bf16;
#endif

const HeadTile& head_tile();

}  // namespace grpo_kernels
