// Python bindings of the CPU kernels: addresses and integers in, nothing out.  What an address points to, and that it
// stays alive through the call, is backends/native_cpu.py's business.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <utility>

#include "cpu/head_tile.h"
#include "cpu/integer_range.h"
#include "cpu/isa.h"
#include "cpu/preference_tail.h"
#include "cpu/token_logps.h"
#include "margin_loss.h"

namespace py = pybind11;
using namespace grpo_kernels;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int code) {
  if (code < 0 || code > static_cast<int>(DType::kFloat16)) throw std::invalid_argument("unknown dtype code");
  return static_cast<DType>(code);
}

void token_logps_fwd(int dtype, Address logits, int64_t sequences, int64_t length, int64_t vocabulary,
                     int64_t stride_sequence, int64_t stride_token, Address targets, Address logps, Address lse,
                     int64_t ignore_index, int threads) {
  token_logps().forward({dtype_of(dtype),
                         {sequences, length, vocabulary, stride_sequence, stride_token},
                         at<void>(logits),
                         at<int64_t>(targets),
                         at<float>(logps),
                         at<float>(lse),
                         ignore_index,
                         threads});
}

void token_logps_bwd(int dtype, Address logits, int64_t sequences, int64_t length, int64_t vocabulary,
                     int64_t stride_sequence, int64_t stride_token, Address targets, Address lse, Address grad_logps,
                     Address grad_logits, int64_t grad_stride_sequence, int64_t grad_stride_token,
                     int64_t ignore_index, int threads) {
  token_logps().backward({dtype_of(dtype),
                          {sequences, length, vocabulary, stride_sequence, stride_token},
                          at<void>(logits),
                          at<int64_t>(targets),
                          at<float>(lse),
                          at<float>(grad_logps),
                          {sequences, length, vocabulary, grad_stride_sequence, grad_stride_token},
                          at<void>(grad_logits),
                          ignore_index,
                          threads});
}

void head_tile_fwd(int dtype, Address logits, int64_t rows, int64_t words, int64_t stride, Address bias,
                   Address targets, Address top, Address rest, Address picked, Address factor, Address exps,
                   int64_t exps_stride, float exps_scale, int64_t start, float softcap, float logit_scale,
                   int threads) {
  head_tile().forward({{dtype_of(dtype), rows, words, start, at<void>(logits), stride, at<float>(bias),
                        at<int64_t>(targets), softcap, logit_scale, threads},
                       at<float>(top),
                       at<float>(rest),
                       at<float>(picked),
                       at<float>(factor),
                       at<void>(exps),
                       exps_stride,
                       exps_scale});
}

void head_tile_bwd(int dtype, Address logits, int64_t rows, int64_t words, int64_t stride, Address bias,
                   Address targets, Address top, Address scale, Address at_target, Address grads, int64_t grads_stride,
                   int64_t start, float softcap, float logit_scale, int threads) {
  head_tile().backward({{dtype_of(dtype), rows, words, start, at<void>(logits), stride, at<float>(bias),
                         at<int64_t>(targets), softcap, logit_scale, threads},
                        at<float>(top),
                        at<float>(scale),
                        at<float>(at_target),
                        at<void>(grads),
                        grads_stride});
}

void tail(bool float64, int64_t rows, int64_t pairs, int64_t groups, Address token_logps, Address targets,
          Address cu_seqlens, Address ref_logps, Address group_ids, Address pair_weights, Address policy_logps,
          Address lengths, Address margins, Address rewards, Address losses, Address slopes, Address group_sums,
          Address group_counts, Address group_losses, int loss_type, double beta, double label_smoothing,
          bool length_normalize, int64_t ignore_index, int threads) {
  if (loss_type < 0 || loss_type >= kLossTypes) throw std::invalid_argument("unknown loss type");
  preference_tail({float64,
                   rows,
                   pairs,
                   groups,
                   at<void>(token_logps),
                   at<int64_t>(targets),
                   at<int32_t>(cu_seqlens),
                   at<double>(ref_logps),
                   at<int64_t>(group_ids),
                   at<double>(pair_weights),
                   at<void>(policy_logps),
                   at<double>(lengths),
                   at<void>(margins),
                   at<void>(rewards),
                   at<void>(losses),
                   at<void>(slopes),
                   at<double>(group_sums),
                   at<int64_t>(group_counts),
                   at<void>(group_losses),
                   loss_type,
                   beta,
                   label_smoothing,
                   length_normalize,
                   ignore_index,
                   threads});
}

void robust(bool float64, int64_t pairs, int64_t groups, Address losses, Address group_ids, Address group_weights,
            Address weights, Address loss) {
  robust_loss({float64, pairs, groups, at<void>(losses), at<int64_t>(group_ids), at<void>(group_weights),
               at<void>(weights), at<void>(loss)});
}

// Of int64, or of int32 where narrow.
std::pair<int64_t, int64_t> range(bool narrow, Address x, int64_t n, int64_t ignored) {
  return narrow ? integer_range(at<int32_t>(x), n, ignored) : integer_range(at<int64_t>(x), n, ignored);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of grpo_kernels; called through grpo_kernels.backends.native_cpu.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("token_logps_fwd", token_logps_fwd, unlocked);
  m.def("token_logps_bwd", token_logps_bwd, unlocked);
  m.def("preference_tail", tail, unlocked);
  m.def("robust_loss", robust, unlocked);
  m.def("integer_range", range, unlocked);
  m.def("head_tile_fwd", head_tile_fwd, unlocked);
  m.def("head_tile_bwd", head_tile_bwd, unlocked);
  m.def("isa", [] { return isa_name(isa()); }, "The instruction set in use; raises if GRPO_KERNELS_ISA cannot be met.");
  m.def(
      "exp_float32", [](Address x, Address y, int64_t n) { token_logps().exp(at<float>(x), at<float>(y), n); },
      "The kernels' exponential over n float32, for the test of its accuracy.", unlocked);
}
