// From an element type known at run time to one that a template takes.
#pragma once

#include <stdexcept>

#include "numeric.h"

namespace fastvit {

// Calls `use` with a value of the C++ type.
//
// Throws std::invalid_argument: not a type that is computed with, or one that this build leaves out.
template <class Use>
void with_type(Type type, Use use) {
  switch (type) {
    case Type::FLOAT32: return use(float{});
    case Type::BFLOAT16: return use(bfloat16{});
#if defined(FASTVIT_FEW_TYPES)  // builds for a test of one kernel, which compile in half the time
    default: throw std::invalid_argument("type: this build has float32 and bfloat16");
#else
    case Type::FLOAT16: return use(half{});
    default: throw std::invalid_argument("type: float32, float16 or bfloat16");
#endif
  }
}

}  // namespace fastvit
