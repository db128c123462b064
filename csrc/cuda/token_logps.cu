// Token log-probabilities and their gradient, one block a row.
//
//   forward    logp[r] = z[r, y] - lse[r],   lse[r] = log sum_v exp z[r, v]      reads rows * V elements
//   backward   dz[r, v] = c[r] ((v == y) - exp(z[r, v] - lse[r]))               reads and writes rows * V elements
//
// Accumulation in float32.  A row is cut into its elements up to the first 16-byte boundary, 16-byte chunks of which
// every thread has kInFlight under way, and the rest; threads, warps and the block add up in a fixed order, so two
// runs give the same bits.  Offsets are 64-bit throughout.

#include "token_logps.h"

#include <float.h>

#include "common.h"

namespace grpo_kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerSm = 2;  // so that one row is read while another's partial sums are put together
constexpr int kInFlight = 4;
constexpr int64_t kMaxGrid = 0x7fffffff;

inline __device__ int64_t offset_of(const Rows& rows, int64_t row) {
  return row / rows.length * rows.stride_sequence + row % rows.length * rows.stride_token;
}

// float32 logits get the accurate exponential; beside the rounding of 16-bit ones the fast one's error (2 + 1.2 |x|
// units in the last place, on terms that are e^x small) does not show, and it leaves the kernel bound by memory.
template <class T>
inline __device__ float exponential(float x) {
  return __expf(x);
}
template <>
inline __device__ float exponential<float>(float x) {
  return expf(x);
}

// ---- forward

// sum_v exp(z[v] - top) of what a thread, a warp or the block has seen.
struct RunningSum {
  float top = -FLT_MAX;  // finite, so that -inf - top is -inf and not NaN
  float sum = 0;
};

inline __device__ RunningSum merge(RunningSum a, RunningSum b) {
  const float top = fmaxf(a.top, b.top);
  // A sum of zero stays zero, whatever top it had: 0 * exp(-inf).  NaN sums stay NaN.
  return {top, a.sum * expf(a.top - top) + b.sum * expf(b.top - top)};
}

template <class T>
inline __device__ void add_element(RunningSum& running, float x) {
  if (x > running.top) {
    running.sum *= expf(running.top - x);
    running.top = x;
  }
  running.sum += exponential<T>(x - running.top);
}

template <class T>
inline __device__ void add_chunk(RunningSum& running, const Chunk<T>& chunk) {
  float largest = running.top;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) largest = fmaxf(largest, to_float(chunk.element[i]));
  if (largest > running.top) {
    running.sum *= expf(running.top - largest);
    running.top = largest;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) sum += exponential<T>(to_float(chunk.element[i]) - running.top);
  running.sum += sum;
}

template <class T>
inline __device__ RunningSum thread_sum(const T* z, int64_t n) {
  RunningSum running;
  const int64_t head = elements_to_boundary(z, n), chunks = (n - head) / Chunk<T>::kSize;
  const T* body = z + head;
  if (threadIdx.x < head) add_element<T>(running, to_float(z[threadIdx.x]));
  int64_t c = threadIdx.x;
  for (; c + (kInFlight - 1) * kThreads < chunks; c += kInFlight * kThreads) {
    Chunk<T> chunk[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) chunk[i] = load_chunk(body + (c + i * kThreads) * Chunk<T>::kSize);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add_chunk(running, chunk[i]);
  }
  for (; c < chunks; c += kThreads) add_chunk(running, load_chunk(body + c * Chunk<T>::kSize));
  const int64_t v = head + chunks * Chunk<T>::kSize + threadIdx.x;
  if (v < n) add_element<T>(running, to_float(z[v]));
  return running;
}

inline __device__ RunningSum warp_merge(RunningSum running) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const RunningSum other{__shfl_xor_sync(kFullMask, running.top, offset),
                           __shfl_xor_sync(kFullMask, running.sum, offset)};
    running = merge(running, other);
  }
  return running;
}

// The result is thread 0's.
inline __device__ RunningSum block_merge(RunningSum running) {
  __shared__ RunningSum of_warp[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  running = warp_merge(running);
  __syncthreads();  // the row before may still be reading
  if (lane == 0) of_warp[warp] = running;
  __syncthreads();
  if (warp == 0) running = warp_merge(lane < kWarps ? of_warp[lane] : RunningSum{});
  return running;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) token_logps_fwd_kernel(ForwardArgs args) {
  const int64_t count = args.rows.sequences * args.rows.length, n = args.rows.vocabulary;
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const int64_t target = args.targets[row];
    if (target == args.ignore_index) {
      if (threadIdx.x == 0) args.logps[row] = args.lse[row] = 0;
      continue;
    }
    const T* z = static_cast<const T*>(args.logits) + offset_of(args.rows, row);
    const RunningSum running = block_merge(thread_sum(z, n));
    if (threadIdx.x != 0) continue;
    // A sum of 0 is a row of -inf only, which is NaN in torch.log_softmax too (-inf - -inf).
    const float log_sum = running.sum == 0 ? NAN : logf(running.sum);
    args.lse[row] = running.top + log_sum;
    // Not z - lse: at |z| = 1e4, rounding lse would cost 5e-4.
    args.logps[row] = target >= 0 && target < n ? (to_float(z[target]) - running.top) - log_sum : NAN;
  }
}

