// What the emulation found wrong.
#pragma once

#include <stdexcept>
#include <string>

namespace simt::host {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Called by the checks, on the fiber of the thread that is at fault.
[[noreturn]] inline void fail(const std::string& what) { throw Fault(what); }

}  // namespace simt::host
