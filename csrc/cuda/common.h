// What the CUDA kernels share: element types, 16-byte chunks, errors, and reductions in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "../dtypes.h"

namespace grpo_kernels {

// An error of a launch as an exception.  Whatever goes wrong later, on the device, PyTorch reports at its next sync.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float to_float(__half x) { return __half2float(x); }

template <class T>
inline __device__ T from_float(float x);
template <>
inline __device__ float from_float<float>(float x) {
  return x;
}
template <>
inline __device__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
inline __device__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// 16 bytes of a row, loaded and stored at once.
template <class T>
union Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 bits;
  T element[kSize];
  __device__ Chunk() {}
};

// Logits are used once by each kernel: the hint keeps them from pushing everything else out of L2.
template <class T>
inline __device__ Chunk<T> load_chunk(const T* p) {
  Chunk<T> chunk;
  chunk.bits = __ldcs(reinterpret_cast<const uint4*>(p));
  return chunk;
}
// The same of what will be read again soon.
template <class T>
inline __device__ Chunk<T> load_kept(const T* p) {
  Chunk<T> chunk;
  chunk.bits = __ldca(reinterpret_cast<const uint4*>(p));
  return chunk;
}
template <class T>
inline __device__ void store_chunk(T* p, const Chunk<T>& chunk) {
  __stcs(reinterpret_cast<uint4*>(p), chunk.bits);
}

// Elements before the first 16-byte boundary; the whole row where it has none.
template <class T>
inline __device__ int64_t elements_to_boundary(const T* p, int64_t n) {
  const int64_t count = (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T);
  return count < n ? count : n;
}

inline __device__ double warp_sum(double x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

}  // namespace grpo_kernels
