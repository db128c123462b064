// Enough of CUDA C++ to run this project's kernels on a CPU, block by block: for tests, as Triton's interpreter is.
//
// The threads of a block are fibers of one thread.  One runs until it waits, at a barrier or in a shuffle, and then the
// next; in which order, changes with every launch, and in half of them some warps are left behind.  So a result that hangs on the order in which threads get to run,
// which on a GPU is anybody's guess, differs here from launch to launch.  Found besides: barriers that not every thread
// of the block reaches, shuffles that not every lane of the warp takes part in, 16-byte accesses that are not aligned.
// Not found: what needs real hardware, such as memory ordering without a barrier, registers, launch limits, streams.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};

struct Dim {
  unsigned x = 0;
};
inline Dim threadIdx, blockIdx, gridDim, blockDim;

// ---- the runtime: one device, no streams, nothing fails

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

// ---- fibers

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10;
enum class State { kReady, kAtBarrier, kInShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  int line = 0;          // where it waits
  bool vote = false;     // what it brought to __syncthreads_or
  unsigned shuffles = 0; // how many it has been through
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<unsigned> order;
  std::mt19937 random;
  bool uneven = false;  // warps are left behind now and then
  std::vector<std::string> errors;
  bool any = false;                             // the answer of __syncthreads_or
  std::vector<uint64_t> exchange;               // two slots a thread, used in turn
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};
inline Block block;
inline unsigned launches = 0;

inline Fiber& self() { return block.fibers[threadIdx.x]; }

inline void wait(State state, int line) {
  const unsigned me = threadIdx.x;
  self().state = state;
  self().line = line;
  swapcontext(&block.fibers[me].context, &block.scheduler);
  threadIdx.x = me;
}

inline void barrier(int line) { wait(State::kAtBarrier, line); }

inline bool barrier_or(bool vote, int line) {
  self().vote = vote;
  wait(State::kAtBarrier, line);
  return block.any;
}

template <class T>
T shuffle_xor(unsigned mask, T value, int offset, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one slot");
  if (mask != 0xffffffffu) throw std::runtime_error("only whole warps are emulated");
  const unsigned me = threadIdx.x, slot = self().shuffles++ % 2;
  memcpy(&block.exchange[2 * me + slot], &value, sizeof(T));
  wait(State::kInShuffle, line);
  const unsigned other = me / kLanes * kLanes + ((me % kLanes) ^ static_cast<unsigned>(offset));
  memcpy(&value, &block.exchange[2 * other + slot], sizeof(T));
  return value;
}

template <class T>
T* aligned(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) throw std::runtime_error("a 16-byte access is not aligned");
  return p;
}

inline void enter() {
  try {
    block.body(block.arguments);
  } catch (const std::exception& error) {
    block.errors.push_back(error.what());
  }
  self().state = State::kDone;
  swapcontext(&self().context, &block.scheduler);
}

// All threads in [first, last) wait in the same way at the same line; a thread that has ended counts as missing.
inline bool together(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (block.fibers[i].state != state || block.fibers[i].line != block.fibers[first].line) return false;
  }
  return true;
}

inline bool release() {
  auto& fibers = block.fibers;
  bool some = false;
  for (size_t first = 0; first < fibers.size(); first += kLanes) {
    if (!together(first, first + kLanes, State::kInShuffle)) continue;
    for (size_t i = first; i < first + kLanes; ++i) fibers[i].state = State::kReady;
    some = true;
  }
  if (some || !together(0, fibers.size(), State::kAtBarrier)) return some;
  block.any = std::any_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.vote; });
  for (Fiber& fiber : fibers) fiber.state = State::kReady, fiber.vote = false;
  return true;
}

inline void run_block() {
  for (Fiber& fiber : block.fibers) {
    fiber.state = State::kReady, fiber.shuffles = 0, fiber.vote = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  uint32_t awake = block.uneven ? block.random() : ~0u;  // one bit a warp, of 1024 threads at most
  for (;;) {
    bool left_behind = false;
    for (unsigned i : block.order) {
      if (block.fibers[i].state != State::kReady) continue;
      if ((awake >> i / kLanes & 1) == 0) {
        left_behind = true;
        continue;
      }
      threadIdx.x = i;
      swapcontext(&block.scheduler, &block.fibers[i].context);
    }
    if (!block.errors.empty()) throw std::runtime_error(block.errors.front());
    if (std::all_of(block.fibers.begin(), block.fibers.end(), [](const Fiber& f) { return f.state == State::kDone; }))
      return;
    const bool on = release();
    if (block.uneven && (!on || block.random() % 16 == 0)) awake = block.random();  // long enough to fall a row behind
    if (!on && !left_behind) {
      std::string lines;
      for (const Fiber& f : block.fibers) {
        const std::string where = f.state == State::kDone ? "the end" : "line " + std::to_string(f.line);
        if (lines.find(where) == std::string::npos) lines += (lines.empty() ? "" : ", ") + where;
      }
      throw std::runtime_error("threads of a block wait at different places: " + lines);
    }
  }
}

template <class Arguments>
void launch(void (*kernel)(Arguments), unsigned grid, unsigned threads, Arguments arguments) {
  struct Call {
    void (*kernel)(Arguments);
    Arguments arguments;
  } call{kernel, arguments};
  block.body = [](void* p) { static_cast<Call*>(p)->kernel(static_cast<Call*>(p)->arguments); };
  block.arguments = &call;
  block.errors.clear();
  if (block.fibers.size() != threads) block.fibers = std::vector<Fiber>(threads);
  block.exchange.assign(2 * threads, 0);
  block.order.resize(threads);
  std::iota(block.order.begin(), block.order.end(), 0u);
  // Forwards, backwards, and then as it comes.
  const unsigned turn = launches++;
  block.random.seed(turn);
  block.uneven = turn % 4 > 1;
  if (turn % 4 == 1) std::reverse(block.order.begin(), block.order.end());
  if (turn % 4 > 1) std::shuffle(block.order.begin(), block.order.end(), block.random);
  gridDim.x = grid, blockDim.x = threads;
  for (unsigned i = 0; i < grid; ++i) {
    blockIdx.x = turn % 2 ? grid - 1 - i : i;
    run_block();
  }
}

}  // namespace emulation

#define __syncthreads() emulation::barrier(__LINE__)
#define __syncthreads_or(vote) emulation::barrier_or(vote, __LINE__)
#define __shfl_xor_sync(mask, value, offset) emulation::shuffle_xor(mask, value, offset, __LINE__)

template <class T>
T __ldcs(const T* p) {
  return *emulation::aligned(p);
}
template <class T>
T __ldca(const T* p) {
  return *emulation::aligned(p);
}
template <class T>
void __stcs(T* p, T value) {
  *emulation::aligned(p) = value;
}
inline float __expf(float x) { return expf(x); }
