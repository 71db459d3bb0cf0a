// One source, several instruction sets: an op's file is compiled once for each, in a namespace of its own, and the best
// that the processor has is chosen when the library is first used.
//
// A file of this folder is compiled with FASTVIT_ISA, the name of the set, and its flags (tools/build_native.py); all
// that it defines is in the namespace fastvit::FASTVIT_ISA, or anonymous. What it calls of the standard library must be
// inlined: of an inline function that is not, the linker takes one copy for all, perhaps of instructions that the
// processor lacks. Files of runtime/ are compiled once, for every processor.
#pragma once

#if defined(FASTVIT_EACH_ISA)  // by the build: of one set alone, for tests
#elif defined(__x86_64__)
#define FASTVIT_EACH_ISA(use, op) use(portable, op) use(avx2, op) use(avx512, op) use(avx512bf16, op)
#else  // aarch64, whose baseline has NEON, and others
#define FASTVIT_EACH_ISA(use, op) use(portable, op)
#endif

namespace fastvit {

// Which of FASTVIT_EACH_ISA: the best that the processor has, or that of the variable FASTVIT_CPU_ISA, read once.
//
// Throws std::runtime_error: the variable names no set of this library, or one that the processor lacks.
int instruction_set();

}  // namespace fastvit

// Defines an op of ops.h by those of all instruction sets. It stands behind the op's own definition:
//
//     FASTVIT_CHOOSE(add_position_backward, (const View& grad, const View& d_rows, const Queue& queue),
//                    (grad, d_rows, queue))
#if defined(FASTVIT_ISA_IS_FIRST)
#define FASTVIT_CHOOSE(op, parameters, arguments)                                                    \
  namespace fastvit {                                                                                \
  FASTVIT_EACH_ISA(FASTVIT_DECLARE_OP, op)                                                           \
  void op parameters {                                                                               \
    static decltype(&fastvit::op) const of_each[] = {FASTVIT_EACH_ISA(FASTVIT_NAME_OP, op)};         \
    of_each[instruction_set()] arguments;                                                            \
  }                                                                                                  \
  }
#define FASTVIT_DECLARE_OP(isa, op) \
  namespace isa {                   \
  decltype(fastvit::op) op;         \
  }
#define FASTVIT_NAME_OP(isa, op) isa::op,
#else
#define FASTVIT_CHOOSE(op, parameters, arguments)
#endif
