// A block's shared memory, and beside each word a shadow that remembers who touched it last, and when.
//
// A random schedule alone misses races: it would have to run two threads in the one order that goes wrong. The shadow
// needs no luck. Each access is held against the last conflicting one, and unless a barrier stands between the two
// (__syncthreads, or __syncwarp inside a warp), it is a race in whatever order they ran. Memory starts poisoned, and
// so is the target of an asynchronous copy until the wait that covers it. A wgmma reads by another way than threads
// write (PTX: the asynchronous proxy): it sees what a thread has published before the barrier, nothing else.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "fault.h"

namespace simt::host {

// Who acts, and how many barriers of its block and of its warp it has passed.
struct Actor {
  int thread;
  uint32_t block_epoch;
  uint32_t warp_epoch;
  int warp() const { return thread / 32; }
};

class SharedMemory {
 public:
  void reset(std::size_t bytes) {
    bytes_.assign(bytes, 0xff);
    cells_.assign(bytes / 4, Cell());
    publications_.clear();
  }

  void read(uint32_t address, void* out, int bytes, const Actor& actor) {
    check_range(address, bytes);
    for (Cell& cell : cells(address, bytes)) {
      check_arrived(cell);
      if (!is_ordered(cell.writer, actor)) {
        fail("race: read of " + name(cell) + " that another thread wrote without a barrier");
      }
      note_reader(cell, actor);
    }
    std::memcpy(out, bytes_.data() + address, bytes);
  }

  void write(uint32_t address, const void* value, int bytes, const Actor& actor) {
    claim(address, bytes, actor);
    std::memcpy(bytes_.data() + address, value, bytes);
  }

  // An asynchronous copy starts: from here to `finish_copy` nobody may touch its target.
  void start_copy(uint32_t address, int bytes, const Actor& actor) {
    claim(address, bytes, actor);
    for (Cell& cell : cells(address, bytes)) cell.copier = actor.thread;
    std::memset(bytes_.data() + address, 0xff, bytes);
  }

  // The data arrives, at any moment between the start and the wait.
  void arrive(uint32_t address, const void* value, int bytes) {
    if (value) {
      std::memcpy(bytes_.data() + address, value, bytes);
    } else {
      std::memset(bytes_.data() + address, 0, bytes);
    }
  }

  // The thread that started the copy has waited for it: for others it is as if that thread wrote the data now.
  void finish_copy(uint32_t address, int bytes, const Actor& actor) {
    for (Cell& cell : cells(address, bytes)) {
      cell.copier = NOBODY;
      note_writer(cell, actor);
    }
  }

  // fence.proxy.async: what the thread has written so far will be there for a wgmma behind the next barrier.
  void publish(const Actor& actor) { publications(actor.thread).push_back(actor.block_epoch); }

  // A wgmma of the actor's warpgroup reads from here to `release_operand`, and nobody may write.
  void read_operand(uint32_t address, void* out, int bytes, const Actor& actor) {
    check_range(address, bytes);
    for (Cell& cell : cells(address, bytes)) {
      check_arrived(cell);
      if (cell.writer.block_epoch == actor.block_epoch) {
        fail("race: a wgmma reads " + name(cell) + ", written without a barrier");
      }
      const std::vector<uint32_t>& epochs = publications(cell.writer.thread);
      if (cell.publications == epochs.size() || epochs[cell.publications] == actor.block_epoch) {
        fail("race: a wgmma reads " + name(cell) + ", written without fence.proxy.async before the barrier");
      }
      cell.products++;
    }
    std::memcpy(out, bytes_.data() + address, bytes);
  }

  // The last thread of a warpgroup has waited for the wgmma.
  void release_operand(uint32_t address, int bytes, const Actor& actor) {
    for (Cell& cell : cells(address, bytes)) {
      cell.products--;
      cell.reader = {SEVERAL, actor.block_epoch, actor.warp_epoch};
      cell.reader_warp = SEVERAL;
    }
  }

 private:
  static constexpr int NOBODY = -1, SEVERAL = -2;

  struct Cell {
    Actor writer{NOBODY, 0, 0};
    Actor reader{NOBODY, 0, 0};  // the thread is SEVERAL where more than one read since the last barrier
    int reader_warp = NOBODY;
    int copier = NOBODY;
    uint32_t publications = 0;  // of the writer, when it wrote
    int products = 0;           // wgmmas that read it now
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

  // For each fence.proxy.async of a thread the barriers of the block that it had passed.
  std::vector<uint32_t>& publications(int thread) {
    if (thread >= static_cast<int>(publications_.size())) publications_.resize(thread + 1);
    return publications_[thread];
  }

  static bool is_ordered(const Actor& before, const Actor& after) {
    return before.thread == after.thread || before.block_epoch < after.block_epoch ||
           (before.warp() == after.warp() && before.warp_epoch < after.warp_epoch);
  }

  void check_range(uint32_t address, int bytes) const {
    if (address % bytes) {
      fail("misaligned shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address));
    }
    const uint32_t last = address + bytes - 1;
    if (last >= bytes_.size()) fail("shared access out of range: byte " + std::to_string(last));
  }

  void check_arrived(const Cell& cell) const {
    if (cell.copier >= 0) fail("race: read of " + name(cell) + " while an asynchronous copy to it is in flight");
    if (cell.writer.thread < 0) fail("read of " + name(cell) + ", which was never written");
  }

  void note_writer(Cell& cell, const Actor& actor) {
    cell.writer = actor;
    cell.publications = static_cast<uint32_t>(publications(actor.thread).size());
  }

  void note_reader(Cell& cell, const Actor& actor) {
    const bool is_first = cell.reader.thread == NOBODY || cell.reader.block_epoch != actor.block_epoch;
    if (is_first) {
      cell.reader = actor;
      cell.reader_warp = actor.warp();
      return;
    }
    if (cell.reader.thread != actor.thread) cell.reader.thread = SEVERAL;
    if (cell.reader_warp != actor.warp()) cell.reader_warp = SEVERAL;
    cell.reader.warp_epoch = actor.warp_epoch;
  }

  // A write, or the start of a copy: after every earlier write and read.
  void claim(uint32_t address, int bytes, const Actor& actor) {
    check_range(address, bytes);
    for (Cell& cell : cells(address, bytes)) {
      if (cell.copier >= 0) fail("race: write to " + name(cell) + " while an asynchronous copy to it is in flight");
      if (cell.products) fail("race: write to " + name(cell) + " while a wgmma reads it");
      if (cell.writer.thread >= 0 && !is_ordered(cell.writer, actor)) {
        fail("race: second write to " + name(cell) + " without a barrier");
      }
      const bool was_read_since = cell.reader.thread != NOBODY && cell.reader.block_epoch == actor.block_epoch;
      const bool in_warp = cell.reader_warp == actor.warp() && cell.reader.warp_epoch < actor.warp_epoch;
      if (was_read_since && cell.reader.thread != actor.thread && !in_warp) {
        fail("race: write to " + name(cell) + " that another thread read without a barrier");
      }
      note_writer(cell, actor);
    }
  }

  std::vector<unsigned char> bytes_;
  std::vector<Cell> cells_;
  std::vector<std::vector<uint32_t>> publications_;
};

}  // namespace simt::host
