// attention: softmax(scale q kᵀ) v of every head, from one packed projection to tokens. Scores are in memory for one
// head at a time: in the forward those of a few queries, in the backward of all of them.
#include "isa.h"
#include "product.h"
#include "rows.h"

namespace fastvit::FASTVIT_ISA {
namespace {

using Multiply = decltype(&multiply<Float32>);

template <int VECTORS, size_t... ROWS>
Multiply multiply_of(int64_t rows, std::index_sequence<ROWS...>) {
  static constexpr Multiply of_rows[] = {&multiply<Float32, ROWS + 1, VECTORS>...};
  return of_rows[rows - 1];
}

// to[i][j] = sum over s < steps of a[i * row + s * step] · column j of the panels, for `rows` rows, at most TILE_ROWS,
// and `columns` columns. Behind them up to TILE_COLUMNS - 1 more are written.
void multiply_panels(const float* a, int64_t row, int64_t step, int64_t rows, const float* panels, int64_t panel_size,
                     int64_t steps, int64_t columns, float* to, int64_t apart) {
  constexpr std::make_index_sequence<TILE_ROWS> ROWS{};
  const Multiply whole = multiply_of<TILE_VECTORS>(rows, ROWS), narrow = multiply_of<1>(rows, ROWS);
  for (int64_t column = 0; column < columns; column += TILE_COLUMNS, panels += panel_size) {
    const Multiply run = columns - column > LANES ? whole : narrow;
    for (int64_t s = 0; s < steps; s += CHAIN) {
      run(a + s * step, row, step, panels + s * TILE_COLUMNS, least(CHAIN, steps - s), s > 0, to + column, apart);
    }
  }
}

// Rows of one head: of queries, keys or values, or of tokens. `count` rows of `width` values, `stride` apart.
template <class T>
struct Rows {
  T* data;
  int64_t count, width, stride;

  T* row(int64_t i) const { return data + i * stride; }
  // Values `first` to `end` of a row in float32, and zeros behind them to whole vectors.
  void read(int64_t i, int64_t first, int64_t end, float* to) const {
    each_vector(end - first, [&](int64_t k, auto n) { store(to + k, load(row(i) + first + k, n)); });
  }

  int64_t panel_size() const { return count * TILE_COLUMNS; }
  // As the panels of a product along the rows.
  void pack(float* to) const {
    const auto read_row = [&](auto... which) { read(which...); };
    constexpr int64_t COLUMNS = TASK_PANELS * TILE_COLUMNS;
    for (int64_t column = 0; column < width; column += COLUMNS, to += TASK_PANELS * panel_size()) {
      pack_panels<Float32>(0, count, column, least(column + COLUMNS, width), read_row, to, panel_size());
    }
  }

  int64_t turned_panel_size() const { return width * TILE_COLUMNS; }
  // As those of a product along the values of a row.
  void pack_turned(float* to) const {
    for (int64_t first = 0; first < count; first += LANES) {
      float* panel = to + first / TILE_COLUMNS * turned_panel_size() + first % TILE_COLUMNS;
      const int64_t rows = least(LANES, count - first);
      each_vector(width, [&](int64_t column, auto n) {
        Floats block[LANES];
#pragma GCC unroll 16
        for (int64_t i = 0; i < LANES; i++) block[i] = i < rows ? load(row(first + i) + column, n) : Floats{};
        transpose(block);
        for (int64_t i = 0; i < n; i++) store(panel + (column + i) * TILE_COLUMNS, block[i]);
      });
    }
  }

  // A few of them in float32, `width` up to whole vectors apart: in `room`, where they have to be converted.
  Rows<const float> floats(int64_t first, int64_t rows, float* room) const {
    if constexpr (std::is_same_v<std::remove_const_t<T>, float>) {
      return {row(first), rows, width, stride};
    } else {
      for (int64_t i = 0; i < rows; i++) read(first + i, 0, width, room + i * padded(width));
      return {room, rows, width, padded(width)};
    }
  }
};

// The shape of a call, and where a head's part of its tensors begins.
template <class T>
struct Attention {
  int64_t images, heads, tokens, width, score_columns, columns, tiles;
  float scale;

