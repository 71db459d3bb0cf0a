// Every global buffer a kernel may touch, with its name, and which launch wrote each byte.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fault.h"

namespace simt::host {

// Inputs are only read. Each byte of an output is written once, and only a launch after that one may read it: blocks of
// one launch run in any order.
class GlobalMemory {
 public:
  void add_input(const char* name, const void* data, std::size_t bytes) { add(name, data, bytes, false); }
  void add_output(const char* name, void* data, std::size_t bytes) { add(name, data, bytes, true); }
  // What one launch leaves for the next: an output that the caller does not see.
  void add_scratch(const char* name, void* data, std::size_t bytes) { add(name, data, bytes, true); }
  void clear() { buffers_.clear(); }

  // What was written before is there to be read from now on.
  void start_launch() { launch_++; }

  void check_read(const void* address, int bytes) {
    const Buffer& buffer = find(address, bytes, "read");
    if (!buffer.is_output) return;
    const std::size_t first = buffer.offset(address);
    for (std::size_t byte = first; byte < first + bytes; byte++) {
      if (buffer.written[byte] == NEVER) fail("read of " + buffer.name_of(byte) + ", which was never written");
      if (buffer.written[byte] == launch_) fail("read of " + buffer.name_of(byte) + " in the launch that writes it");
    }
  }

  void check_write(const void* address, int bytes) {
    Buffer& buffer = find(address, bytes, "write");
    if (!buffer.is_output) fail("write to the input " + buffer.name);
    const std::size_t first = buffer.offset(address);
    for (std::size_t byte = first; byte < first + bytes; byte++) {
      if (buffer.written[byte] != NEVER) fail("second write to " + buffer.name_of(byte));
      buffer.written[byte] = launch_;
    }
  }

  // Outputs and scratch must be complete.
  void check_all_written() const {
    for (const Buffer& buffer : buffers_) {
      for (std::size_t byte = 0; byte < buffer.written.size(); byte++) {
        if (buffer.written[byte] == NEVER) fail(buffer.name_of(byte) + " was never written");
      }
    }
  }

 private:
  static constexpr uint32_t NEVER = 0;

  struct Buffer {
    std::string name;
    const unsigned char* begin;
    const unsigned char* end;
    bool is_output;
    std::vector<uint32_t> written;  // by which launch, for each byte of an output

    std::size_t offset(const void* address) const { return static_cast<const unsigned char*>(address) - begin; }
    std::string name_of(std::size_t byte) const { return "byte " + std::to_string(byte) + " of " + name; }
  };

  void add(const char* name, const void* data, std::size_t bytes, bool is_output) {
    const auto* begin = static_cast<const unsigned char*>(data);
    buffers_.push_back({name, begin, begin + bytes, is_output, std::vector<uint32_t>(is_output ? bytes : 0, NEVER)});
  }

  Buffer& find(const void* address, int bytes, const char* action) {
    const auto* first = static_cast<const unsigned char*>(address);
    if (reinterpret_cast<uintptr_t>(first) % bytes) {
      fail("misaligned " + std::string(action) + " of " + std::to_string(bytes) + " bytes of global memory");
    }
    for (Buffer& buffer : buffers_) {
      if (first >= buffer.begin && first + bytes <= buffer.end) return buffer;
    }
    fail(std::string(action) + " of " + std::to_string(bytes) + " bytes outside every global buffer");
  }

  std::vector<Buffer> buffers_;
  uint32_t launch_ = NEVER + 1;
};

inline GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

}  // namespace simt::host
