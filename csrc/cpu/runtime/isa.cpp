// Which instruction set the ops run with, also for Python: fastvit_native::instruction_set() -> str.
#include "../isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../../torch/call.h"

namespace fastvit {
namespace {

#define FASTVIT_NAME(isa, _) #isa,
constexpr const char* NAMES[] = {FASTVIT_EACH_ISA(FASTVIT_NAME, )};
constexpr int LAST = static_cast<int>(std::size(NAMES)) - 1;

// The last one that the processor has: each has all that those before it have.
int best() {
  int found = 0;
#if defined(__x86_64__)
  const auto next_if = [&](bool has) { found += has; };
  __builtin_cpu_init();
  next_if(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));  // and F16C: each that has AVX2 has it
  next_if(found == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"));
  next_if(found == 2 && __builtin_cpu_supports("avx512bf16"));
#endif
  return std::min(found, LAST);
}

int choose() {
  const int most = best();
  const char* wanted = std::getenv("FASTVIT_CPU_ISA");
  if (!wanted || !*wanted) return most;
  std::string here;
  for (int i = 0; i <= most; i++) {
    if (!std::strcmp(wanted, NAMES[i])) return i;
    here += (i ? ", " : "") + std::string(NAMES[i]);
  }
  for (const char* name : NAMES) {
    require(std::strcmp(wanted, name), "FASTVIT_CPU_ISA: this processor has no ", name, "; it has: ", here);
  }
  require(false, "FASTVIT_CPU_ISA: unknown instruction set '", wanted, "'; this processor has: ", here);
  return most;
}

std::string instruction_set_name() { return NAMES[instruction_set()]; }

}  // namespace

int instruction_set() {
  static const int chosen = choose();
  return chosen;
}

}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) { m.def("instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fastvit::Guarded<&fastvit::instruction_set_name>::run));
}
