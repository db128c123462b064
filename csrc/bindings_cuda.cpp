// Python bindings of the CUDA kernels: addresses and integers in, nothing out.  What an address points to, and that it
// stays alive through the call, is backends/native_cuda.py's business.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/head_tile.h"
#include "cuda/preference_tail.h"
#include "cuda/token_logps.h"
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

// This module has a CUDA runtime of its own (linked statically), which has to be told what PyTorch's already knows.
cudaStream_t stream_of(int device, Address stream) {
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) throw std::runtime_error(std::string("cudaSetDevice: ") + cudaGetErrorString(status));
  return reinterpret_cast<cudaStream_t>(stream);
}

void fwd(int dtype, Address logits, int64_t sequences, int64_t length, int64_t vocabulary, int64_t stride_sequence,
         int64_t stride_token, Address targets, Address logps, Address lse, int64_t ignore_index, int device,
         Address stream) {
  token_logps_fwd({dtype_of(dtype),
                   {sequences, length, vocabulary, stride_sequence, stride_token},
                   at<void>(logits),
                   at<int64_t>(targets),
                   at<float>(logps),
                   at<float>(lse),
                   ignore_index},
                  stream_of(device, stream));
}

void bwd(int dtype, Address logits, int64_t sequences, int64_t length, int64_t vocabulary, int64_t stride_sequence,
         int64_t stride_token, Address targets, Address lse, Address grad_logps, Address grad_logits,
         int64_t grad_stride_sequence, int64_t grad_stride_token, int64_t ignore_index, int device, Address stream) {
  token_logps_bwd({dtype_of(dtype),
                   {sequences, length, vocabulary, stride_sequence, stride_token},
                   at<void>(logits),
                   at<int64_t>(targets),
                   at<float>(lse),
                   at<float>(grad_logps),
                   {sequences, length, vocabulary, grad_stride_sequence, grad_stride_token},
                   at<void>(grad_logits),
                   ignore_index},
                  stream_of(device, stream));
}

// Divided here, once and in float64: a division for every element is a subroutine, and saving registers around it needs
// a stack.
Tile tile_of(int dtype, int out_dtype, int64_t rows, int64_t words, int64_t start, Address logits, int64_t stride,
             Address bias, Address targets, double softcap, double logit_scale) {
  const double inverse = softcap == 0 ? 1.0 : 1 / softcap;
  return {dtype_of(dtype), dtype_of(out_dtype), rows, words, start, at<void>(logits), stride, at<float>(bias),
          at<int64_t>(targets), static_cast<float>(softcap), static_cast<float>(inverse),
          static_cast<float>(logit_scale * inverse)};
}

void tile_fwd(int out_dtype, int dtype, Address logits, int64_t rows, int64_t words, int64_t stride, Address bias,
              Address targets, Address top, Address rest, Address picked, Address factor, Address exps,
              int64_t exps_stride, float exps_scale, int64_t start, double softcap, double logit_scale, int device,
              Address stream) {
  head_tile_fwd({tile_of(dtype, out_dtype, rows, words, start, logits, stride, bias, targets, softcap, logit_scale),
                 at<float>(top),
                 at<float>(rest),
                 at<float>(picked),
                 at<float>(factor),
                 at<void>(exps),
                 exps_stride,
                 exps_scale},
                stream_of(device, stream));
}

void tile_bwd(int out_dtype, int dtype, Address logits, int64_t rows, int64_t words, int64_t stride, Address bias,
              Address targets, Address top, Address scale, Address at_target, Address grads, int64_t grads_stride,
              int64_t start, double softcap, double logit_scale, int device, Address stream) {
  head_tile_bwd({tile_of(dtype, out_dtype, rows, words, start, logits, stride, bias, targets, softcap, logit_scale),
                 at<float>(top),
                 at<float>(scale),
                 at<float>(at_target),
                 at<void>(grads),
                 grads_stride},
                stream_of(device, stream));
}

void tail(bool float64, int64_t rows, int64_t pairs, int64_t groups, Address token_logps, Address targets,
          Address cu_seqlens, Address ref_logps, Address group_ids, Address pair_weights, Address policy_logps,
          Address lengths, Address margins, Address rewards, Address losses, Address slopes, Address group_sums,
          Address group_counts, Address group_losses, int loss_type, double beta, double label_smoothing,
          bool length_normalize, int64_t ignore_index, int device, Address stream) {
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
                   ignore_index},
                  stream_of(device, stream));
}

void robust(bool float64, int64_t pairs, int64_t groups, Address losses, Address group_ids, Address group_weights,
            Address weights, Address loss, int device, Address stream) {
  robust_loss({float64, pairs, groups, at<void>(losses), at<int64_t>(group_ids), at<void>(group_weights),
               at<void>(weights), at<void>(loss)},
              stream_of(device, stream));
}

// Raises what the runtime has to say, for example that the driver is older than it needs.
int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return count;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of grpo_kernels; called through grpo_kernels.backends.native_cuda.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("token_logps_fwd", fwd, unlocked);
  m.def("token_logps_bwd", bwd, unlocked);
  m.def("preference_tail", tail, unlocked);
  m.def("robust_loss", robust, unlocked);
  m.def("head_tile_fwd", tile_fwd, unlocked);
  m.def("head_tile_bwd", tile_bwd, unlocked);
  m.def("device_count", device_count, unlocked);
}
