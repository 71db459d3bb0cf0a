// Runs a kernel on the host, one block after another, each CUDA thread of a block on a fiber of its own.
//
// A thread runs until it waits; which one goes on is drawn from the seed. Checked on the way: barriers that not all
// threads reach, warp operations that lanes reach differently, threads that end with copies in flight, every shared
// access for order (shared_memory.h), every global access for range, alignment and a second write (global_memory.h).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "fault.h"
#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"

namespace simt::host {

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Grid {
  int x = 1;
  int y = 1;
};

// One cp.async of one thread.
struct Copy {
  uint32_t target;
  const void* source;  // null where zeros are to arrive
  int bytes;
  bool arrived;
};

// Executes a warp operation once all lanes have brought their operands.
using WarpOperation = void (*)(void* const (&operands)[WARP]);

struct Thread {
  Context context;
  int index = 0;
  bool ended = false;
  uint32_t block_epoch = 0;
  uint32_t warp_epoch = 0;
  std::vector<Copy> open;                  // started, not yet committed
  std::deque<std::vector<Copy>> groups;    // committed, not yet waited for
  WarpOperation operation = nullptr;       // what it waits to do with its warp
  void* operands = nullptr;

  Actor actor() const { return {index, block_epoch, warp_epoch}; }
  int warp() const { return index / WARP; }
  int lane() const { return index % WARP; }
};

class Block {
 public:
  // Runs all blocks of a grid; throws the first fault, with the place where it happened.
  void run(Grid grid, int threads, int shared_bytes, uint64_t seed, std::function<void()> kernel) {
    if (threads % WARP) fail("blocks are whole warps");
    kernel_ = std::move(kernel);
    random_ = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    by_priority_ = draw(2);
    stacks_.resize(static_cast<std::size_t>(threads) * STACK_BYTES);
    for (y_ = 0; y_ < grid.y; y_++) {
      for (x_ = 0; x_ < grid.x; x_++) run_block(threads, shared_bytes);
    }
  }

  Thread& current() { return *current_; }
  int x() const { return x_; }
  int y() const { return y_; }
  SharedMemory& shared() { return shared_; }
  uint64_t draw(uint64_t below) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ % below;
  }

  void sync_threads() {
    if (alive_ != static_cast<int>(threads_.size())) fail("__syncthreads after a thread has ended");
    if (++waiting_ < alive_) return wait();
    waiting_ = 0;
    for (Thread& thread : threads_) thread.block_epoch++;
    for (uint32_t& lanes : runnable_) lanes = ALL_LANES;
    yield();
  }

  // Brings this lane's operands to an operation of the whole warp, and returns when it is done.
  void with_warp(WarpOperation operation, void* operands) {
    Thread& thread = current();
    const int warp = thread.warp();
    if (live_[warp] != ALL_LANES) fail("warp operation after a lane has ended");
    thread.operation = operation;
    thread.operands = operands;
    arrived_[warp] |= 1u << thread.lane();
    if (arrived_[warp] != ALL_LANES) return wait();
    void* all[WARP];
    for (int lane = 0; lane < WARP; lane++) {
      const Thread& other = lane_of(warp, lane);
      if (other.operation != operation) fail("lanes of a warp are at different warp operations");
      all[lane] = other.operands;
    }
    operation(all);
    arrived_[warp] = 0;
    runnable_[warp] = ALL_LANES;
    if (draw(4) == 0) yield();
  }

  Thread& lane_of(int warp, int lane) { return threads_[warp * WARP + lane]; }

 private:
  void run_block(int threads, int shared_bytes) {
    shared_.reset(shared_bytes);
    threads_.clear();
    threads_.resize(threads);
    const int warps = threads / WARP;
    live_.assign(warps, ALL_LANES);
    runnable_ = live_;
    arrived_.assign(warps, 0);
    order_.resize(warps);
    for (int warp = 0; warp < warps; warp++) order_[warp] = warp;
    waiting_ = 0;
    alive_ = threads;
    fault_.clear();
    for (int index = 0; index < threads; index++) {
      threads_[index].index = index;
      threads_[index].context.start(stacks_.data() + static_cast<std::size_t>(index) * STACK_BYTES, &Block::enter);
    }
    running() = this;
    shuffle();
    while (fault_.empty()) {
      current_ = next();
      if (!current_) break;
      Context::go(scheduler_, current_->context);
    }
    const std::string place = " (block " + std::to_string(x_) + ", " + std::to_string(y_);
    if (!fault_.empty()) fail(fault_ + place + ", thread " + std::to_string(current_->index) + ")");
    if (alive_) fail("deadlock: " + std::to_string(alive_) + " threads wait for ever" + place + ")");
  }

  // Where every fiber starts. A fault ends the block: the other fibers are left where they are.
  static void enter() {
    Block& block = *running();
    try {
      block.kernel_();
      block.leave();
    } catch (const Fault& fault) {
      block.fault_ = fault.what();
    }
    block.yield();
    std::abort();  // an ended thread is never run again
  }

  void leave() {
    Thread& thread = current();
    if (!thread.open.empty()) fail("a thread ends with copies that were not committed");
    for (const auto& group : thread.groups) {
      if (!group.empty()) fail("a thread ends with copies in flight");
    }
    thread.ended = true;
    alive_--;
    const uint32_t lane = 1u << thread.lane();
    runnable_[thread.warp()] &= ~lane;
    live_[thread.warp()] &= ~lane;
    if (waiting_) fail("a thread ends while others wait at __syncthreads");
    if (arrived_[thread.warp()]) fail("a lane ends while others wait for a warp operation");
  }

  void wait() {
    runnable_[current().warp()] &= ~(1u << current().lane());
    yield();
  }

  void yield() { Context::go(current_->context, scheduler_); }

  void shuffle() {
    for (int last = static_cast<int>(order_.size()) - 1; last > 0; last--) std::swap(order_[last], order_[draw(last + 1)]);
  }

  // A runnable thread: of the first runnable warp in an order that seldom changes, so that warps run far ahead of one
  // another, or of any warp, by the seed.
  Thread* next() {
    if (draw(by_priority_ ? 4096 : 1) == 0) shuffle();
    for (int warp : order_) {
      const uint32_t lanes = runnable_[warp];
      if (!lanes) continue;
      const int first = static_cast<int>(draw(WARP));
      for (int step = 0; step < WARP; step++) {
        const int lane = (first + step) % WARP;
        if (lanes >> lane & 1) return &lane_of(warp, lane);
      }
    }
    return nullptr;
  }

  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }
  friend Block& block();

  std::function<void()> kernel_;
  std::vector<unsigned char> stacks_;
  std::vector<Thread> threads_;
  std::vector<uint32_t> live_, runnable_, arrived_;  // a bit for each lane, a word for each warp
  std::vector<int> order_;
  SharedMemory shared_;
  Context scheduler_;
  Thread* current_ = nullptr;
  std::string fault_;
  uint64_t random_ = 1;
  bool by_priority_ = true;
  int x_ = 0, y_ = 0, waiting_ = 0, alive_ = 0;
};

// The block that runs now.
inline Block& block() { return *Block::running(); }

}  // namespace simt::host
