// Every global buffer a kernel may touch, with its name, and how often each byte of an output was written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fault.h"

namespace simt::host {

class GlobalMemory {
 public:
  void add_input(const char* name, const void* data, std::size_t bytes) { add(name, data, bytes, false); }
  // Every byte of an output is written once, by one thread.
  void add_output(const char* name, void* data, std::size_t bytes) { add(name, data, bytes, true); }
  void clear() { buffers_.clear(); }

  void check_read(const void* address, int bytes) { find(address, bytes, "read"); }

  void check_write(const void* address, int bytes) {
    Buffer& buffer = find(address, bytes, "write");
    if (!buffer.is_output) fail("write to the input " + buffer.name);
    const std::size_t first = static_cast<const unsigned char*>(address) - buffer.begin;
    for (int byte = 0; byte < bytes; byte++) {
      if (buffer.written[first + byte]) fail("second write to byte " + std::to_string(first + byte) + " of " + buffer.name);
      buffer.written[first + byte] = true;
    }
  }

  // The outputs must be complete.
  void check_all_written() const {
    for (const Buffer& buffer : buffers_) {
      if (!buffer.is_output) continue;
      for (std::size_t byte = 0; byte < buffer.written.size(); byte++) {
        if (!buffer.written[byte]) fail("byte " + std::to_string(byte) + " of " + buffer.name + " was never written");
      }
    }
  }

 private:
  struct Buffer {
    std::string name;
    const unsigned char* begin;
    const unsigned char* end;
    bool is_output;
    std::vector<bool> written;
  };

  void add(const char* name, const void* data, std::size_t bytes, bool is_output) {
    const auto* begin = static_cast<const unsigned char*>(data);
    buffers_.push_back({name, begin, begin + bytes, is_output, std::vector<bool>(is_output ? bytes : 0)});
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
};

inline GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

}  // namespace simt::host
