// patch_embed as a product whose one operand is read from the images: a few patches at a time become rows, whose
// products with the prepared weight start the finished tokens. The backward sums over the patches in the same way.
#include <cstdlib>
#include <cstring>

#include "../ops.h"
#include "isa.h"
#include "patches.h"
#include "product.h"
#include "threads.h"
#include "vector.h"

namespace fastvit::FASTVIT_ISA {

namespace {

int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step; }

// Memory of one thread.
template <class T>
struct Room {
  T* data;
  explicit Room(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, up(count * sizeof(T), 64) * 64))) {}
  ~Room() { std::free(data); }
  Room(const Room&) = delete;
};

template <class Operand>
int64_t words(int64_t values) {
  return up(values, Operand::VALUES);
}

// The weight in panels of TILE_COLUMNS outputs, as `multiply` reads them, and the bias with what is left of the mean.
template <class Operand>
class PreparedWeight {
 public:
  using Element = typename Operand::Element;

  PreparedWeight(const PatchEmbedInputs& inputs, const Patches& patches, const Queue& queue)
      : inputs_(inputs), patches_(patches), width_(inputs.weight.sizes[0]), steps_(words<Operand>(patches.length())) {
    panels_ = queue.scratch<float>("prepared weight", up(width_, TILE_COLUMNS) * steps_ * TILE_COLUMNS);
    bias_ = queue.scratch<float>("prepared bias", up(width_, TILE_COLUMNS) * TILE_COLUMNS);
    parallel(up(width_, TILE_COLUMNS), TILE_COLUMNS * patches.length(), [&](int64_t first, int64_t end) {
      Room<Element> rows(TILE_COLUMNS * stride());
      for (int64_t panel = first; panel < end; panel++) prepare(panel, rows.data);
    });
  }

  const float* panel(int64_t number) const { return panels_ + number * steps_ * TILE_COLUMNS; }
  const float* bias() const { return bias_; }
  int64_t steps() const { return steps_; }

 private:
  int64_t stride() const { return steps_ * Operand::VALUES + LANES; }

  void prepare(int64_t panel, Element* rows) const {
    for (int64_t column = 0; column < TILE_COLUMNS; column++) {
      const int64_t d = panel * TILE_COLUMNS + column;
      bias_[d] = d < width_ ? prepare_row(d, rows + column * stride()) : 0;
      if (d >= width_) std::memset(static_cast<void*>(rows + column * stride()), 0, stride() * sizeof(Element));
    }
    // Turned, a few steps of all columns at a time, which stay in the nearest cache.
    Element* to = reinterpret_cast<Element*>(panels_ + panel * steps_ * TILE_COLUMNS);
    constexpr int64_t BLOCK = 64 / Operand::VALUES, VALUES = Operand::VALUES;
    for (int64_t start = 0; start < steps_; start += BLOCK) {
      const int64_t end = start + BLOCK < steps_ ? start + BLOCK : steps_;
      for (int64_t column = 0; column < TILE_COLUMNS; column++) {
        const Element* row = rows + column * stride();
        for (int64_t k = start * VALUES; k < end * VALUES; k++) {
          to[(k / VALUES * TILE_COLUMNS + column) * VALUES + k % VALUES] = row[k];
        }
      }
    }
  }

  // Row d of the weight, scaled, rounded and in the order of the pixels. Returns its bias.
  float prepare_row(int64_t d, Element* row) const {
    const int64_t length = patches_.length(), start = d * length, *sources = patches_.sources();
    Floats correction{};
    with_type(inputs_.weight.type, [&](auto type) {
      const auto* weight = elements<decltype(type)>(inputs_.weight) + start;
      decltype(type) gathered[LANES] = {};
      each_vector(length, [&](int64_t k, int64_t n) {
        for (int64_t i = 0; sources && i < n; i++) gathered[i] = weight[sources[k + i]];
        const Floats values = (sources ? load(gathered) : load(weight + k, n)) * load(patches_.weight_scale() + k);
        store(row + k, values);
        // Of the rounded weight: rounding it then costs nothing on an image of the mean's colour.
        if (n == LANES) correction += rounded_to<Element>(values) * load(patches_.bias_shift() + k);
        else correction += rounded_to<Element>(values) * load(patches_.bias_shift() + k, n);
      });
    });
    for (int64_t k = length; k < steps_ * Operand::VALUES; k++) store(row + k, Floats{}, 1);
    const float bias = inputs_.bias ? load(inputs_.bias, d, 1)[0] : 0;
    return patches_.has_bias_shift() ? bias + sum(correction) : bias;  // infinite weights times 0 are no number
  }

