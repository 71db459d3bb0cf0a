// The processor itself: the same binding over the kernels of ../cpu.
#pragma once

#include "../simt/queue.h"
#include "../views.h"

#define FASTVIT_NAMESPACE fastvit_native
#define FASTVIT_DISPATCH_KEY CPU

namespace fastvit {

// Threads are torch's own (../cpu/threads.h), and every op has ended when it returns.
struct Device {
  explicit Device(int) {}
  void describe(simt::Queue&) const {}
  void reads(const char*, const View&) {}
  void writes(const char*, const View&) {}
  void lends(const char*, void*, std::size_t) {}
  void finish() {}
};

}  // namespace fastvit
