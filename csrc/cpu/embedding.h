// What embeds patches: a product whose one operand is read from the images. A few patches at a time become rows, whose
// products with the prepared weight start the finished tokens. The backward sums over the patches in the same way.
#pragma once

#include <cstring>

#include "../ops.h"
#include "patches.h"
#include "product.h"
#include "threads.h"
#include "vector.h"

namespace fastvit::FASTVIT_ISA {

constexpr std::size_t MEGABYTE = 1 << 20;
constexpr int64_t COLUMNS = 64;  // of sums over rows in no order, for each task

// Row d of the weight, scaled, rounded and in the order of the pixels. Returns its bias.
template <class Element>
float prepare_row(const PatchEmbedInputs& inputs, const Patches& patches, int64_t d, Element* row) {
  const int64_t length = patches.length(), start = d * length, *sources = patches.sources();
  const float *scale = patches.weight_scale(), *shift = patches.bias_shift();
  Floats correction{};
  with_type(inputs.weight.type, [&](auto type) {
    const auto* weight = elements<decltype(type)>(inputs.weight) + start;
    decltype(type) gathered[LANES] = {};
    each_vector(length, [&](int64_t k, auto n) {
      for (int64_t i = 0; sources && i < n; i++) gathered[i] = weight[sources[k + i]];
      const Floats values = (sources ? load(gathered, n) : load(weight + k, n)) * load(scale + k);
      store(row + k, values);
      // Of the rounded weight: rounding it then costs nothing on an image of the mean's colour.
      correction += rounded_to<Element>(values) * load(shift + k, n);
    });
  });
  const float bias = inputs.bias ? load(pointer_to<Any>(inputs.bias) + d, 1)[0] : 0;
  return patches.has_bias_shift() ? bias + sum(correction) : bias;  // infinite weights times 0 are no number
}

// The tokens: where each row of patches goes, and what is added to it.
class Tokens {
 public:
  Tokens(const PatchEmbedInputs& inputs, const Patches& patches, const View& tokens, const float* bias)
      : inputs_(inputs), patches_(patches), tokens_(tokens), bias_(bias), width_(inputs.weight.sizes[0]),
        prefix_rows_(patches.prefix_rows()) {
    skipped_ = inputs.positions ? prefix_rows_ + patches.places() - inputs.positions.sizes[0] : 0;
  }

  void write_prefix() const {
    with_type(tokens_.type, [&](auto type) {
      auto* to = writable<decltype(type)>(tokens_);
      patches_.each_image([&](int64_t first) {
        for (int64_t row = 0; row < prefix_rows_; row++) {
          each_vector(width_, [&](int64_t i, auto n) {
            const Floats value = load(pointer_to<Any>(inputs_.prefix) + row * width_ + i, n) + position(row, i, n);
            store(to + (first + row) * width_ + i, value, n);
          });
        }
      });
    });
  }

  // Asks for the positions that `write` will add, unless they are few, as of a batch, and stay in the second cache.
  void expect(int64_t row, int64_t rows, int64_t column) const {
    const View& positions = inputs_.positions;
    if (!positions || positions.extent() < MEGABYTE) return;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t place = (prefix_rows_ + patches_.place(row + i).position - skipped_) * width_ + column;
      prefetch((pointer_to<Any>(positions) + place).data, TILE_COLUMNS * bytes_of(positions.type));
    }
  }

  // A tile of products of `rows` patches from `row` on.
  void write(const Tile& tile, int64_t row, int64_t rows, int64_t column) const {
    const int64_t width = least(TILE_COLUMNS, width_ - column);
    with_type(tokens_.type, [&](auto type) {
      for (int64_t i = 0; i < rows; i++) {
        const Patches::Place& place = patches_.place(row + i);
        auto* to = writable<decltype(type)>(tokens_) + place.token * width_ + column;
        each_vector(width, [&](int64_t j, auto n) {
          Floats value = load(&tile[i][j]) + load(bias_ + column + j);
          if (!place.is_there()) value = all(__builtin_nanf(""));
          else value += position(prefix_rows_ + place.position, column + j, n);
          store(to + j, value, n);
        });
      }
    });
  }

 private:
  Floats position(int64_t row, int64_t column, int64_t count) const {
    if (!inputs_.positions || row < skipped_) return Floats{};
    return load(pointer_to<Any>(inputs_.positions) + (row - skipped_) * width_ + column, count);
  }

  const PatchEmbedInputs& inputs_;
  const Patches& patches_;
  const View& tokens_;
  const float* bias_;
  int64_t width_, prefix_rows_, skipped_;
};

template <class Operand>
void embed(const PatchEmbedInputs& inputs, const Patches& patches, const View& out, const Queue& queue) {
  const int64_t width = inputs.weight.sizes[0], length = patches.length();
  float* bias = queue.scratch<float>("bias", up(width, TILE_COLUMNS) * TILE_COLUMNS);
  const Panels weight = pack_turned<Operand>(
      width, length, queue, [&](int64_t d, auto* to) { bias[d] = prepare_row(inputs, patches, d, to); });
  const Tokens tokens(inputs, patches, out, bias);
  tokens.write_prefix();
  multiply_rows<Operand>(
      patches.rows(), length, weight, [&](int64_t row, auto* to) { patches.read(row, 0, length, to); },
      [&](int64_t row, int64_t count, int64_t column) { tokens.expect(row, count, column); },
      [&](const Tile& tile, int64_t row, int64_t count, int64_t column) { tokens.write(tile, row, count, column); });
}