  const PatchEmbedInputs& inputs_;
  const Patches& patches_;
  int64_t width_, steps_;
  float *panels_, *bias_;
};

// The tokens: where each row of patches goes, and what is added to it.
class Tokens {
 public:
  Tokens(const PatchEmbedInputs& inputs, const Patches& patches, const View& tokens)
      : inputs_(inputs), patches_(patches), tokens_(tokens), length_(tokens.sizes[1]), width_(tokens.sizes[2]) {
    prefix_rows_ = length_ - patches.kept();
    skipped_ = inputs.positions ? prefix_rows_ + patches.patches() - inputs.positions.sizes[0] : 0;
  }

  void write_prefix() const {
    with_type(tokens_.type, [&](auto type) {
      auto* to = writable<decltype(type)>(tokens_);
      for (int64_t image = 0; image < tokens_.sizes[0]; image++) {
        for (int64_t row = 0; row < prefix_rows_; row++) {
          each_vector(width_, [&](int64_t i, int64_t n) {
            const Floats value = load(inputs_.prefix, row * width_ + i, n) + position(row, i, n);
            store(to + (image * length_ + row) * width_ + i, value, n);
          });
        }
      }
    });
  }

  // A tile of products of `rows` patches from `row` on.
  void write(const Tile& tile, int64_t row, int64_t rows, int64_t column, const float* bias) const {
    const int64_t width = width_ - column < TILE_COLUMNS ? width_ - column : TILE_COLUMNS;
    with_type(tokens_.type, [&](auto type) {
      for (int64_t i = 0; i < rows; i++) {
        const int64_t image = (row + i) / patches_.kept(), patch = patches_.number(row + i);
        const int64_t token = image * length_ + prefix_rows_ + (row + i) % patches_.kept();
        auto* to = writable<decltype(type)>(tokens_) + token * width_ + column;
        each_vector(width, [&](int64_t j, int64_t n) {
          Floats value = load(&tile[i][j]) + load(bias + column + j);
          if (patch < 0) value = all(__builtin_nanf(""));
          else value += position(prefix_rows_ + patch, column + j, n);
          store(to + j, value, n);
        });
      }
    });
  }

 private:
  Floats position(int64_t row, int64_t column, int64_t count) const {
    if (!inputs_.positions || row < skipped_) return Floats{};
    return load(inputs_.positions, (row - skipped_) * width_ + column, count);
  }

  const PatchEmbedInputs& inputs_;
  const Patches& patches_;
  const View& tokens_;
  int64_t length_, width_, prefix_rows_, skipped_;
};

constexpr int64_t TILES = 4;  // of rows that are read at once: a panel of the weight then serves them all from the cache

