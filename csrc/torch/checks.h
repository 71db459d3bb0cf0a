// Checks of arguments, and element types by the names that torch gives them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <ostream>
#include <sstream>
#include <stdexcept>

#include "../views.h"

namespace fastvit {

using torch::headeronly::ScalarType;
using Types = std::initializer_list<Type>;

constexpr Types FLOATS = {Type::FLOAT32, Type::FLOAT16, Type::BFLOAT16};
constexpr Types PIXELS = {Type::UINT8, Type::FLOAT32, Type::FLOAT16, Type::BFLOAT16};

constexpr int64_t INT32_LIMIT = int64_t{1} << 31;

// Throws std::runtime_error unless the condition holds; its message is the parts, one after another.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline ScalarType torch_type(Type type) {
  switch (type) {
    case Type::FLOAT32: return ScalarType::Float;
    case Type::FLOAT16: return ScalarType::Half;
    case Type::BFLOAT16: return ScalarType::BFloat16;
    case Type::UINT8: return ScalarType::Byte;
    default: return ScalarType::Long;
  }
}

// The shape, as messages show it.
inline std::ostream& operator<<(std::ostream& out, const View& view) {
  out << '[';
  for (int i = 0; i < view.dimensions; i++) out << (i ? ", " : "") << view.sizes[i];
  return out << ']';
}

inline std::ostream& operator<<(std::ostream& out, Types types) {
  const char* separator = "";
  for (const Type type : types) out << separator << torch::headeronly::toString(torch_type(type)), separator = ", ";
  return out;
}

// The element type that torch calls `type`, one of those accepted.
inline Type type_of(const char* name, ScalarType type, Types accepted) {
  for (const Type candidate : accepted) {
    if (torch_type(candidate) == type) return candidate;
  }
  require(false, name, ": dtype ", torch::headeronly::toString(type), " is not supported; accepted: ", accepted);
  return {};
}

// Rows of positions: one for each patch, or for each prefix row too.
inline void check_rows(const char* name, const View& rows, int64_t patches, int64_t prefix_rows, int64_t width) {
  const bool fits = rows.sizes[0] == patches || rows.sizes[0] == prefix_rows + patches;
  require(fits && rows.sizes[1] == width, name, ": expected [", patches, ", ", width, "] or [", prefix_rows + patches,
          ", ", width, "], got ", rows);
}

// Kernels count rows, and values of a sample, in 32 bits.
inline void check_fits(const char* name, int64_t batch, int64_t length, int64_t width) {
  const bool fits = length < INT32_LIMIT && width < INT32_LIMIT && batch < INT32_LIMIT;
  require(fits && batch * length < INT32_LIMIT && length * width < INT32_LIMIT, name, ": ", batch, " x ", length,
          " rows of width ", width, "; rows, and values a sample, must be < 2^31");
}

// The function with every exception a std::runtime_error, which torch hands on as a RuntimeError.
template <auto function>
struct Guarded;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Guarded<function> {
  static Result run(Arguments... arguments) {
    try {
      return function(arguments...);
    } catch (const std::runtime_error&) {
      throw;
    } catch (const std::exception& error) {
      throw std::runtime_error(error.what());
    }
  }
};

}  // namespace fastvit
