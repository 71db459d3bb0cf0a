// A tensor as the ops see it: where it lies and how, without knowing whose it is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastvit {

// Element types; the numbers are part of the interface to Python.
enum class Type : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, UINT8 = 3, INT64 = 4 };

constexpr int bytes_of(Type type) {
  return type == Type::FLOAT32 ? 4 : type == Type::UINT8 ? 1 : type == Type::INT64 ? 8 : 2;
}

struct View {
  bool is_given = false;  // else there is no such tensor; one without elements is given, and may have no data
  void* data = nullptr;   // of the first element
  Type type = Type::FLOAT32;
  int dimensions = 0;
  int64_t sizes[4] = {};
  int64_t strides[4] = {};  // in elements

  explicit operator bool() const { return is_given; }
  // Bytes from the first to the last element, whatever lies between them.
  std::size_t extent() const {
    int64_t last = 0;
    for (int i = 0; i < dimensions; i++) {
      if (sizes[i] == 0) return 0;
      last += (sizes[i] - 1) * strides[i];
    }
    return static_cast<std::size_t>(last + 1) * bytes_of(type);
  }
  int size(int dimension) const { return static_cast<int>(sizes[dimension]); }
};

// How images [B, C, H, W] lie: values of a row side by side, or those of a pixel and its neighbours.
inline bool is_nchw(const View& images) { return images.sizes[3] == 1 || images.strides[3] == 1; }
inline bool is_nhwc(const View& images) {
  return (images.sizes[1] == 1 || images.strides[1] == 1) &&
         (images.sizes[3] == 1 || images.strides[3] == images.sizes[1]);
}

}  // namespace fastvit