template <class Operand>
void embed(const PatchEmbedInputs& inputs, const View& out, const Queue& queue) {
  using Element = typename Operand::Element;
  const Patches patches(inputs, queue);
  const PreparedWeight<Operand> weight(inputs, patches, queue);
  const Tokens tokens(inputs, patches, out);
  tokens.write_prefix();
  const int64_t width = inputs.weight.sizes[0], length = patches.length(), rows = patches.rows(), steps = weight.steps();
  // In words; an odd number of cache lines, so that the rows of a tile don't meet in the same set.
  const int64_t stride = (up(steps + LANES, 16) | 1) * 16;
  parallel(up(rows, TILE_ROWS), TILE_ROWS * length, [&](int64_t first, int64_t end) {
    Room<float> room(TILES * TILE_ROWS * stride);
    std::memset(room.data, 0, TILES * TILE_ROWS * stride * sizeof(float));
    Tile tile;
    for (int64_t start = first; start < end; start += TILES) {
      const int64_t start_row = start * TILE_ROWS, last = start + TILES < end ? start + TILES : end;
      const int64_t end_row = last * TILE_ROWS < rows ? last * TILE_ROWS : rows;
      for (int64_t row = start_row; row < end_row; row++) {
        float* to = room.data + (row - start_row) * stride;
        patches.read(row, 0, length, reinterpret_cast<Element*>(to));
        if (length % Operand::VALUES) store(reinterpret_cast<Element*>(to) + length, Floats{}, 1);
      }
      for (int64_t column = 0; column < width; column += TILE_COLUMNS) {
        for (int64_t row = start_row; row < end_row; row += TILE_ROWS) {
          const float* values = room.data + (row - start_row) * stride;
          multiply<Operand>(values, stride, 1, weight.panel(column / TILE_COLUMNS), steps, tile);
          const int64_t count = end_row - row < TILE_ROWS ? end_row - row : TILE_ROWS;
          tokens.write(tile, row, count, column, weight.bias());
        }
      }
    }
  });
}

// The backward

constexpr int64_t BLOCK = 256;         // rows whose products are summed in registers; their sums are added in order
constexpr int64_t GRADIENT_TILES = 32;  // of outputs, for each task
constexpr int64_t COLUMNS = 64;         // of sums over rows in no order, for each task

// The gradient of the patches' tokens in panels of TILE_ROWS outputs, whose words have as many rows as `multiply` takes.
template <class Operand>
float* pack_gradient(const View& grad, const Patches& patches, const Queue& queue) {
  using Element = typename Operand::Element;
  constexpr int64_t VALUES = Operand::VALUES;
  const int64_t width = grad.sizes[2], prefix_rows = grad.sizes[1] - patches.kept(), rows = patches.rows();
  const int64_t steps = words<Operand>(rows), panels = up(width, TILE_ROWS), padded = panels * TILE_ROWS + LANES;
  float* packed = queue.scratch<float>("packed gradient", panels * steps * TILE_ROWS);
  parallel(steps, VALUES * width, [&](int64_t first, int64_t end) {
    Room<Element> room(VALUES * padded);
    for (int64_t step = first; step < end; step++) {
      std::memset(static_cast<void*>(room.data), 0, VALUES * padded * sizeof(Element));
      for (int64_t v = 0; v < VALUES; v++) {
        const int64_t row = step * VALUES + v;
        if (row >= rows || patches.number(row) < 0) continue;
        const int64_t token = row / patches.kept() * grad.sizes[1] + prefix_rows + row % patches.kept();
        each_vector(width, [&](int64_t i, int64_t n) {
          store(room.data + v * padded + i, load(grad, token * width + i, n), n);
        });
      }
      for (int64_t panel = 0; panel < panels; panel++) {
        Element* to = reinterpret_cast<Element*>(packed + (panel * steps + step) * TILE_ROWS);
        const Element* from = room.data + panel * TILE_ROWS;
        for (int64_t i = 0; i < TILE_ROWS; i++) {
          for (int64_t v = 0; v < VALUES; v++) to[i * VALUES + v] = from[v * padded + i];
        }
      }
    }
  });
  return packed;
}

// The weight's gradient. A task has a panel of pixels, TILE_COLUMNS of every patch, and some of the outputs.
template <class Operand>
class WeightGradient {
 public:
  WeightGradient(const Patches& patches, const View& grad, const float* d_bias, const View& d_weight,
                 const Queue& queue)
      : patches_(patches), d_bias_(d_bias), d_weight_(d_weight), width_(d_weight.sizes[0]) {
    gradient_ = pack_gradient<Operand>(grad, patches, queue);
    steps_ = words<Operand>(patches.rows()), tiles_ = up(width_, TILE_ROWS);
  }