  Attention(const View& qkv, int64_t heads, float scale)
      : images(qkv.sizes[0]), heads(heads), tokens(qkv.sizes[1]), width(qkv.sizes[2] / (3 * heads)),
        score_columns(up(tokens, TILE_COLUMNS) * TILE_COLUMNS), columns(up(width, TILE_COLUMNS) * TILE_COLUMNS),
        tiles(up(tokens, TILE_ROWS)), scale(scale) {}

  // Queries (0), keys (1) or values (2) of a head, counted through all images; or their gradients.
  Rows<T> rows(const View& packed, int64_t head, int64_t which) const {
    const int64_t stride = 3 * heads * width, image = head / heads;
    return {writable<T>(packed) + image * tokens * stride + (which * heads + head % heads) * width, tokens, width,
            stride};
  }
  Rows<T> tokens_of(const View& all, int64_t head) const {
    return {writable<T>(all) + head / heads * tokens * heads * width + head % heads * width, tokens, width,
            heads * width};
  }
  // Of a tile of rows. They have nearly the same number, as a product takes longer for each.
  int64_t first_row(int64_t tile) const { return tile * tokens / tiles; }

  // Room for the panels of one head's rows, by rows and by values, and for a tile of rows.
  int64_t panels() const { return columns * tokens; }
  int64_t turned_panels() const { return score_columns * width; }
  int64_t tile() const { return TILE_ROWS * columns; }
};

struct Softmax {
  float sum, logsum;  // of exp(score - largest), and the logarithm of that of exp(score)
};

// A row of scores is scaled and becomes exp(score - largest).
Softmax exponentials(float* scores, int64_t count, float scale) {
  Floats largest = all(-__builtin_inff());
  each_vector(count, [&](int64_t i, auto n) {
    const Floats values = load(scores + i) * scale;
    store(scores + i, values);
    if (n == LANES) {
      largest = maximum(values, largest);
    } else {
      for (int64_t k = 0; k < n; k++) largest[k] = values[k] > largest[k] ? values[k] : largest[k];
    }
  });
  float top = largest[0];
  for (int i = 1; i < LANES; i++) top = largest[i] > top ? largest[i] : top;
  Floats total = {};
  each_vector(count, [&](int64_t i, auto n) {
    const Floats values = exp_of_negative(load(scores + i) - top);
    store(scores + i, values);
    total += first_of(values, n);
  });
  const float all_of_them = sum(total);
  return {all_of_them, top + __builtin_logf(all_of_them)};
}

template <class T>
void write_row(const float* from, int64_t width, float factor, T* to) {
  each_vector(width, [&](int64_t i, auto n) { store(to + i, load(from + i) * factor, n); });
}

// Some tiles of a head's queries.
template <class T>
struct Forward {
  const Attention<T>& op;
  const View &qkv, &out, &logsums;

  int64_t room() const {
    return op.turned_panels() + op.panels() + TILE_ROWS * op.score_columns + 2 * op.tile();
  }

