// Runs a kernel on the host, one cluster after another, each CUDA thread of its blocks on a fiber of its own. Where a
// launch asks for no clusters, each block is one.
//
// A thread runs until it waits; which one goes on is drawn from the seed. Checked on the way: barriers that not all
// threads reach, warp operations that lanes reach differently, threads that end with copies or products in flight,
// blocks that end while another still reaches into them, every shared access for order (shared_memory.h) and banks
// (banks.h), every global access for range, alignment and a second write (global_memory.h), the rules of wgmma
// (warpgroup.h) and of mbarriers (mbarrier.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "banks.h"
#include "fault.h"
#include "fiber.h"
#include "global_memory.h"
#include "mbarrier.h"
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

// One block's share of a bulk copy.
struct BulkCopy {
  int rank, issuer;  // blocks of the cluster
  uint32_t target, mbarrier;
  const unsigned char* source;
  int bytes;
};

class Cluster {
 public:
  // Runs all clusters of a grid; throws the first fault, with the place where it happened.
  void run(Grid grid, int blocks, int threads, int shared_bytes, uint64_t seed, std::function<void()> kernel) {
    if (threads % WARP) fail("blocks are whole warps");
    if (grid.x % blocks) fail("the grid is not whole clusters");
    kernel_ = std::move(kernel);
    random_ = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    by_priority_ = draw(2);
    block_threads_ = threads;
    blocks_.resize(blocks);
    stacks_.resize(static_cast<std::size_t>(blocks) * threads * STACK_BYTES);
    grid_x_ = grid.x;
    for (y_ = 0; y_ < grid.y; y_++) {
      for (first_x_ = 0; first_x_ < grid.x; first_x_ += blocks) run_cluster(shared_bytes);
    }
  }