  void run() const {
    const int64_t parts = up(tiles_, GRADIENT_TILES), panels = up(patches_.length(), TILE_COLUMNS);
    parallel(panels * parts, TILE_COLUMNS * patches_.rows(), [&](int64_t first, int64_t end) {
      Room<float> values(BLOCK * TILE_COLUMNS + LANES), sums(GRADIENT_TILES * TILE_ROWS * TILE_COLUMNS);
      std::memset(values.data, 0, (BLOCK * TILE_COLUMNS + LANES) * sizeof(float));
      for (int64_t task = first; task < end; task++) {
        const int64_t start = task % parts * GRADIENT_TILES;
        const int64_t tiles = tiles_ - start < GRADIENT_TILES ? tiles_ - start : GRADIENT_TILES;
        sum(task / parts * TILE_COLUMNS, start, tiles, values.data, sums.data);
      }
    });
  }

 private:
  using Element = typename Operand::Element;

  void sum(int64_t pixel, int64_t first_tile, int64_t tiles, float* values, float* sums) const {
    std::memset(sums, 0, tiles * sizeof(Tile));
    const int64_t left = patches_.length() - pixel, count = left < TILE_COLUMNS ? left : TILE_COLUMNS;
    Tile tile;
    for (int64_t row = 0; row < patches_.rows(); row += BLOCK) {
      const int64_t rows = patches_.rows() - row < BLOCK ? patches_.rows() - row : BLOCK;
      read(row, rows, pixel, count, values);
      for (int64_t t = 0; t < tiles; t++) {
        const float* gradient = gradient_ + ((first_tile + t) * steps_ + row / Operand::VALUES) * TILE_ROWS;
        multiply<Operand>(gradient, 1, TILE_ROWS, values, words<Operand>(rows), tile);
        float* to = sums + t * TILE_ROWS * TILE_COLUMNS;
        for (int64_t i = 0; i < TILE_ROWS * TILE_COLUMNS; i += LANES) store(to + i, load(to + i) + load(&tile[0][0] + i));
      }
    }
    for (int64_t i = 0; i < tiles * TILE_ROWS; i++) {
      const int64_t d = first_tile * TILE_ROWS + i;
      if (d < width_) finish(d, pixel, count, sums + i * TILE_COLUMNS);
    }
  }

  // `count` values of each row, from `pixel` on.
  void read(int64_t row, int64_t rows, int64_t pixel, int64_t count, float* values) const {
    if constexpr (Operand::VALUES == 1) {
      for (int64_t i = 0; i < rows; i++) patches_.read(row + i, pixel, pixel + count, values + i * TILE_COLUMNS);
    } else {
      Element pair[2][TILE_COLUMNS + LANES] = {};
      for (int64_t i = 0; i < rows; i += 2) {
        patches_.read(row + i, pixel, pixel + count, pair[0]);
        if (i + 1 < rows) patches_.read(row + i + 1, pixel, pixel + count, pair[1]);
        else std::memset(static_cast<void*>(pair[1]), 0, sizeof pair[1]);
        Element* to = reinterpret_cast<Element*>(values + i / 2 * TILE_COLUMNS);
        for (int64_t k = 0; k < TILE_COLUMNS; k++) to[2 * k] = pair[0][k], to[2 * k + 1] = pair[1][k];
      }
    }
  }

  // As of normalised pixels: what the weight has taken up of mean and scale is applied to the sum.
  void finish(int64_t d, int64_t pixel, int64_t count, const float* sums) const {
    const float *shift = patches_.bias_shift() + pixel, *scale = patches_.weight_scale() + pixel;
    with_type(d_weight_.type, [&](auto type) {
      auto* to = writable<decltype(type)>(d_weight_) + d * patches_.length();
      decltype(type) values[LANES];
      each_vector(count, [&](int64_t k, int64_t n) {
        Floats total = load(sums + k);
        if (patches_.has_bias_shift()) total += load(shift + k) * d_bias_[d];
        total *= load(scale + k);
        if (!patches_.sources()) return store(to + pixel + k, total, n);
        store(values, total);
        for (int64_t i = 0; i < n; i++) to[patches_.sources()[pixel + k + i]] = values[i];
      });
    });
  }

  const Patches& patches_;
  const float* d_bias_;
  const View& d_weight_;
  int64_t width_, steps_, tiles_;
  const float* gradient_;
};

