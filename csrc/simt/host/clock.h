// Who acts on shared memory, and what comes before what.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace simt::host {

// Actors are the threads of a cluster, then the tensor cores of each of its warps, which read by themselves, then its
// mbarriers, as which bulk copies write.
struct Event {
  int actor;
  uint32_t time;
};

// A vector clock: up to which time what each actor does comes before what the clock's owner does next. A barrier's
// threads learn from one another.
class Clock {
 public:
  explicit Clock(int owner = -1) : owner_(owner) {
    if (owner >= 0) learn({owner, 1});
  }
  uint32_t time(int actor) const { return actor < static_cast<int>(times_.size()) ? times_[actor] : 0; }
  Event now() const { return {owner_, time(owner_)}; }
  bool knows(const Event& event) const { return event.actor == owner_ || event.time <= time(event.actor); }

  bool knows(const Clock& other) const {
    for (std::size_t actor = 0; actor < other.times_.size(); actor++) {
      if (other.times_[actor] > time(static_cast<int>(actor))) return false;
    }
    return true;
  }

  void learn(const Event& event) {
    reach(event.actor + 1);
    times_[event.actor] = std::max(times_[event.actor], event.time);
  }
  void learn(const Clock& other) {
    reach(static_cast<int>(other.times_.size()));
    for (std::size_t actor = 0; actor < other.times_.size(); actor++) {
      times_[actor] = std::max(times_[actor], other.times_[actor]);
    }
  }
  // What both know.
  void forget(const Clock& other) {
    for (std::size_t actor = 0; actor < times_.size(); actor++) {
      times_[actor] = std::min(times_[actor], other.time(static_cast<int>(actor)));
    }
  }
  // Others have learnt of all so far, and not of what follows.
  void tick() { times_[owner_]++; }

 private:
  void reach(int actors) {
    if (actors > static_cast<int>(times_.size())) times_.resize(actors);
  }
  int owner_;  // -1: nobody
  std::vector<uint32_t> times_;
};

}  // namespace simt::host
