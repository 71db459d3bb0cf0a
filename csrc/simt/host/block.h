// Runs a kernel on the host, one block after another, each CUDA thread of a block on a fiber of its own.
//
// A thread runs until it waits; which one goes on is drawn from the seed. Checked on the way: barriers that not all
// threads reach, warp operations that lanes reach differently, threads that end with copies or products in flight,
// every shared access for order (shared_memory.h) and banks (banks.h), every global access for range, alignment and a
// second write (global_memory.h), and the rules of wgmma (warpgroup.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "banks.h"
#include "fault.h"
#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"
#include "thread.h"

namespace simt::host {

constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Grid {
  int x = 1;
  int y = 1;
};

// Executes an operation of a warp or a warpgroup once all its threads have brought their operands.
template <int THREADS>
using Operation = void (*)(void* const (&operands)[THREADS]);

class Block {
 public:
  // Runs all blocks of a grid; throws the first fault, with the place where it happened.
  void run(Grid grid, int threads, int shared_bytes, uint64_t seed, std::function<void()> kernel) {
    if (threads % WARP) fail("blocks are whole warps");
    kernel_ = std::move(kernel);
    random_ = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    by_priority_ = draw(2);
    stacks_.resize(static_cast<std::size_t>(threads) * STACK_BYTES);
    grid_x_ = grid.x;
    for (y_ = 0; y_ < grid.y; y_++) {
      for (x_ = 0; x_ < grid.x; x_++) run_block(threads, shared_bytes);
    }
  }

  Thread& current() { return *current_; }
  int x() const { return x_; }
  int grid_x() const { return grid_x_; }
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
    for (int warp = 0; warp < warps(); warp++) resume(warp);
    yield();
  }

  // Brings this thread's operands to an operation of its whole warp, or warpgroup, and returns when it is done.
  void with_warp(Operation<WARP> operation, void* operands) { together(operation, operands); }
  void with_warpgroup(Operation<WARPGROUP> operation, void* operands) {
    if (threads_.size() % WARPGROUP) fail("wgmma in a block that is not whole warpgroups");
    together(operation, operands);
  }

  Thread& thread(int index) { return threads_[index]; }
  Thread& lane_of(int warp, int lane) { return threads_[warp * WARP + lane]; }
  int warps() const { return static_cast<int>(live_.size()); }

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

  template <int THREADS>
  void together(Operation<THREADS> operation, void* operands) {
    Thread& mine = current();
    const int first = mine.index / THREADS * THREADS;
    const int first_warp = first / WARP, last_warp = first_warp + THREADS / WARP;
    mine.operation = reinterpret_cast<void (*)()>(operation);
    mine.operands = operands;
    arrived_[mine.warp()] |= 1u << mine.lane();
    for (int warp = first_warp; warp < last_warp; warp++) {
      if (live_[warp] != ALL_LANES) fail("warp operation after a lane has ended");
    }
    check_same_operation(mine.warp());
    for (int warp = first_warp; warp < last_warp; warp++) {
      if (arrived_[warp] != ALL_LANES) return wait();
    }
    void* all[THREADS];
    for (int i = 0; i < THREADS; i++) {
      if (threads_[first + i].operation != mine.operation) fail("warps of a warpgroup are at different operations");
      all[i] = threads_[first + i].operands;
    }
    operation(all);
    for (int warp = first_warp; warp < last_warp; warp++) {
      arrived_[warp] = 0;
      resume(warp);
    }
    if (draw(4) == 0) yield();
  }

  // Once all lanes of a warp have come: to one and the same operation.
  void check_same_operation(int warp) {
    if (arrived_[warp] != ALL_LANES) return;
    for (int lane = 1; lane < WARP; lane++) {
      if (lane_of(warp, lane).operation != lane_of(warp, 0).operation) {
        fail("lanes of a warp are at different warp operations");
      }
    }
  }

  // All lanes of a warp stand at the same point, and go on.
  void resume(int warp) {
    count_loads(warp);
    runnable_[warp] = ALL_LANES;
  }

  // Lanes that loaded in step since they last met did so as a warp. Where a branch parted them, nothing is counted.
  void count_loads(int warp) {
    const std::vector<SharedLoad>& first = lane_of(warp, 0).loads;
    bool in_step = true;
    for (int lane = 1; lane < WARP && in_step; lane++) {
      const std::vector<SharedLoad>& other = lane_of(warp, lane).loads;
      in_step = std::equal(first.begin(), first.end(), other.begin(), other.end(),
                           [](const SharedLoad& a, const SharedLoad& b) { return a.bytes == b.bytes; });
    }
    for (std::size_t load = 0; in_step && load < first.size(); load++) {
      uint32_t addresses[WARP];
      for (int lane = 0; lane < WARP; lane++) addresses[lane] = lane_of(warp, lane).loads[load].address;
      // A warp's wide loads are done by halves, 8 bytes, or quarters, 16 bytes.
      const int bytes = first[load].bytes, lanes = 128 / bytes;
      for (int part = 0; part < WARP; part += lanes) count_conflicts(addresses + part, lanes, bytes);
    }
    for (int lane = 0; lane < WARP; lane++) lane_of(warp, lane).loads.clear();
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
    thread.check_finished();
    alive_--;
    const uint32_t lane = 1u << thread.lane();
    runnable_[thread.warp()] &= ~lane;
    live_[thread.warp()] &= ~lane;
    if (waiting_) fail("a thread ends while others wait at __syncthreads");
    if (arrived_[thread.warp()]) fail("a lane ends while others wait for a warp operation");
    if (!live_[thread.warp()]) count_loads(thread.warp());
  }

  void wait() {
    runnable_[current().warp()] &= ~(1u << current().lane());
    yield();
  }

  void yield() { Context::go(current_->context, scheduler_); }

  void shuffle() {
    for (int last = warps() - 1; last > 0; last--) std::swap(order_[last], order_[draw(last + 1)]);
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
  int x_ = 0, y_ = 0, grid_x_ = 0, waiting_ = 0, alive_ = 0;
};

// The block that runs now.
inline Block& block() { return *Block::running(); }

}  // namespace simt::host
