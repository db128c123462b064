// The tile operations of the LM head, one block a row.
//
//   z = softcap * tanh(logit_scale * (x + bias) / softcap), or without the cap;   d = 1 - (z / softcap)^2, or 1
//   forward    over v != y:  top' = max(top, max z),  rest' = rest exp(top - top') + sum e,  e = exp(z - top')
//              exps = 2^-shift e d, 0 at y;  picked = z[y] where y is in the tile
//   backward   grads = scale exp(z - top) d,  at_target d at y
//
// Accumulation in float32 by thread, float64 from there.  A row is cut as in token_logps.cu: its elements up to the
// first 16-byte boundary, 16-byte chunks, and the rest.  Forward reads the tile twice, first for the maximum; a row is
// at most 64 KB, and the second reading finds it in cache.  Backward reads it once; both write at most once.

#include "head_tile.h"

#include "common.h"

namespace grpo_kernels {
namespace {

constexpr int kThreads = 256;  // a tile of 1024 float32 words is a chunk a thread
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerSm = 4;  // so that one row is read while another puts its maximum or its sum together
constexpr int64_t kMaxGrid = 0x7fffffff;

template <class T>
inline __device__ float exponential(float x) {
  return __expf(x);  // as in token_logps.cu
}
template <>
inline __device__ float exponential<float>(float x) {
  return expf(x);
}

// ---- helpers

struct Row {
  const float* bias;
  float softcap, inverse_cap, slope;
  int64_t target;  // within the tile, -1 where it is not there
};

inline __device__ Row row_of(const Tile& tile, int64_t row) {
  const int64_t target = tile.targets[row] - tile.start;
  return {tile.bias, tile.softcap, tile.inverse_cap, tile.slope, target >= 0 && target < tile.words ? target : -1};
}

inline __device__ float logit_of(const Row& row, float x, int64_t v) {
  const float z = (row.bias == nullptr ? x : x + row.bias[v]) * row.slope;
  return row.softcap == 0 ? z : row.softcap * tanhf(z);
}

// d: what the cap leaves of a change.
inline __device__ float kept_of(const Row& row, float z) {
  if (row.softcap == 0) return 1;
  const float t = z * row.inverse_cap;
  return 1 - t * t;
}

// As many results as a chunk holds elements, stored at once: they are narrower where the tile is float32.
template <class Out, int kSize>
struct alignas(kSize * sizeof(Out)) Pack {
  Out element[kSize];
};

// Calls `one(v)` for single elements and `chunk(v)` at the first of kSize that lie at a 16-byte boundary, each for one
// thread of the block.
template <class T, class One, class Many>
inline __device__ void along(const T* x, int64_t words, One one, Many chunk) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t head = elements_to_boundary(x, words), chunks = (words - head) / kSize;
  if (threadIdx.x < head) one(static_cast<int64_t>(threadIdx.x));
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads) chunk(head + c * kSize);
  const int64_t v = head + chunks * kSize + threadIdx.x;
  if (v < words) one(v);
}

// Writes value(z, v) for every element of the row.  In place each element is read and written by the same thread.
template <class T, class Out, class Value>
inline __device__ void write_row(const Row& row, const T* x, Out* out, int64_t words, Value value) {
  constexpr int kSize = Chunk<T>::kSize;
  using Packed = Pack<Out, kSize>;
  const int64_t head = elements_to_boundary(x, words);
  const bool whole = reinterpret_cast<uintptr_t>(out + head) % sizeof(Packed) == 0;
  along(
      x, words, [&](int64_t v) { out[v] = from_float<Out>(value(logit_of(row, to_float(x[v]), v), v)); },
      [&](int64_t v) {
        const Chunk<T> chunk = load_kept(x + v);
        Packed packed;
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          packed.element[i] = from_float<Out>(value(logit_of(row, to_float(chunk.element[i]), v + i), v + i));
        if (whole) {
          *reinterpret_cast<Packed*>(out + v) = packed;
        } else {
#pragma unroll
          for (int i = 0; i < kSize; ++i) out[v + i] = packed.element[i];
        }
      });
}

// ---- forward

// The same in every thread.  Between two rows lies the barrier of block_sum, and the other way round, so neither needs
// one of its own before it writes.
inline __device__ float block_max(float x) {
  __shared__ float of_warp[kWarps];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) x = fmaxf(x, of_warp[i]);
  return x;
}