  void run(int64_t head, int64_t first_tile, int64_t end, float* room) const {
    const Rows<T> queries = op.rows(qkv, head, 0), keys = op.rows(qkv, head, 1), values = op.rows(qkv, head, 2);
    const Rows<T> tokens = op.tokens_of(out, head);
    float *key_panels = room, *value_panels = key_panels + op.turned_panels();
    float *scores = value_panels + op.panels(), *sums = scores + TILE_ROWS * op.score_columns;
    keys.pack_turned(key_panels), values.pack(value_panels);
    for (int64_t tile = first_tile; tile < end; tile++) {
      const int64_t first = op.first_row(tile), rows = op.first_row(tile + 1) - first;
      const auto of_tile = queries.floats(first, rows, sums + op.tile());
      multiply_panels(of_tile.data, of_tile.stride, 1, rows, key_panels, keys.turned_panel_size(), op.width, op.tokens,
                      scores, op.score_columns);
      Softmax of_row[TILE_ROWS];
      for (int64_t i = 0; i < rows; i++) of_row[i] = exponentials(scores + i * op.score_columns, op.tokens, op.scale);
      multiply_panels(scores, op.score_columns, 1, rows, value_panels, values.panel_size(), op.tokens, op.width, sums,
                      op.columns);
      for (int64_t i = 0; i < rows; i++) {
        write_row(sums + i * op.columns, op.width, 1 / of_row[i].sum, tokens.row(first + i));
        writable<float>(logsums)[head * op.tokens + first + i] = of_row[i].logsum;
      }
    }
  }
};

// The scores' row becomes the probabilities, and the row of the probabilities' gradient that of the scores.
void differentiate_row(float* scores, float* grads, int64_t count, float scale, float logsum) {
  // The mean of the gradients by the probabilities, which are exactly 1 together only before they are rounded.
  Floats weighted = {}, weights = {};
  each_vector(count, [&](int64_t i, auto n) {
    const Floats shifted = load(scores + i) * scale - logsum;  // rounding may have left it above zero
    const Floats probability = exp_of_negative(select(shifted > 0.0f, Floats{}, shifted));
    store(scores + i, probability);
    weighted += first_of(probability * load(grads + i), n), weights += first_of(probability, n);
  });
  const float mean = sum(weighted) / sum(weights);
  each_vector(count, [&](int64_t i, auto) {
    store(grads + i, load(scores + i) * (load(grads + i) - mean) * scale);
  });
}

// A head: first the probabilities, their gradients and those of the queries, tile by tile; then, from the columns of both,
// those of keys and values.
template <class T>
struct Backward {
  const Attention<T>& op;
  const View &grad, &qkv, &logsums, &d_qkv;

  int64_t scores() const { return op.tokens * op.score_columns; }
  int64_t room() const { return 2 * scores() + 2 * op.turned_panels() + 2 * op.panels() + 3 * op.tile(); }

  // Adds the sums over tokens to `sums`, [3, D], where there are some.
  void run(int64_t head, float* room, float* sums) const {
    float *probabilities = room, *d_scores = probabilities + scores(), *panels = d_scores + scores();
    differentiate_scores(head, probabilities, d_scores, panels, sums);

    const Rows<T> queries = op.rows(qkv, head, 0), grads = op.tokens_of(grad, head);
    float *of_queries = panels, *of_grads = panels + op.panels(), *tile_sums = of_grads + op.panels();
    queries.pack(of_queries), grads.pack(of_grads);
    const auto sum_columns = [&](const float* from, const float* of_rows, int64_t which, int64_t first, int64_t rows) {
      multiply_panels(from + first, 1, op.score_columns, rows, of_rows, queries.panel_size(), op.tokens, op.width,
                      tile_sums, op.columns);
      write(head, which, first, rows, tile_sums, sums);
    };
    for (int64_t tile = 0; tile < op.tiles; tile++) {
      const int64_t first = op.first_row(tile), rows = op.first_row(tile + 1) - first;
      sum_columns(d_scores, of_queries, 1, first, rows);
      sum_columns(probabilities, of_grads, 2, first, rows);
    }
  }

 private:
  void differentiate_scores(int64_t head, float* probabilities, float* d_scores, float* room, float* sums) const {
    const Rows<T> queries = op.rows(qkv, head, 0), keys = op.rows(qkv, head, 1), values = op.rows(qkv, head, 2);
    const Rows<T> grads = op.tokens_of(grad, head);
    float *turned_keys = room, *turned_values = turned_keys + op.turned_panels();
    float *key_panels = turned_values + op.turned_panels(), *tile_sums = key_panels + 2 * op.panels();
    keys.pack_turned(turned_keys), values.pack_turned(turned_values), keys.pack(key_panels);
    for (int64_t tile = 0; tile < op.tiles; tile++) {
      const int64_t first = op.first_row(tile), rows = op.first_row(tile + 1) - first;
      const auto of_queries = queries.floats(first, rows, tile_sums + op.tile());
      const auto of_grads = grads.floats(first, rows, tile_sums + 2 * op.tile());
      float *scores = probabilities + first * op.score_columns, *changes = d_scores + first * op.score_columns;
      multiply_panels(of_queries.data, of_queries.stride, 1, rows, turned_keys, keys.turned_panel_size(), op.width,
                      op.tokens, scores, op.score_columns);
      multiply_panels(of_grads.data, of_grads.stride, 1, rows, turned_values, keys.turned_panel_size(), op.width,
                      op.tokens, changes, op.score_columns);
      for (int64_t i = 0; i < rows; i++) {
        differentiate_row(scores + i * op.score_columns, changes + i * op.score_columns, op.tokens, op.scale,
                          elements<float>(logsums)[head * op.tokens + first + i]);
      }
      multiply_panels(changes, op.score_columns, 1, rows, key_panels, keys.panel_size(), op.tokens, op.width, tile_sums,
                      op.columns);
      write(head, 0, first, rows, tile_sums, sums);
    }
  }

