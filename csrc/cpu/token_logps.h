// Token log-probabilities of a (S, T, V) block of logits, and their gradient.
//
//   forward    logp[r] = z[r, y] - lse[r],   lse[r] = log sum_v exp z[r, v]      reads each row once
//   backward   dz[r, v] = c[r] ((v == y) - exp(z[r, v] - lse[r]))               reads and writes each row once
//
// The kernels are compiled once per instruction set, from one source; `token_logps()` hands out the set chosen.
#pragma once

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
  int threads;
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
  int threads;
};

struct TokenLogps {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*exp)(const float* x, float* y, int64_t n);  // the kernels' own exponential, for the test of its accuracy
};

// One definition per instruction set that is part of this build; see isa.h.
extern const TokenLogps kTokenLogpsBaseline;
#ifdef GRPO_X86
extern const TokenLogps kTokenLogpsAvx2;
extern const TokenLogps kTokenLogpsAvx512;
extern const TokenLogps kTokenLogpsAvx512Bf16;
#endif

const TokenLogps& token_logps();

}  // namespace grpo_kernels
