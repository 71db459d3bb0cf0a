// A block's shared memory, and beside each word a shadow that remembers who touched it last, and when.
//
// A random schedule alone misses races: it would have to run two threads in the one order that goes wrong. The shadow
// needs no luck. Each access is held against the last conflicting ones, and unless a barrier stands between them
// (__syncthreads, __syncwarp inside a warp, barrier.cluster, or a wait for an mbarrier behind an arrival at it), it is
// a race in whatever order they ran. Memory starts poisoned, and so is the target of an asynchronous copy until the
// wait that covers it. Tensor cores and bulk copies reach it by another way than threads (PTX: the asynchronous proxy):
// they see what a thread has published before the barrier, nothing else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "clock.h"
#include "fault.h"

namespace simt::host {

class SharedMemory {
 public:
  // `threads` of the cluster: actors from there on are no threads.
  void reset(std::size_t bytes, int threads) {
    bytes_.assign(bytes, 0xff);
    cells_.assign(bytes / 4, Cell());
    publications_.assign(threads, {});
  }

  void read(uint32_t address, void* out, int bytes, const Clock& clock) {
    check_range(address, bytes);
    for (Cell& cell : cells(address, bytes)) {
      check_arrived(cell);
      if (!clock.knows(cell.writer)) fail("race: read of " + name(cell) + " that " + told(cell.writer));
      note_reader(cell, clock.now(), clock);
    }
    std::memcpy(out, bytes_.data() + address, bytes);
  }

  void write(uint32_t address, const void* value, int bytes, const Clock& clock) {
    claim(address, bytes, clock);
    std::memcpy(bytes_.data() + address, value, bytes);
  }

  // An asynchronous copy starts: from here to `finish_copy` nobody may touch its target.
  void start_copy(uint32_t address, int bytes, const Clock& clock) {
    claim(address, bytes, clock);
    for (Cell& cell : cells(address, bytes)) cell.is_copied_to = true;
    std::memset(bytes_.data() + address, 0xff, bytes);
  }

  // The same of a bulk copy, which is ordered behind the writes that threads have published alone.
  void start_bulk_copy(uint32_t address, int bytes, const Clock& clock) {
    check_range(address, bytes);
    for (Cell& cell : cells(address, bytes)) {
      if (is_thread(cell.writer.actor) && !is_published(cell, clock)) {
        fail("race: a bulk copy to " + name(cell) + ", written without fence.proxy.async before the barrier");
      }
    }
    start_copy(address, bytes, clock);
  }

  // The data arrives, at any moment between the start and the wait.
  void arrive(uint32_t address, const void* value, int bytes) {
    if (value) {
      std::memcpy(bytes_.data() + address, value, bytes);
    } else {
      std::memset(bytes_.data() + address, 0, bytes);
    }
  }

  // The thread that started the copy has waited for it, or an mbarrier has counted it: for others it is as if that
  // actor wrote the data now.
  void finish_copy(uint32_t address, int bytes, const Event& writer) {
    for (Cell& cell : cells(address, bytes)) {
      cell.is_copied_to = false;
      note_writer(cell, writer);
    }
  }

  // fence.proxy.async: what the thread has written so far will be there for a wgmma behind the next barrier.
  void publish(const Clock& clock) { publications_[clock.now().actor].push_back(clock.now().time); }

  // A wgmma reads: `clock` is what all its threads know, and its `readers` are the tensor cores of its warps, which are
  // finished when the threads of a warp learn of that.
  void read_operand(uint32_t address, void* out, int bytes, const Clock& clock, const std::vector<Event>& readers) {
    check_range(address, bytes);
    for (Cell& cell : cells(address, bytes)) {
      check_arrived(cell);
      if (!clock.knows(cell.writer)) fail("race: a wgmma reads " + name(cell) + " that " + told(cell.writer));
      if (is_thread(cell.writer.actor) && !is_published(cell, clock)) {
        fail("race: a wgmma reads " + name(cell) + ", written without fence.proxy.async before the barrier");
      }
      for (const Event& reader : readers) note_reader(cell, reader, clock);
    }
    std::memcpy(out, bytes_.data() + address, bytes);
  }

