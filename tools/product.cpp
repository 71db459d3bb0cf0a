// The product of the ops for the processor beside what its core can do at most: see measure_product.py.
#include "../csrc/cpu/product.h"

#include <chrono>
#include <cstdio>
#include <vector>

#if defined(__aarch64__)
#define IN_A_REGISTER "+w"
#else
#define IN_A_REGISTER "+x"
#endif

namespace fastvit {
void run_parallel(int64_t count, int64_t, void (*body)(const void*, int64_t, int64_t), const void* context) {
  body(context, 0, count);  // one core is what is measured
}

int64_t threads() { return 1; }

namespace FASTVIT_ISA {
namespace {

// The least seconds of a call, of many in about a second.
template <class Function>
double seconds(const Function& function) {
  using Clock = std::chrono::steady_clock;
  double least = 1e9;
  for (const auto end = Clock::now() + std::chrono::seconds(1); Clock::now() < end;) {
    const auto start = Clock::now();
    function();
    const double took = std::chrono::duration<double>(Clock::now() - start).count();
    least = took < least ? took : least;
  }
  return least;
}

// Multiply-adds of registers alone, as many independent ones as the product has, in 10^9 operations a second.
template <class Operand>
double peak() {
  constexpr int64_t TIMES = 20000;
  const double took = seconds([] {
    Floats sums[TILE_ROWS][TILE_VECTORS] = {}, values = all(1e-3f);
    float factor = 1e-3f;
    for (auto& row : sums) {
      for (Floats& sum : row) asm volatile("" : IN_A_REGISTER(sum));  // each may be another to the compiler
    }
    for (int64_t time = 0; time < TIMES; time++) {
      asm volatile("" : IN_A_REGISTER(values), IN_A_REGISTER(factor));  // and every step
#pragma GCC unroll 16
      for (auto& row : sums) {
#pragma GCC unroll 4
        for (Floats& sum : row) sum = Operand::multiply_add(sum, factor, values);
      }
    }
    for (auto& row : sums) {
      for (Floats& sum : row) asm volatile("" : IN_A_REGISTER(sum));
    }
  });
  return 2e-9 * TIMES * TILE_ROWS * TILE_COLUMNS * Operand::VALUES / took;
}

// The innermost loop, of operands in the nearest cache.
template <class Operand>
double kernel() {
  constexpr int64_t STEPS = CHAIN / 2, TIMES = 200;
  Room<float> a(TILE_ROWS * (STEPS + 16)), b(STEPS * TILE_COLUMNS);
  Tile tile;
  const double took = seconds([&] {
    for (int64_t time = 0; time < TIMES; time++) {
      multiply<Operand>(a.data, STEPS + 16, 1, b.data, STEPS, true, &tile[0][0]);
    }
  });
  return 2e-9 * TIMES * STEPS * TILE_ROWS * TILE_COLUMNS * Operand::VALUES / took;
}

// Of matrices [rows, length] and [width, length], both packed on the way, the result written.
template <class Operand>
double product(int64_t rows, int64_t length, int64_t width) {
  using Element = typename Operand::Element;
  std::vector<Element> left(rows * length + 64), right(width * length + 64);
  std::vector<float> result(rows * width + 64);
  simt::Queue queue;
  std::vector<char> scratch(up(width, TILE_COLUMNS) * TILE_COLUMNS * (length + 64) * sizeof(float) + 256);
  queue.owner = &scratch;
  queue.allocate = [](void* owner, const char*, std::size_t) -> void* {
    const auto address = reinterpret_cast<uintptr_t>(static_cast<std::vector<char>*>(owner)->data());
    return reinterpret_cast<void*>((address + 255) / 256 * 256);
  };
  const auto read = [&](const Element* matrix) {
    return [=](int64_t row, Element* to) {
      std::memcpy(static_cast<void*>(to), matrix + row * length, length * sizeof(Element));
    };
  };
  const double took = seconds([&] {
    const Panels panels = pack_turned<Operand>(width, length, queue, read(right.data()));
    const auto write = [&](const Tile& tile, int64_t row, int64_t count, int64_t column) {
      const std::size_t bytes = least(TILE_COLUMNS, width - column) * sizeof(float);
      for (int64_t i = 0; i < count; i++) std::memcpy(result.data() + (row + i) * width + column, tile[i], bytes);
    };
    const auto expect = [](int64_t, int64_t, int64_t) {};
    multiply_rows<Operand>(rows, length, panels, read(left.data()), expect, write);
  });
  return 2e-9 * rows * length * width / took;
}

template <class Operand>
void measure(const char* name) {
  // ViT-B's patches of 16 images: the product of patch embedding, and of attention's projection.
  std::printf("%s %.2f %.2f %.2f\n", name, peak<Operand>(), kernel<Operand>(), product<Operand>(16 * 196, 768, 768));
}

}  // namespace
}  // namespace FASTVIT_ISA
}  // namespace fastvit

int main() {
  using namespace fastvit::FASTVIT_ISA;
  measure<Float32>("float32");
#if defined(__AVX512BF16__)
  measure<Bfloat16>("bfloat16");
#endif
}
