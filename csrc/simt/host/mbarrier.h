// An mbarrier, emulated: the phases it goes through, and who has learnt what by them.
#pragma once

#include <cstdint>
#include <vector>

#include "clock.h"
#include "fault.h"

namespace simt::host {

// A phase ends when all have arrived and all expected bytes have come. Who has waited for it comes behind those that
// arrived, and behind the copies whose bytes were counted, which it stands for among the actors.
class Mbarrier {
 public:
  Mbarrier(int actor, int arrivals, const Event& init)
      : actor_(actor), arrivals_(arrivals), pending_(arrivals), init_(init) {}

  // fence.mbarrier_init, of the thread that has initialised it.
  void publish(const Event& fence) {
    if (fence.actor == init_.actor && fence_.actor < 0) fence_ = fence;
  }

  // Who uses it must know of its initialisation; other blocks and bulk copies see it behind the fence alone.
  void check_visible(const Clock& clock, bool is_near) const {
    if (!clock.knows(init_)) fail("race: use of an mbarrier that another thread initialised without a barrier");
    if (is_near || (fence_.actor >= 0 && clock.knows(fence_))) return;
    fail("race: use of an mbarrier from outside its block without fence.mbarrier_init before the barrier");
  }

  void expect(int bytes) { bytes_ += bytes; }

  void arrive(Clock& clock) {
    if (pending_ == 0) fail("more arrivals at an mbarrier than it counts");
    gathered_.learn(clock);
    clock.tick();
    pending_--;
    end_phase();
  }

  void start_copy() { copies_++; }

  // As which event the data has been written.
  Event finish_copy(int bytes) {
    const Event written{actor_, phase_ + 1};
    copies_--, bytes_ -= bytes;
    end_phase();
    return written;
  }

  // Whether the phase of this parity has ended, taking it to be the current one or the one before.
  bool has_ended(int parity) const { return static_cast<int>(phase_ & 1) != parity; }
  const Clock& known() const { return known_; }

  void check_finished() const {
    if (bytes_) fail("a block ends while an mbarrier expects bytes, or has had too many");
  }

  std::vector<int> waiters;  // threads

 private:
  void end_phase() {
    if (pending_ || bytes_) return;
    if (copies_) fail("a phase of an mbarrier ends while a bulk copy is in flight: it expects too few bytes");
    phase_++;
    pending_ = arrivals_;
    gathered_.learn(Event{actor_, phase_});
    known_ = gathered_;
  }

  int actor_, arrivals_, pending_;
  int64_t bytes_ = 0;  // expected, less those that have come
  int copies_ = 0;     // in flight
  uint32_t phase_ = 0;
  Event init_, fence_{-1, 0};
  Clock gathered_, known_;
};

}  // namespace simt::host