  // From here on an mbarrier lies there.
  void claim_mbarrier(uint32_t address, const Clock& clock) {
    claim(address, 8, clock);
    for (Cell& cell : cells(address, 8)) cell.is_mbarrier = true;
  }

 private:
  static constexpr int NOBODY = -1;

  struct Cell {
    Event writer{NOBODY, 0};
    std::vector<Event> readers;  // since then, but for those that come before another
    uint32_t publications = 0;   // of the writer, when it wrote
    bool is_copied_to = false, is_mbarrier = false;
  };

  struct Cells {
    Cell* first;
    Cell* last;
    Cell* begin() const { return first; }
    Cell* end() const { return last; }
  };

  Cells cells(uint32_t address, int bytes) {
    return {cells_.data() + address / 4, cells_.data() + (address + bytes + 3) / 4};
  }

  std::string name(const Cell& cell) const { return "shared word " + std::to_string(&cell - cells_.data()); }

  int threads() const { return static_cast<int>(publications_.size()); }
  bool is_thread(int actor) const { return actor >= 0 && actor < threads(); }
  bool is_tensor_cores(int actor) const { return actor >= threads() && actor < threads() + threads() / 32; }

  std::string told(const Event& writer) const {
    return is_thread(writer.actor) ? "another thread wrote without a barrier"
                                   : "a bulk copy wrote without a wait for its mbarrier";
  }

  // Whether a fence.proxy.async of the writer stands between its write and the barrier that the clock has learnt of.
  bool is_published(const Cell& cell, const Clock& clock) const {
    const std::vector<uint32_t>& times = publications_[cell.writer.actor];
    return cell.publications < times.size() && times[cell.publications] <= clock.time(cell.writer.actor);
  }

  void check_range(uint32_t address, int bytes) const {
    if (address % bytes) {
      fail("misaligned shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address));
    }
    const uint32_t last = address + bytes - 1;
    if (last >= bytes_.size()) fail("shared access out of range: byte " + std::to_string(last));
  }

  void check_arrived(const Cell& cell) const {
    if (cell.is_mbarrier) fail("read of " + name(cell) + ", which is an mbarrier");
    if (cell.is_copied_to) fail("race: read of " + name(cell) + " while an asynchronous copy to it is in flight");
    if (cell.writer.actor < 0) fail("read of " + name(cell) + ", which was never written");
  }

  void note_writer(Cell& cell, const Event& writer) {
    cell.writer = writer;
    cell.readers.clear();
    if (is_thread(writer.actor)) cell.publications = static_cast<uint32_t>(publications_[writer.actor].size());
  }

  // Before there are more of them than there is room for, those are dropped that come before this one: what is ordered
  // behind it is behind them too.
  static void note_reader(Cell& cell, const Event& reader, const Clock& clock) {
    std::vector<Event>& readers = cell.readers;
    for (Event& earlier : readers) {
      if (earlier.actor == reader.actor) return void(earlier.time = reader.time);
    }
    if (readers.size() == readers.capacity()) {
      const auto is_known = [&](const Event& earlier) { return clock.knows(earlier); };
      readers.erase(std::remove_if(readers.begin(), readers.end(), is_known), readers.end());
    }
    readers.push_back(reader);
  }

  // A write, or the start of a copy: after every earlier write and read.
  void claim(uint32_t address, int bytes, const Clock& clock) {
    check_range(address, bytes);
    for (Cell& cell : cells(address, bytes)) {
      if (cell.is_mbarrier) fail("write to " + name(cell) + ", which is an mbarrier");
      if (cell.is_copied_to) fail("race: write to " + name(cell) + " while an asynchronous copy to it is in flight");
      if (cell.writer.actor >= 0 && !clock.knows(cell.writer)) {
        fail("race: second write to " + name(cell) + " without a barrier");
      }
      for (const Event& reader : cell.readers) {
        if (clock.knows(reader)) continue;
        fail("race: write to " + name(cell) +
             (is_tensor_cores(reader.actor) ? " while a wgmma reads it" : " that another thread read without a barrier"));
      }
      note_writer(cell, clock.now());
    }
  }

  std::vector<unsigned char> bytes_;
  std::vector<Cell> cells_;
  std::vector<std::vector<uint32_t>> publications_;  // of each thread, the times of its fences
};

}  // namespace simt::host