// The backward

// What the sums over unnormalised pixels are of normalised ones, in the weight's order and type.
inline void write_weight_gradient(const Patches& patches, const View& d_weight, int64_t d, int64_t pixel, int64_t count,
                           const float* sums, float d_bias) {
  const float *shift = patches.bias_shift() + pixel, *scale = patches.weight_scale() + pixel;
  const int64_t* sources = patches.sources();
  with_type(d_weight.type, [&](auto type) {
    auto* to = writable<decltype(type)>(d_weight) + d * patches.length();
    decltype(type) values[LANES];
    each_vector(count, [&](int64_t k, auto n) {
      Floats total = load(sums + k);
      if (patches.has_bias_shift()) total += load(shift + k) * d_bias;
      total *= load(scale + k);
      if (!sources) return store(to + pixel + k, total, n);
      store(values, total);
      for (int64_t i = 0; i < n; i++) to[sources[pixel + k + i]] = values[i];
    });
  });
}

// The gradient of the tokens of each row of patches.
struct TokenGradients {
  const View& grad;
  const Patches& patches;
  int64_t width;

  Any values(const Patches::Place& place, int64_t first) const {
    return pointer_to<Any>(grad) + place.token * width + first;
  }
  template <class Element>
  void read(int64_t row, int64_t first, int64_t end, Element* to) const {
    const Patches::Place& place = patches.place(row);
    const Any from = values(place, first);
    each_vector(end - first, [&](int64_t i, auto n) {
      store(to + i, place.is_there() ? load(from + i, n) : Floats{});
    });
  }
  void expect(int64_t row, int64_t first, int64_t end) const {
    prefetch(values(patches.place(row), first).data, (end - first) * bytes_of(grad.type));
  }
};

template <class Operand>
void differentiate_weight(const Patches& patches, const View& grad, const float* d_bias, const View& d_weight) {
  const int64_t width = d_weight.sizes[0];
  sum_products<Operand>(patches.rows(), width, patches.length(), TokenGradients{grad, patches, width}, patches,
                        [&](int64_t d, int64_t pixel, int64_t count, const float* sums) {
                          write_weight_gradient(patches, d_weight, d, pixel, count, sums, d_bias[d]);
                        });
}

// The gradient of every row of the table, [R+N, D], where each image has patches of its own.
inline void sum_by_position(const View& grad, int64_t width, const Patches& patches, float* d_rows) {
  const int64_t rows = patches.prefix_rows() + patches.places();
  parallel(up(width, COLUMNS), COLUMNS * patches.rows(), [&](int64_t first, int64_t end) {
    const int64_t start = first * COLUMNS, columns = least(end * COLUMNS, width) - start;
    for (int64_t row = 0; row < rows; row++) std::memset(d_rows + row * width + start, 0, columns * sizeof(float));
    const auto add = [&](int64_t row, int64_t token) {
      float* to = d_rows + row * width + start;
      each_vector(columns, [&](int64_t i, auto n) {
        store(to + i, load(to + i, n) + load(pointer_to<Any>(grad) + token * width + start + i, n), n);
      });
    };
    patches.each_image([&](int64_t token) {
      for (int64_t row = 0; row < patches.prefix_rows(); row++) add(row, token + row);
    });
    for (int64_t row = 0; row < patches.rows(); row++) {
      const Patches::Place& place = patches.place(row);
      if (place.is_there()) add(patches.prefix_rows() + place.position, place.token);
    }
  });
}

// d_bias: the patches' rows of d_rows, summed.
inline void sum_rows(const float* d_rows, int64_t rows, int64_t width, float* d_bias) {
  parallel(up(width, COLUMNS), COLUMNS * rows, [&](int64_t first, int64_t end) {
    const int64_t start = first * COLUMNS, columns = least(end * COLUMNS, width) - start;
    each_vector(columns, [&](int64_t i, auto n) {
      Floats total{};  // of sums of a few rows: those of thousands, one after another, would lose digits
      for (int64_t row = 0; row < rows;) {
        Floats few{};
        for (const int64_t end_row = least(row + 64, rows); row < end_row; row++) {
          few += load(d_rows + row * width + start + i, n);
        }
        total += few;
      }
      store(d_bias + start + i, total, n);
    });
  });
}

// Without the gradient of images, which are seldom trained. `sum_positions(d_rows)` writes the gradient of every row of
// the table.
template <class Sum>
void differentiate(const PatchEmbedInputs& inputs, const Patches& patches, const PatchEmbedGradients& gradients,
                   const Queue& queue, const Sum& sum_positions) {
  const int64_t width = inputs.weight.sizes[0], rows = patches.prefix_rows() + patches.places();
  View d_rows = gradients.d_rows;
  if (!d_rows) {
    d_rows.is_given = true, d_rows.data = queue.scratch<float>("d_rows", rows * width), d_rows.dimensions = 2;
    d_rows.sizes[0] = rows, d_rows.sizes[1] = width;
  }
  sum_positions(d_rows);
  float* d_bias = gradients.d_bias ? writable<float>(gradients.d_bias) : queue.scratch<float>("d_bias", width);
  sum_rows(elements<float>(d_rows) + patches.prefix_rows() * width, patches.places(), width, d_bias);
  if (!gradients.d_weight) return;
  with_operand(inputs.compute, [&](auto operand) {
    differentiate_weight<decltype(operand)>(patches, gradients.grad, d_bias, gradients.d_weight);
  });
}

}  // namespace fastvit::FASTVIT_ISA