// The gradient of every row of the table, where each image has kept patches of its own.
void sum_kept(const View& grad, const Patches& patches, float* d_rows) {
  const int64_t width = grad.sizes[2], prefix_rows = grad.sizes[1] - patches.kept(), images = grad.sizes[0];
  parallel(up(width, COLUMNS), COLUMNS * images * grad.sizes[1], [&](int64_t first, int64_t end) {
    const int64_t start = first * COLUMNS, columns = (end * COLUMNS < width ? end * COLUMNS : width) - start;
    for (int64_t row = 0; row < prefix_rows + patches.patches(); row++) {
      std::memset(d_rows + row * width + start, 0, columns * sizeof(float));
    }
    for (int64_t token = 0; token < images * grad.sizes[1]; token++) {
      const int64_t place = token % grad.sizes[1] - prefix_rows;
      const int64_t patch = place < 0 ? place : patches.number(token / grad.sizes[1] * patches.kept() + place);
      if (place >= 0 && patch < 0) continue;
      float* to = d_rows + (prefix_rows + patch) * width + start;
      each_vector(columns, [&](int64_t i, int64_t n) {
        store(to + i, load(to + i, n) + load(grad, token * width + start + i, n), n);
      });
    }
  });
}

// d_bias: the patches' rows of d_rows, summed.
void sum_rows(const float* d_rows, int64_t rows, int64_t width, float* d_bias) {
  parallel(up(width, COLUMNS), COLUMNS * rows, [&](int64_t first, int64_t end) {
    const int64_t start = first * COLUMNS, columns = (end * COLUMNS < width ? end * COLUMNS : width) - start;
    each_vector(columns, [&](int64_t i, int64_t n) {
      Floats total{};
      for (int64_t row = 0; row < rows; row++) total += load(d_rows + row * width + start + i, n);
      store(d_bias + start + i, total, n);
    });
  });
}

}  // namespace

void patch_embed(const PatchEmbedInputs& inputs, const View& tokens, const Queue& queue) {
  with_operand(inputs.compute, [&](auto operand) { embed<decltype(operand)>(inputs, tokens, queue); });
}

// Without the gradient of images, which are seldom trained: fastvit/native/patch_embed.py has it from PyTorch.
void patch_embed_backward(const PatchEmbedInputs& inputs, int prefix_rows, const PatchEmbedGradients& gradients,
                          const Queue& queue) {
  const View& grad = gradients.grad;
  const Patches patches(inputs, queue);
  const int64_t width = inputs.weight.sizes[0], rows = prefix_rows + patches.patches();

  View d_rows = gradients.d_rows;
  if (!d_rows) {
    d_rows.is_given = true, d_rows.data = queue.scratch<float>("d_rows", rows * width), d_rows.dimensions = 2;
    d_rows.sizes[0] = rows, d_rows.sizes[1] = width;
  }
  if (inputs.keep) {
    sum_kept(grad, patches, writable<float>(d_rows));
  } else {
    add_position_backward(grad, d_rows, queue);
  }
  float* d_bias = gradients.d_bias ? writable<float>(gradients.d_bias) : queue.scratch<float>("d_bias", width);
  sum_rows(elements<float>(d_rows) + prefix_rows * width, patches.patches(), width, d_bias);
  if (!gradients.d_weight) return;
  with_operand(inputs.compute, [&](auto operand) {
    WeightGradient<decltype(operand)>(patches, grad, d_bias, gradients.d_weight, queue).run();
  });
}

}  // namespace fastvit::FASTVIT_ISA

#if defined(FASTVIT_ISA_IS_FIRST)
namespace fastvit {
bool can_read(const View& images) { return portable::Patches::is_nchw(images) || portable::Patches::is_nhwc(images); }
}  // namespace fastvit
#endif

FASTVIT_CHOOSE(patch_embed, (const PatchEmbedInputs& inputs, const View& tokens, const Queue& queue),
               (inputs, tokens, queue))
FASTVIT_CHOOSE(patch_embed_backward,
               (const PatchEmbedInputs& inputs, int prefix_rows, const PatchEmbedGradients& gradients,
                const Queue& queue),
               (inputs, prefix_rows, gradients, queue))