  void write(int64_t head, int64_t which, int64_t first, int64_t rows, const float* from, float* sums) const {
    const Rows<T> to = op.rows(d_qkv, head, which);
    for (int64_t i = 0; i < rows; i++) write_row(from + i * op.columns, op.width, 1, to.row(first + i));
    if (!sums) return;
    float* place = sums + (which * op.heads + head % op.heads) * op.width;
    each_vector(op.width, [&](int64_t k, auto n) {
      Floats total = load(place + k, n);
      for (int64_t i = 0; i < rows; i++) total += rounded_to<T>(load(from + i * op.columns + k));
      store(place + k, total, n);
    });
  }
};

}  // namespace

void attention(const View& qkv, int64_t heads, float scale, const View& out, const View& logsums, const Queue&) {
  with_type(qkv.type, [&](auto type) {
    const Attention<decltype(type)> op(qkv, heads, scale);
    const Forward<decltype(type)> forward{op, qkv, out, logsums};
    const int64_t of_tile = op.tiles ? op.tokens * op.tokens / op.tiles * op.width : 0;
    parallel(op.images * heads * op.tiles, of_tile, [&](int64_t first, int64_t end) {
      Room<float> room(forward.room());
      while (first < end) {  // the tiles of a head together
        const int64_t head = first / op.tiles, tile = first % op.tiles, last = least(op.tiles, tile + end - first);
        forward.run(head, tile, last, room.data);
        first += last - tile;
      }
    });
  });
}

void attention_backward(const View& qkv, int64_t heads, float scale, const View& grad,
                        const View& logsums, const View& d_qkv, const View& sums, const Queue& queue) {
  const int64_t images = qkv.sizes[0], columns = sums ? sums.sizes[0] : 0;
  float* of_images = queue.scratch<float>("sums of images", images * columns);
  std::memset(of_images, 0, images * columns * sizeof(float));
  with_type(qkv.type, [&](auto type) {
    const Attention<decltype(type)> op(qkv, heads, scale);
    const Backward<decltype(type)> backward{op, grad, qkv, logsums, d_qkv};
    parallel(op.tokens ? images * heads : 0, op.tokens * op.tokens * op.width, [&](int64_t first, int64_t end) {
      Room<float> room(backward.room());
      for (int64_t head = first; head < end; head++) {
        backward.run(head, room.data, sums ? of_images + head / heads * columns : nullptr);
      }
    });
  });
  each_vector(columns, [&](int64_t i, auto n) {
    Floats total = {};
    for (int64_t image = 0; image < images; image++) total += load(of_images + image * columns + i, n);
    store(writable<float>(sums) + i, total, n);
  });
}

}  // namespace fastvit::FASTVIT_ISA

FASTVIT_CHOOSE(attention,
               (const View& qkv, int64_t heads, float scale, const View& out, const View& logsums, const Queue& queue),
               (qkv, heads, scale, out, logsums, queue))
FASTVIT_CHOOSE(attention_backward,
               (const View& qkv, int64_t heads, float scale, const View& grad, const View& logsums,
                const View& d_qkv, const View& sums, const Queue& queue),
               (qkv, heads, scale, grad, logsums, d_qkv, sums, queue))