// Thread 0's.
inline __device__ double block_sum(double x) {
  __shared__ double of_warp[kWarps];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += of_warp[i];
  return sum;
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) head_tile_fwd_kernel(TileForwardArgs args) {
  const Tile& tile = args.tile;
  for (int64_t r = blockIdx.x; r < tile.rows; r += gridDim.x) {
    const Row row = row_of(tile, r);
    const T* x = static_cast<const T*>(tile.logits) + r * tile.stride;
    if (threadIdx.x == 0 && row.target >= 0) {
      // In place this is the last chance: block_max has a barrier before anything is written.
      args.picked[r] = logit_of(row, to_float(x[row.target]), row.target);
    }
    // A NaN gets lost in the maximum and comes back in the sum.
    float largest = -INFINITY;
    const auto look = [&](float element, int64_t v) {
      if (v != row.target) largest = fmaxf(largest, logit_of(row, element, v));
    };
    along(
        x, tile.words, [&](int64_t v) { look(to_float(x[v]), v); },
        [&](int64_t v) {
          const Chunk<T> chunk = load_kept(x + v);
#pragma unroll
          for (int i = 0; i < Chunk<T>::kSize; ++i) look(to_float(chunk.element[i]), v + i);
        });
    const float old_top = args.top[r], top = fmaxf(old_top, block_max(largest));

    float sum = 0;
    const auto add = [&](float z, int64_t v) {
      const float e = v == row.target ? 0.0f : exponential<T>(z - top);
      sum += e;
      // The target's d may be NaN.
      return v == row.target ? 0.0f : e * args.exps_scale * kept_of(row, z);
    };
    if (args.exps != nullptr) {
      write_row(row, x, static_cast<Out*>(args.exps) + r * args.exps_stride, tile.words, add);
    } else {
      along(
          x, tile.words, [&](int64_t v) { add(logit_of(row, to_float(x[v]), v), v); },
          [&](int64_t v) {
            const Chunk<T> chunk = load_kept(x + v);
#pragma unroll
            for (int i = 0; i < Chunk<T>::kSize; ++i) add(logit_of(row, to_float(chunk.element[i]), v + i), v + i);
          });
    }
    const double total = block_sum(sum);
    if (threadIdx.x == 0) {
      const float factor = expf(old_top - top);
      args.top[r] = top;
      args.rest[r] = static_cast<float>(static_cast<double>(args.rest[r]) * factor + total);
      args.factor[r] = factor;
    }
  }
}

// ---- backward

template <class T, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) head_tile_bwd_kernel(TileBackwardArgs args) {
  const Tile& tile = args.tile;
  for (int64_t r = blockIdx.x; r < tile.rows; r += gridDim.x) {
    const Row row = row_of(tile, r);
    const float top = args.top[r], scale = args.scale[r], at_target = args.at_target[r];
    const T* x = static_cast<const T*>(tile.logits) + r * tile.stride;
    write_row(row, x, static_cast<Out*>(args.grads) + r * args.grads_stride, tile.words, [&](float z, int64_t v) {
      return (v == row.target ? at_target : scale * exponential<T>(z - top)) * kept_of(row, z);
    });
  }
}

inline unsigned grid_for(const Tile& tile) {
  return tile.words == 0 ? 0u : static_cast<unsigned>(tile.rows < kMaxGrid ? tile.rows : kMaxGrid);
}

inline std::runtime_error no_such_pair() {
  return std::runtime_error("exponentials of 16-bit logits must have their dtype");
}

}  // namespace

// ---- launchers

void head_tile_fwd(const TileForwardArgs& args, cudaStream_t stream) {
  const unsigned grid = grid_for(args.tile);
  if (grid == 0) return;
  const DType in = args.tile.dtype, out = args.tile.out_dtype;
  if (in == DType::kFloat32 && out == DType::kFloat32) {
    head_tile_fwd_kernel<float, float><<<grid, kThreads, 0, stream>>>(args);
  } else if (in == DType::kFloat32 && out == DType::kBFloat16) {
    head_tile_fwd_kernel<float, __nv_bfloat16><<<grid, kThreads, 0, stream>>>(args);
  } else if (in == DType::kFloat32) {
    head_tile_fwd_kernel<float, __half><<<grid, kThreads, 0, stream>>>(args);
  } else if (in != out) {
    throw no_such_pair();
  } else if (in == DType::kBFloat16) {
    head_tile_fwd_kernel<__nv_bfloat16, __nv_bfloat16><<<grid, kThreads, 0, stream>>>(args);
  } else {
    head_tile_fwd_kernel<__half, __half><<<grid, kThreads, 0, stream>>>(args);
  }
  check(cudaGetLastError(), "head_tile_fwd");
}

void head_tile_bwd(const TileBackwardArgs& args, cudaStream_t stream) {
  const unsigned grid = grid_for(args.tile);
  if (grid == 0) return;
  const DType in = args.tile.dtype, out = args.tile.out_dtype;
  if (in == DType::kFloat32 && out == DType::kFloat32) {
    head_tile_bwd_kernel<float, float><<<grid, kThreads, 0, stream>>>(args);
  } else if (in == DType::kFloat32 && out == DType::kBFloat16) {
    head_tile_bwd_kernel<float, __nv_bfloat16><<<grid, kThreads, 0, stream>>>(args);
  } else if (in == DType::kFloat32) {
    head_tile_bwd_kernel<float, __half><<<grid, kThreads, 0, stream>>>(args);
  } else if (in != out) {
    throw no_such_pair();
  } else if (in == DType::kBFloat16) {
    head_tile_bwd_kernel<__nv_bfloat16, __nv_bfloat16><<<grid, kThreads, 0, stream>>>(args);
  } else {
    head_tile_bwd_kernel<__half, __half><<<grid, kThreads, 0, stream>>>(args);
  }
  check(cudaGetLastError(), "head_tile_bwd");
}

}  // namespace grpo_kernels