  Thread& current() { return *current_; }
  int size() const { return static_cast<int>(blocks_.size()); }
  int rank() const { return current_->index / block_threads_; }
  int thread_index() const { return current_->index % block_threads_; }
  int x() const { return first_x_ + rank(); }
  int grid_x() const { return grid_x_; }
  int y() const { return y_; }
  SharedMemory& shared() { return blocks_[rank()].shared; }
  uint64_t draw(uint64_t below) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ % below;
  }

  void sync_threads() {
    Block& block = blocks_[rank()];
    if (block.alive != block_threads_) fail("__syncthreads after a thread has ended");
    meet(block.waiting, rank() * block_threads_, block_threads_);
  }
  void sync_cluster() {
    for (const Block& block : blocks_) {
      if (block.alive != block_threads_) fail("barrier.cluster after a thread has ended");
    }
    meet(waiting_, 0, static_cast<int>(threads_.size()));
  }

  // What any of the threads has done comes before what any does from now on.
  void synchronise(int first, int count) {
    Clock all = threads_[first].clock;
    for (int index = first + 1; index < first + count; index++) all.learn(threads_[index].clock);
    for (int index = first; index < first + count; index++) {
      threads_[index].clock.learn(all);
      threads_[index].clock.tick();
    }
  }

  // Brings this thread's operands to an operation of its whole warp, or warpgroup, and returns when it is done.
  void with_warp(Operation<WARP> operation, void* operands) { together(operation, operands); }
  void with_warpgroup(Operation<WARPGROUP> operation, void* operands) {
    if (block_threads_ % WARPGROUP) fail("wgmma in a block that is not whole warpgroups");
    together(operation, operands);
  }

  Thread& thread(int index) { return threads_[index]; }
  Thread& lane_of(int warp, int lane) { return threads_[warp * WARP + lane]; }
  int warps() const { return static_cast<int>(live_.size()); }

  // A warp's tensor cores start a product.
  Event next_product(int warp) { return {static_cast<int>(threads_.size()) + warp, ++products_[warp]}; }

  void start_mbarrier(uint32_t address, int arrivals) {
    shared().claim_mbarrier(address, current().clock);
    const int actor = static_cast<int>(threads_.size() + live_.size() + mbarriers_.size());
    mbarriers_.emplace(std::pair(rank(), address), Mbarrier(actor, arrivals, current().clock.now()));
  }
  void publish_mbarriers() {
    for (auto& [place, mbarrier] : mbarriers_) mbarrier.publish(current().clock.now());
  }

  // The mbarrier at an address of a block, for the current thread.
  Mbarrier& mbarrier(int rank, uint32_t address, bool is_near) {
    check_alive(rank);
    const auto found = mbarriers_.find({rank, address});
    if (found == mbarriers_.end()) fail("use of an mbarrier that was not initialised");
    found->second.check_visible(current().clock, is_near);
    return found->second;
  }

  void arrive(int rank, uint32_t address) {
    Mbarrier& there = mbarrier(rank, address, rank == this->rank());
    blocks_[rank].owed.learn(current().clock.now());
    there.arrive(current().clock);
    wake(there.waiters);
  }
  void expect(uint32_t address, int bytes) {
    mbarrier(rank(), address, true).expect(bytes);
    arrive(rank(), address);
  }
  void wait_for(uint32_t address, int parity) {
    Mbarrier& here = mbarrier(rank(), address, true);
    while (!here.has_ended(parity)) {
      here.waiters.push_back(current().index);
      wait();
    }
    current().clock.learn(here.known());
  }

  // A thread's registers, of those that the launch gave: to the block's pool, or from it once it has enough.
  void release_registers(int count) {
    Block& block = blocks_[rank()];
    if (count > current().registers) fail("registers released that a thread does not have");
    block.registers += std::exchange(current().registers, count) - count;
    wake(block.waiters);
  }
  void request_registers(int count) {
    Block& block = blocks_[rank()];
    const int more = count - current().registers;
    if (more < 0) fail("registers requested that a thread has");
    while (block.registers < more) {
      block.waiters.push_back(current().index);
      wait();
    }
    block.registers -= more, current().registers = count;
  }

  void start_bulk_copy(const BulkCopy& copy) {
    mbarrier(copy.rank, copy.mbarrier, false).start_copy();
    for (int byte = 0; byte < copy.bytes; byte += 16) {
      blocks_[copy.rank].shared.start_bulk_copy(copy.target + byte, 16, current().clock);
    }
    bulk_copies_.push_back(copy);
  }

 private:
  struct Block {
    SharedMemory shared;
    int waiting = 0, alive = 0;
    Clock owed;   // what reaches into the block, or goes out from it
    Clock ended;  // what its ended threads knew
    int registers = 0;         // that nobody has
    std::vector<int> waiters;  // threads, for registers
  };

  void run_cluster(int shared_bytes) {
    const int warps = static_cast<int>(blocks_.size()) * block_threads_ / WARP;
    for (Block& block : blocks_) {
      block.shared.reset(shared_bytes, warps * WARP);
      block.waiting = 0, block.alive = block_threads_;
      block.owed = block.ended = Clock();
      block.registers = 0, block.waiters.clear();
    }
    threads_.clear();
    threads_.resize(warps * WARP);
    live_.assign(warps, ALL_LANES);
    runnable_ = live_;
    arrived_.assign(warps, 0);
    products_.assign(warps, 0);
    order_.resize(warps);
    for (int warp = 0; warp < warps; warp++) order_[warp] = warp;
    mbarriers_.clear();
    bulk_copies_.clear();
    waiting_ = 0;
    fault_.clear();
    for (int index = 0; index < warps * WARP; index++) {
      threads_[index].index = index;
      threads_[index].registers = REGISTERS / block_threads_ / 8 * 8;
      threads_[index].clock = Clock(index);
      threads_[index].context.start(stacks_.data() + static_cast<std::size_t>(index) * STACK_BYTES, &Cluster::enter);
    }
    running() = this;
    current_ = &threads_[0];
    shuffle();
    while (fault_.empty() && go_on()) {
    }
    const std::string place = " (block " + std::to_string(x()) + ", " + std::to_string(y_);
    if (!fault_.empty()) fail(fault_ + place + ", thread " + std::to_string(thread_index()) + ")");
    int alive = 0;
    for (const Block& block : blocks_) alive += block.alive;
    if (alive) fail("deadlock: " + std::to_string(alive) + " threads wait for ever" + place + ")");
  }

  // Runs a thread until it waits, or lets a bulk copy arrive: at any time, by the seed. False: nothing is left.
  bool go_on() {
    Thread* thread = bulk_copies_.empty() || draw(16) ? next() : nullptr;
    if (!thread && bulk_copies_.empty()) return false;
    if (!thread) return finish_bulk_copy(static_cast<int>(draw(bulk_copies_.size())));
    current_ = thread;
    Context::go(scheduler_, current_->context);
    return true;
  }

  bool finish_bulk_copy(int which) {
    const BulkCopy copy = bulk_copies_[which];
    bulk_copies_.erase(bulk_copies_.begin() + which);
    Mbarrier& mbarrier = mbarriers_.at({copy.rank, copy.mbarrier});
    try {
      const Event written = mbarrier.finish_copy(copy.bytes);
      blocks_[copy.rank].shared.arrive(copy.target, copy.source, copy.bytes);
      blocks_[copy.rank].shared.finish_copy(copy.target, copy.bytes, written);
      blocks_[copy.rank].owed.learn(written);
      blocks_[copy.issuer].owed.learn(written);
    } catch (const Fault& fault) {
      fault_ = fault.what();
    }
    wake(mbarrier.waiters);
    return true;
  }

  void check_alive(int rank) const {
    if (!blocks_[rank].alive) fail("use of the shared memory of a block that has ended");
  }

  void wake(std::vector<int>& waiters) {
    for (int index : waiters) runnable_[index / WARP] |= 1u << index % WARP;
    waiters.clear();
  }

  // A barrier of so many threads from the first on.
  void meet(int& waiting, int first, int count) {
    if (++waiting < count) return wait();
    waiting = 0;
    synchronise(first, count);
    for (int warp = first / WARP; warp < (first + count) / WARP; warp++) resume(warp);
    yield();
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
    Cluster& cluster = *running();
    try {
      cluster.kernel_();
      cluster.leave();
    } catch (const Fault& fault) {
      cluster.fault_ = fault.what();
    }
    cluster.yield();
    std::abort();  // an ended thread is never run again
  }

  void leave() {
    Thread& thread = current();
    thread.check_finished();
    Block& block = blocks_[rank()];
    const uint32_t lane = 1u << thread.lane();
    runnable_[thread.warp()] &= ~lane;
    live_[thread.warp()] &= ~lane;
    if (block.waiting) fail("a thread ends while others wait at __syncthreads");
    if (waiting_) fail("a thread ends while others wait at barrier.cluster");
    if (arrived_[thread.warp()]) fail("a lane ends while others wait for a warp operation");
    if (!live_[thread.warp()]) count_loads(thread.warp());
    block.ended.learn(thread.clock);
    if (--block.alive == 0) check_ended(block);
  }

  // All that reaches into a block, and all that it has sent, must have come before its end.
  void check_ended(const Block& block) const {
    for (const auto& [place, mbarrier] : mbarriers_) {
      if (place.first == rank()) mbarrier.check_finished();
    }
    for (const BulkCopy& copy : bulk_copies_) {
      if (copy.rank == rank() || copy.issuer == rank()) fail("a block ends with a bulk copy in flight");
    }
    if (!block.ended.knows(block.owed)) {
      fail("a block ends while its cluster reaches into it, or has not had all that it sent");
    }
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

  static Cluster*& running() {
    static Cluster* cluster = nullptr;
    return cluster;
  }
  friend Cluster& cluster();

  std::function<void()> kernel_;
  std::vector<unsigned char> stacks_;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<uint32_t> live_, runnable_, arrived_;  // a bit for each lane, a word for each warp
  std::vector<uint32_t> products_;                   // of each warp
  std::vector<int> order_;
  std::map<std::pair<int, uint32_t>, Mbarrier> mbarriers_;  // by the block's rank and the address in it
  std::vector<BulkCopy> bulk_copies_;                       // in flight
  Context scheduler_;
  Thread* current_ = nullptr;
  std::string fault_;
  uint64_t random_ = 1;
  bool by_priority_ = true;
  int block_threads_ = 0, first_x_ = 0, y_ = 0, grid_x_ = 0;
  int waiting_ = 0;  // at barrier.cluster
};

// The cluster that runs now.
inline Cluster& cluster() { return *Cluster::running(); }

}  // namespace simt::host
