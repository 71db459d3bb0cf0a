#include "kernels.h"

#include <stdexcept>

#include "../add_position.h"

namespace fastvit {
namespace {

// Calls `use` with a value of the C++ type.
template <class Use>
void with_type(Type type, Use use) {
  switch (type) {
    case Type::FLOAT32: return use(float{});
    case Type::FLOAT16: return use(half{});
    case Type::BFLOAT16: return use(bfloat16{});
    default: throw std::invalid_argument("type: float32, float16 or bfloat16");
  }
}

}  // namespace

void launch(const AddPosition& parameters, Type in, Type out, simt::Stream& stream) {
  with_type(in, [&](auto i) {
    with_type(out, [&](auto o) { launch_add_position<decltype(i), decltype(o)>(parameters, stream); });
  });
}

void launch(const SumRows& parameters, Type type, simt::Stream& stream) {
  with_type(type, [&](auto t) { launch_sum_rows<decltype(t)>(parameters, stream); });
}

}  // namespace fastvit
