// The host in place of a GPU: the same binding over emulated kernels, for tests on a machine without one.
#pragma once

#include "../simt/queue.h"
#include "../views.h"

#if !defined(SIMT_NO_LAUNCH)
#include "../simt/host/global_memory.h"
#endif

#define FASTVIT_NAMESPACE fastvit_host  // a process may have both libraries
#define FASTVIT_DISPATCH_KEY CPU

namespace fastvit {

#if defined(SIMT_NO_LAUNCH)  // nothing is read or written, and nothing is to be measured but the binding

struct Device {
  explicit Device(int) {}
  void describe(simt::Queue&) const {}
  void reads(const char*, const View&) {}
  void writes(const char*, const View&) {}
  void lends(const char*, void*, std::size_t) {}
  void finish() {}
};

#else

class Device {
 public:
  explicit Device(int) { memory().clear(); }
  ~Device() { memory().clear(); }

  void describe(simt::Queue&) const {}

  // Kernels may touch what they are lent, and must write every byte of what they are said to write.
  void reads(const char* name, const View& view) { memory().add_input(name, view.data, view.extent()); }
  void writes(const char* name, const View& view) { memory().add_output(name, view.data, view.extent()); }
  void lends(const char* name, void* data, std::size_t bytes) { memory().add_scratch(name, data, bytes); }
  void finish() { memory().check_all_written(); }

 private:
  static simt::host::GlobalMemory& memory() { return simt::host::global_memory(); }
};

#endif

}  // namespace fastvit
