// Runs CUDA kernels on the host: every thread of a block is a fiber, and between two synchronisations they
// run one after the other in an order drawn anew each time. A missing __syncthreads or __syncwarp, a
// divergent collective or a thread that leaves early shows as a wrong result or as an abort, and the
// sanitizers see every access.
//
// Include this before the kernels. Only the built-ins they use are here.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

namespace cuda_on_host {

struct Index {
  unsigned x, y;
};

enum class State { kReady, kAtBlock, kAtWarp, kDone };
enum class Op { kSync, kMatchAny, kBallot, kShuffleUp, kShuffleXor };

struct Fiber {
  ucontext_t context;
  // The address sanitizer marks all of it as good at every switch: small is quick.
  std::vector<char> stack = std::vector<char>(16 * 1024);
  State state = State::kDone;
  Op op = Op::kSync;
  int32_t value = 0;
  int argument = 0;
  int32_t result = 0;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

}  // namespace cuda_on_host

inline cuda_on_host::Index threadIdx, blockIdx, gridDim, blockDim;

namespace cuda_on_host {

class Block {
 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  void run(unsigned num_threads, const std::function<void()>& body, std::mt19937& random) {
    if (num_threads % 32 != 0) fail("blocks must be whole warps");
    while (fibers_.size() < num_threads) fibers_.emplace_back();
    num_threads_ = num_threads;
    body_ = &body;
    blockDim = {num_threads, 1};
    ready_.clear();
    at_block_ = 0;
    at_warp_.assign(num_threads / 32, 0);
    unsigned num_done = 0;
    for (unsigned i = 0; i < num_threads; ++i) {
      Fiber& fiber = fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
      release(i);
    }
    while (!ready_.empty()) {
      std::swap(ready_[random() % ready_.size()], ready_.back());
      current_ = ready_.back();
      ready_.pop_back();
      threadIdx = {current_, 0};
      swapcontext(&scheduler_, &fibers_[current_].context);
      const State state = fibers_[current_].state;
      if (state == State::kDone) ++num_done;
      if (state == State::kAtBlock) arrive_at_block();
      if (state == State::kAtWarp) arrive_at_warp(current_ / 32);
    }
    if (num_done != num_threads) fail("deadlock: threads wait for others that do not come");
  }

  void wait_for_block() { yield(State::kAtBlock); }

  int32_t collective(Op op, int32_t value, int argument) {
    Fiber& fiber = fibers_[current_];
    fiber.op = op;
    fiber.value = value;
    fiber.argument = argument;
    yield(State::kAtWarp);
    return fiber.result;
  }

 private:
  static void enter() {
    Block& block = instance();
    (*block.body_)();
    block.fibers_[block.current_].state = State::kDone;
  }

  void release(unsigned i) {
    fibers_[i].state = State::kReady;
    ready_.push_back(i);
  }

  void yield(State state) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler_);
  }

  void arrive_at_block() {
    if (++at_block_ < num_threads_) return;
    at_block_ = 0;
    for (unsigned i = 0; i < num_threads_; ++i) release(i);
  }

  void arrive_at_warp(unsigned warp) {
    if (++at_warp_[warp] < 32) return;
    at_warp_[warp] = 0;
    Fiber* const lanes = &fibers_[warp * 32];
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane].op != lanes[0].op || lanes[lane].argument != lanes[0].argument)
        fail("divergent collective");
      lanes[lane].result = result_of(lanes, lane);
    }
    for (unsigned lane = 0; lane < 32; ++lane) release(warp * 32 + lane);
  }

  static int32_t result_of(const Fiber* lanes, int lane) {
    const int argument = lanes[lane].argument;
    uint32_t mask = 0;
    switch (lanes[lane].op) {
      case Op::kSync:
        return 0;
      case Op::kMatchAny:
        for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(lanes[i].value == lanes[lane].value) << i;
        return static_cast<int32_t>(mask);
      case Op::kBallot:
        for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(lanes[i].value != 0) << i;
        return static_cast<int32_t>(mask);
      case Op::kShuffleUp:
        return lanes[lane >= argument ? lane - argument : lane].value;
      case Op::kShuffleXor:
        return lanes[lane ^ argument].value;
    }
    fail("unknown collective");
  }

  std::vector<Fiber> fibers_;
  std::vector<unsigned> ready_;
  std::vector<unsigned> at_warp_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  unsigned num_threads_ = 0;
  unsigned current_ = 0;
  unsigned at_block_ = 0;
};

// kernel<<<{grid_x, grid_y}, num_threads>>>: the blocks one after the other, in random order.
inline void launch(unsigned grid_x, unsigned grid_y, unsigned num_threads,
                   const std::function<void()>& kernel, std::mt19937& random) {
  gridDim = {grid_x, grid_y};
  std::vector<Index> blocks;
  for (unsigned y = 0; y < grid_y; ++y) {
    for (unsigned x = 0; x < grid_x; ++x) blocks.push_back({x, y});
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const Index& block : blocks) {
    blockIdx = block;
    Block::instance().run(num_threads, kernel, random);
  }
}

inline int32_t warp_collective(unsigned mask, Op op, int32_t value, int argument) {
  if (mask != 0xffffffffu) fail("only whole warps take part in collectives");
  return Block::instance().collective(op, value, argument);
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::instance().wait_for_block(); }
inline void __syncwarp() { cuda_on_host::warp_collective(~0u, cuda_on_host::Op::kSync, 0, 0); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __match_any_sync(unsigned mask, int value) {
  return static_cast<unsigned>(cuda_on_host::warp_collective(mask, cuda_on_host::Op::kMatchAny, value, 0));
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  return static_cast<unsigned>(cuda_on_host::warp_collective(mask, cuda_on_host::Op::kBallot, value, 0));
}
inline int __shfl_up_sync(unsigned mask, int value, unsigned distance) {
  return cuda_on_host::warp_collective(mask, cuda_on_host::Op::kShuffleUp, value, static_cast<int>(distance));
}
inline int __shfl_xor_sync(unsigned mask, int value, int distance) {
  return cuda_on_host::warp_collective(mask, cuda_on_host::Op::kShuffleXor, value, distance);
}
