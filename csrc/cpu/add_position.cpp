// add_position: [B, N, D] tokens plus positions, behind their prefix rows, in one pass; backward sums over the batch.
#include "../ops.h"
#include "isa.h"
#include "threads.h"
#include "vector.h"

namespace fastvit::FASTVIT_ISA {
namespace {

template <class In, class Out>
struct AddPosition {
  const View &tokens, &positions, &prefix, &out;
  int64_t patches = tokens.sizes[1], width = tokens.sizes[2];
  int64_t prefix_rows = prefix ? prefix.sizes[0] : 0, length = prefix_rows + patches;
  int64_t skipped = length - positions.sizes[0];  // rows without a position

  // Of a row of an image, `width` values of the result from `column` on: those that load(i, n) gives, and positions.
  template <class Load>
  void write(int64_t image, int64_t row, int64_t column, int64_t width, const Load& load) const {
    Out* to = writable<Out>(out) + (image * length + row) * this->width + column;
    const int64_t place = (row - skipped) * this->width + column;
    if (row < skipped) {
      each_vector(width, [&](int64_t i, auto n) { store(to + i, load(i, n), n); });
    } else {
      const Any position = pointer_to<Any>(positions) + place;
      each_vector(width, [&](int64_t i, auto n) {
        store(to + i, load(i, n) + FASTVIT_ISA::load(position + i, n), n);
      });
    }
  }

  const In* token(int64_t image, int64_t patch) const {
    return elements<In>(tokens) + image * tokens.strides[0] + patch * tokens.strides[1];
  }

  // `count` tokens of an image, at most LANES, whose values lie apart, as in a feature map: there those of neighbouring
  // tokens lie side by side, and as many columns are turned at a time.
  template <class Position>
  void write_turned(int64_t image, int64_t patch, int64_t count) const {
    const int64_t row = prefix_rows + patch, next = tokens.strides[1], apart = tokens.strides[2];
    const bool are_whole = next == 1 && count == LANES && row >= skipped;
    each_vector(width, [&](int64_t column, auto n) {
      const In* from = token(image, patch) + column * apart;
      Out* to = writable<Out>(out) + (image * length + row) * width + column;
      const Position* position = elements<Position>(positions) + (row - skipped) * width + column;
      Floats tile[LANES];
      if (are_whole && n == LANES) {
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) tile[j] = load(from + j * apart);
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(to + i * width, tile[i] + load(position + i * width));
        return;
      }
      for (int64_t i = 0; i < count; i++) {
        Floats values{};
        for (int64_t j = 0; j < n; j++) values[j] = load_one(from + j * apart + i * next);
        store(to + i * width, row + i < skipped ? values : values + load(position + i * width, n), n);
      }
    });
  }

  // Rows of the result, of all images one after another.
  void run(int64_t first, int64_t end) const {
    while (first < end) {
      const int64_t image = first / length, row = first - image * length;
      int64_t rows = 1;
      if (row < prefix_rows) {
        const Any values = pointer_to<Any>(prefix) + row * width;
        write(image, row, 0, width, [=](int64_t i, auto n) { return load(values + i, n); });
      } else if (tokens.strides[2] == 1 || width == 1) {
        const In* values = token(image, row - prefix_rows);
        write(image, row, 0, width, [=](int64_t i, auto n) { return load(values + i, n); });
      } else {
        rows = least(least(length - row, end - first), LANES);
        with_type(positions.type, [&](auto type) { write_turned<decltype(type)>(image, row - prefix_rows, rows); });
      }
      first += rows;
    }
  }
};

constexpr int64_t COLUMNS = 1024;  // of sums that a thread makes at a time: 4 KiB of each image's gradient
constexpr int64_t IMAGES = 64;     // that are added one after another: longer sums are made of these, and more exact

template <class T>
void sum_images(const T* grad, int64_t stride, int64_t images, int64_t columns, float* sums) {
  for (int64_t image = 0; image < images; image += IMAGES) {
    const int64_t end = least(image + IMAGES, images);
    each_vector(columns, [&](int64_t i, auto n) {
      const T* from = grad + i;
      Floats total = load(from + image * stride, n);
      for (int64_t next = image + 1; next < end; next++) total += load(from + next * stride, n);
      store(sums + i, image ? load(sums + i, n) + total : total, n);
    });
  }
}

}  // namespace

void add_position(const View& tokens, const View& positions, const View& prefix, const View& out, const Queue&) {
  with_type(tokens.type, [&](auto in) {
    with_type(out.type, [&](auto result) {
      const AddPosition<decltype(in), decltype(result)> op{tokens, positions, prefix, out};
      parallel(op.length * tokens.sizes[0], op.width, [&](int64_t first, int64_t end) { op.run(first, end); });
    });
  });
}

void add_position_backward(const View& grad, const View& d_rows, const Queue&) {
  const int64_t images = grad.sizes[0], columns = grad.sizes[1] * grad.sizes[2];
  float* sums = writable<float>(d_rows);
  if (images == 0) {
    for (int64_t i = 0; i < columns; i++) sums[i] = 0;
    return;
  }
  with_type(grad.type, [&](auto type) {
    const auto* from = elements<decltype(type)>(grad);
    parallel(up(columns, COLUMNS), COLUMNS * images, [&](int64_t first, int64_t end) {
      for (int64_t column = first * COLUMNS; column < end * COLUMNS && column < columns; column += COLUMNS) {
        const int64_t width = least(columns - column, COLUMNS);
        sum_images(from + column, columns, images, width, sums + column);
      }
    });
  });
}

}  // namespace fastvit::FASTVIT_ISA

FASTVIT_CHOOSE(add_position,
               (const View& tokens, const View& positions, const View& prefix, const View& out, const Queue& queue),
               (tokens, positions, prefix, out, queue))
FASTVIT_CHOOSE(add_position_backward, (const View& grad, const View& d_rows, const Queue& queue),
               (grad, d_rows, queue))
