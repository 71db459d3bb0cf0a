// Fibers: one stack for each emulated thread, switched by hand on x86-64 (ucontext, which calls the kernel at every
// switch, costs an order of magnitude more) and by ucontext elsewhere.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt::host {

constexpr std::size_t STACK_BYTES = 64 << 10;

#if defined(__x86_64__)

// Saves the callee-saved registers on the running stack, keeps its pointer in *save, and goes on on another stack.
extern "C" void fastvit_simt_switch(void** save, void* load);
asm(R"(
.text
.weak fastvit_simt_switch
.type fastvit_simt_switch,@function
fastvit_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastvit_simt_switch,.-fastvit_simt_switch
)");

class Context {
 public:
  // The context starts in `entry`, which never returns.
  void start(unsigned char* stack, void (*entry)()) {
    auto top = (reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t{15};
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // the return address of entry: keeps the stack aligned as a call would
    *--slot = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--slot = nullptr;
    pointer_ = slot;
  }
  static void go(Context& from, Context& to) { fastvit_simt_switch(&from.pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void start(unsigned char* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = STACK_BYTES;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void go(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace simt::host