// ---- backward

struct RowGradient {
  float lse, minus_scale, at_target;
  int64_t target;
};

template <class T>
inline __device__ T gradient_of(const RowGradient& row, float z, int64_t v) {
  const float x = row.minus_scale * exponential<T>(z - row.lse);
  return from_float<T>(v == row.target ? row.at_target : x);
}

template <class T>
inline __device__ Chunk<T> gradient_of(const RowGradient& row, Chunk<T> chunk, int64_t v) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) {
    chunk.element[i] = from_float<T>(row.minus_scale * exponential<T>(to_float(chunk.element[i]) - row.lse));
  }
  // One comparison a chunk; unrolled, because an index known only at run time would put the chunk in local memory.
  if (row.target - v >= 0 && row.target - v < Chunk<T>::kSize) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      if (v + i == row.target) chunk.element[i] = from_float<T>(row.at_target);
    }
  }
  return chunk;
}

// In place every element is read and written by the same thread, save the target's, which has been read before.
template <class T>
inline __device__ void write_gradient(const RowGradient& row, const T* z, T* out, int64_t n) {
  const bool together = (reinterpret_cast<uintptr_t>(z) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  if (!together) {
    for (int64_t v = threadIdx.x; v < n; v += kThreads) out[v] = gradient_of<T>(row, to_float(z[v]), v);
    return;
  }
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t head = elements_to_boundary(z, n), chunks = (n - head) / kSize;
  if (threadIdx.x < head) out[threadIdx.x] = gradient_of<T>(row, to_float(z[threadIdx.x]), threadIdx.x);
  int64_t c = threadIdx.x;
  for (; c + (kInFlight - 1) * kThreads < chunks; c += kInFlight * kThreads) {
    Chunk<T> chunk[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) chunk[i] = load_chunk(z + head + (c + i * kThreads) * kSize);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t v = head + (c + i * kThreads) * kSize;
      store_chunk(out + v, gradient_of(row, chunk[i], v));
    }
  }
  for (; c < chunks; c += kThreads) {
    const int64_t v = head + c * kSize;
    store_chunk(out + v, gradient_of(row, load_chunk(z + v), v));
  }
  const int64_t v = head + chunks * kSize + threadIdx.x;
  if (v < n) out[v] = gradient_of<T>(row, to_float(z[v]), v);
}

template <class T>
inline __device__ void fill_row(T* out, int64_t n, float x) {
  const T value = from_float<T>(x);
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; ++i) chunk.element[i] = value;
  const int64_t head = elements_to_boundary(out, n), chunks = (n - head) / Chunk<T>::kSize;
  if (threadIdx.x < head) out[threadIdx.x] = value;
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads) store_chunk(out + head + c * Chunk<T>::kSize, chunk);
  const int64_t v = head + chunks * Chunk<T>::kSize + threadIdx.x;
  if (v < n) out[v] = value;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) token_logps_bwd_kernel(BackwardArgs args) {
  const int64_t count = args.rows.sequences * args.rows.length, n = args.rows.vocabulary;
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const int64_t target = args.targets[row];
    const T* z = static_cast<const T*>(args.logits) + offset_of(args.rows, row);
    T* out = static_cast<T*>(args.grad_logits) + offset_of(args.grad_rows, row);
    if (target == args.ignore_index || target < 0 || target >= n) {
      fill_row(out, n, target == args.ignore_index ? 0.0f : NAN);
      continue;
    }
    const float lse = args.lse[row], scale = args.grad_logps[row];
    // From the logit itself and by expm1: 1 - exp would lose the entry as p nears 1.
    const float at_target = -scale * expm1f(to_float(z[target]) - lse);
    __syncthreads();  // in place: every thread has read the target's logit before one overwrites it
    write_gradient(RowGradient{lse, -scale, at_target, target}, z, out, n);
  }
}

inline unsigned grid_for(const Rows& rows) {
  const int64_t count = rows.sequences * rows.length;
  return static_cast<unsigned>(count < kMaxGrid ? count : kMaxGrid);
}

}  // namespace

// ---- launchers

void token_logps_fwd(const ForwardArgs& args, cudaStream_t stream) {
  const unsigned grid = grid_for(args.rows);
  if (grid == 0) return;
  switch (args.dtype) {
    case DType::kFloat32: token_logps_fwd_kernel<float><<<grid, kThreads, 0, stream>>>(args); break;
    case DType::kBFloat16: token_logps_fwd_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(args); break;
    case DType::kFloat16: token_logps_fwd_kernel<__half><<<grid, kThreads, 0, stream>>>(args); break;
  }
  check(cudaGetLastError(), "token_logps_fwd");
}

void token_logps_bwd(const BackwardArgs& args, cudaStream_t stream) {
  const unsigned grid = grid_for(args.rows);
  if (grid == 0) return;
  switch (args.dtype) {
    case DType::kFloat32: token_logps_bwd_kernel<float><<<grid, kThreads, 0, stream>>>(args); break;
    case DType::kBFloat16: token_logps_bwd_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(args); break;
    case DType::kFloat16: token_logps_bwd_kernel<__half><<<grid, kThreads, 0, stream>>>(args); break;
  }
  check(cudaGetLastError(), "token_logps_bwd");
}

}  // namespace grpo_kernels
