// Products of matrices whose operands are packed as they are read: one is the caller's to read from, row by row, so that
// images, or values of another type, need not be written as a matrix first. Sums are made in float32.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../simt/queue.h"
#include "threads.h"
#include "vector.h"

namespace fastvit::FASTVIT_ISA {

// Registers hold the sums, a row of one operand, and what multiplies it.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 14, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#endif
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;

// What is multiplied. Operands lie in words of 32 bits: in a word are the VALUES that follow each other along the sum.

struct Float32 {
  using Element = float;
  static constexpr int VALUES = 1;
  static Floats multiply_add(Floats sums, float a, Floats b) { return sums + a * b; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Element = bfloat16;
  static constexpr int VALUES = 2;
  static Floats multiply_add(Floats sums, float a, Floats b) {
    const auto pair = bits_as<__m512bh>(all_words(bits_as<uint32_t>(a)));
    return bits_as<Floats>(_mm512_dpbf16_ps(bits_as<__m512>(sums), pair, bits_as<__m512bh>(b)));
  }
};
#endif

// Calls `use` with Bfloat16{} where that is `compute` and the processor multiplies it, else with Float32{}.
template <class Use>
inline void with_operand(Type compute, const Use& use) {
#if defined(__AVX512BF16__)
  if (compute == Type::BFLOAT16) return use(Bfloat16{});
#else
  (void)compute;
#endif
  use(Float32{});
}

template <class Operand>
int64_t words(int64_t values) {
  return up(values, Operand::VALUES);
}

// Memory of one thread, all zeros at first.
template <class T>
struct Room {
  T* data;
  explicit Room(int64_t count) {
    const std::size_t bytes = up(count * sizeof(T), 64) * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    std::memset(static_cast<void*>(data), 0, bytes);
  }
  ~Room() { std::free(data); }
  Room(const Room&) = delete;
};

using Tile = float[TILE_ROWS][TILE_COLUMNS];

constexpr int64_t CHAIN = 256;  // products that are summed one after another; longer sums are sums of such sums

// sums[i][j] = sum over s of a[i * row + s * step] b[s * TILE_COLUMNS + j], all counted in words; or is added to them.
// Rows of the sums, ROWS of VECTORS registers, begin `apart` from each other.
template <class Operand, int ROWS = TILE_ROWS, int VECTORS = TILE_VECTORS>
__attribute__((noinline)) void multiply(const float* a, int64_t row, int64_t step, const float* b, int64_t steps,
                                        bool adds, float* to, int64_t apart = TILE_COLUMNS) {
  Floats sums[ROWS][VECTORS] = {};
  for (int64_t s = 0; s < steps; s++) {
    Floats values[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) values[j] = load(b + s * TILE_COLUMNS + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const float factor = a[i * row + s * step];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) sums[i][j] = Operand::multiply_add(sums[i][j], factor, values[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      float* place = to + i * apart + j * LANES;
      store(place, adds ? load(place) + sums[i][j] : sums[i][j]);
    }
  }
}

// The second operand of a product: panels of TILE_COLUMNS columns, each of `steps` words along the sum.
struct Panels {
  float* data;
  int64_t width, steps;

  template <class Operand>
  static Panels room(Operand, int64_t width, int64_t length, const simt::Queue& queue) {
    const int64_t steps = words<Operand>(length);
    return {queue.scratch<float>("panels", up(width, TILE_COLUMNS) * steps * TILE_COLUMNS), width, steps};
  }
  float* panel(int64_t number) const { return data + number * steps * TILE_COLUMNS; }
};

// Of a matrix whose rows are the columns: read(d, to) writes the `length` values of column d, and perhaps LANES - 1 more.
template <class Operand, class Read>
Panels pack_turned(int64_t width, int64_t length, const simt::Queue& queue, const Read& read) {
  using Element = typename Operand::Element;
  constexpr int64_t VALUES = Operand::VALUES, BLOCK = 64 / VALUES;  // steps of all columns: in the nearest cache
  const Panels panels = Panels::room(Operand{}, width, length, queue);
  const int64_t stride = panels.steps * VALUES + LANES;
  parallel(up(width, TILE_COLUMNS), TILE_COLUMNS * length, [&](int64_t first, int64_t end) {
    Room<Element> rows(TILE_COLUMNS * stride);
    for (int64_t panel = first; panel < end; panel++) {
      const int64_t columns = least(TILE_COLUMNS, width - panel * TILE_COLUMNS);
      for (int64_t column = 0; column < columns; column++) {
        read(panel * TILE_COLUMNS + column, rows.data + column * stride);
        if (length % VALUES) store(rows.data + column * stride + length, Floats{}, 1);
      }
      Element* to = reinterpret_cast<Element*>(panels.panel(panel));
      for (int64_t start = 0; start < panels.steps; start += BLOCK) {
        const int64_t last = least(start + BLOCK, panels.steps) * VALUES;
        for (int64_t column = 0; column < TILE_COLUMNS; column++) {
          const Element* row = rows.data + column * stride;
          for (int64_t k = start * VALUES; k < last; k++) to[(k / VALUES * TILE_COLUMNS + column) * VALUES + k % VALUES] = row[k];
        }
      }
    }
  });
  return panels;
}

// LANES words of 32 bits, each of an element of both rows.
template <class Element>
Words paired(const Element* even, const Element* odd) {
  Shorts low, high;
  std::memcpy(&low, even, sizeof low), std::memcpy(&high, odd, sizeof high);
  return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
}

// Sums over rows are made in tasks of TASK_TILES times TASK_PANELS tiles of results at most. Rows of the first operand
// are read in one piece where that is as wide as a ViT-B: of memory that waits long, pieces cost more than the cache.
constexpr int64_t BLOCK = 128;  // rows whose products are summed in registers; the sums are added in order
constexpr int64_t TASK_TILES = 784 / TILE_ROWS, TASK_PANELS = 192 / TILE_COLUMNS;

// Panels of the columns from `first` to `end`, at most TASK_PANELS, of a matrix as it lies; they begin `apart` from each
// other. read(row, first, end, to) writes those of a row, and perhaps LANES - 1 more.
template <class Operand, class Read>
void pack_panels(int64_t row, int64_t rows, int64_t first, int64_t end, const Read& read, float* to, int64_t apart) {
  using Element = typename Operand::Element;
  constexpr int64_t VALUES = Operand::VALUES, MOST = TASK_PANELS * TILE_COLUMNS;
  Element values[VALUES][MOST + LANES] = {};
  for (int64_t i = 0; i < rows; i += VALUES, to += TILE_COLUMNS) {
    for (int64_t k = 0; k < VALUES; k++) {
      if (i + k < rows) read(row + i + k, first, end, values[k]);
      else std::memset(static_cast<void*>(values[k]), 0, sizeof values[k]);
    }
    for (int64_t column = 0, panel = 0; column < end - first; column += TILE_COLUMNS, panel++) {
      float* const place = to + panel * apart;
      for (int64_t k = 0; k < TILE_COLUMNS; k += LANES) {
        if constexpr (VALUES == 1) {
          store(place + k, load(values[0] + column + k));
        } else {
          const Words words = paired(values[0] + column + k, values[1] + column + k);
          std::memcpy(place + k, &words, sizeof words);
        }
      }
    }
  }
}

constexpr int64_t GROUP = 4;  // tiles of rows that are read at once: a panel then serves them all from the cache

// The products of `rows` rows: read(row, to) writes the `length` values of one, and perhaps LANES - 1 more, and
// write(tile, row, count, column) takes the sums of `count` rows and the columns from `column` on. expect(row, count,
// column), before the sums are made, asks for the memory that `write` reads.
template <class Operand, class Read, class Expect, class Write>
void multiply_rows(int64_t rows, int64_t length, const Panels& panels, const Read& read, const Expect& expect,
                   const Write& write) {
  using Element = typename Operand::Element;
  // In words; an odd number of cache lines, so that the rows of a tile don't meet in the same set.
  const int64_t stride = (up(panels.steps + LANES, 16) | 1) * 16;
  parallel(up(rows, TILE_ROWS), TILE_ROWS * length, [&](int64_t first, int64_t end) {
    Room<float> room(GROUP * TILE_ROWS * stride);
    Tile tile;
    for (int64_t start = first; start < end; start += GROUP) {
      const int64_t start_row = start * TILE_ROWS, end_row = least(least(start + GROUP, end) * TILE_ROWS, rows);
      for (int64_t row = start_row; row < end_row; row++) {
        Element* to = reinterpret_cast<Element*>(room.data + (row - start_row) * stride);
        read(row, to);
        if (length % Operand::VALUES) store(to + length, Floats{}, 1);
      }
      for (int64_t column = 0; column < panels.width; column += TILE_COLUMNS) {
        const float* panel = panels.panel(column / TILE_COLUMNS);
        for (int64_t row = start_row; row < end_row; row += TILE_ROWS) {
          const float* values = room.data + (row - start_row) * stride;
          const int64_t count = least(TILE_ROWS, end_row - row);
          expect(row, count, column);
          for (int64_t s = 0; s == 0 || s < panels.steps; s += CHAIN) {
            const int64_t steps = least(CHAIN, panels.steps - s);
            multiply<Operand>(values + s, stride, 1, panel + s * TILE_COLUMNS, steps, s > 0, &tile[0][0]);
          }
          write(tile, row, count, column);
        }
      }
    }
  });
}

constexpr int64_t PACKED_TILES = 16;  // at once

// BLOCK rows of the first operand of a sum over rows, as at most PACKED_TILES tiles of TILE_ROWS columns:
// read(row, first, end, to) writes those of a row, and perhaps LANES - 1 more.
template <class Operand, class Read>
void pack_tiles(int64_t row, int64_t rows, int64_t first, int64_t end, const Read& read, float* packed) {
  using Element = typename Operand::Element;
  constexpr int64_t VALUES = Operand::VALUES, SIZE = BLOCK / VALUES * TILE_ROWS;
  constexpr int64_t ROWS = 8;  // at once: a value that is read the moment it was written, but by other bounds, waits
  Element values[ROWS][(PACKED_TILES + 1) * TILE_ROWS + LANES];
  for (int64_t start = 0; start < rows; start += ROWS) {
    for (int64_t i = 0; i < ROWS; i++) {
      if (start + i < rows) read(row + start + i, first, end, values[i]);
      else std::memset(static_cast<void*>(values[i]), 0, sizeof values[i]);
    }
    for (int64_t i = 0; i < least(ROWS, rows - start); i += VALUES) {
      float* to = packed + (start + i) / VALUES * TILE_ROWS;
      for (int64_t column = 0; column < end - first; column += TILE_ROWS, to += SIZE) {
        if constexpr (VALUES == 1) {
          std::memcpy(to, values[i] + column, TILE_ROWS * sizeof(float));
        } else {
          const Words words = paired(values[i] + column, values[i + 1] + column);
          std::memcpy(to, &words, TILE_ROWS * sizeof(float));
        }
      }
    }
  }
}

// Into which tasks sums over rows are parted: as many as it takes, all of about the same size, and more where that
// leaves threads without one.
struct SumTasks {
  int64_t height, width;         // of all results
  int64_t tiles, panels, parts;  // of a task at most, and parts of the height

  SumTasks(int64_t height, int64_t width) : height(height), width(width) {
    const int64_t all_tiles = up(height, TILE_ROWS), all_panels = up(width, TILE_COLUMNS);
    int64_t groups = up(all_panels, TASK_PANELS);
    parts = up(all_tiles, TASK_TILES);
    while (parts * groups % threads() && parts * groups < 4 * threads()) {
      (height * groups > width * parts ? parts : groups)++;
    }
    tiles = up(all_tiles, parts), panels = up(all_panels, groups);
    parts = up(all_tiles, tiles);
  }

  int64_t columns() const { return panels * TILE_COLUMNS; }
  int64_t count() const { return up(width, columns()) * parts; }

  // The results of a task: rows top to bottom, columns first to end.
  struct Results {
    int64_t top, bottom, first, end;
  };
  Results of(int64_t task) const {
    const int64_t top = task % parts * tiles * TILE_ROWS, first = task / parts * columns();
    return {top, least(top + tiles * TILE_ROWS, height), first, least(first + columns(), width)};
  }
};

// sums[i][j] = sum over rows of left[row][i] right[row][j], of matrices `height` and `width` wide. Both have
// read(row, first, end, to), which writes values of a row, and perhaps LANES - 1 more, and expect(row, first, end),
// which asks for their memory. finish(i, j, count, sums) takes `count` of the sums of i.
template <class Operand, class Left, class Right, class Finish>
void sum_products(int64_t rows, int64_t height, int64_t width, const Left& left, const Right& right,
                  const Finish& finish) {
  constexpr int64_t SIZE = TILE_ROWS * TILE_COLUMNS, TILE_SIZE = BLOCK / Operand::VALUES * TILE_ROWS;
  constexpr int64_t PANEL_SIZE = BLOCK / Operand::VALUES * TILE_COLUMNS;
  const SumTasks tasks(height, width);
  const auto read_left = [&](int64_t row, int64_t first, int64_t end, auto* to) { left.read(row, first, end, to); };
  const auto read_right = [&](int64_t row, int64_t first, int64_t end, auto* to) { right.read(row, first, end, to); };
  parallel(tasks.count(), tasks.columns() * rows, [&](int64_t first_task, int64_t end_task) {
    Room<float> left_room(tasks.tiles * TILE_SIZE + LANES), right_room(tasks.panels * PANEL_SIZE);
    Room<float> room(tasks.panels * tasks.tiles * SIZE);
    const auto sums = [&](int64_t panel, int64_t tile) { return room.data + (panel * tasks.tiles + tile) * SIZE; };
    for (int64_t task = first_task; task < end_task; task++) {
      const auto [top, bottom, first, end] = tasks.of(task);
      const int64_t tiles = up(bottom - top, TILE_ROWS), panels = up(end - first, TILE_COLUMNS);
      if (!rows) std::memset(room.data, 0, tasks.panels * tasks.tiles * SIZE * sizeof(float));
      for (int64_t row = 0; row < rows; row += BLOCK) {
        const int64_t block = least(BLOCK, rows - row);
        pack_panels<Operand>(row, block, first, end, read_right, right_room.data, PANEL_SIZE);
        for (int64_t tile = 0; tile < tiles; tile += PACKED_TILES) {
          const int64_t column = top + tile * TILE_ROWS, end_column = least(column + PACKED_TILES * TILE_ROWS, bottom);
          pack_tiles<Operand>(row, block, column, end_column, read_left, left_room.data + tile * TILE_SIZE);
        }
        int64_t next = row + BLOCK;
        const int64_t next_end = least(next + BLOCK, rows), at_once = up(BLOCK, panels * tiles);
        for (int64_t panel = 0; panel < panels; panel++) {
          for (int64_t tile = 0; tile < tiles; tile++) {
            for (const int64_t enough = least(next + at_once, next_end); next < enough; next++) {
              left.expect(next, top, bottom), right.expect(next, first, end);
            }
            multiply<Operand>(left_room.data + tile * TILE_SIZE, 1, TILE_ROWS, right_room.data + panel * PANEL_SIZE,
                              words<Operand>(block), row > 0, sums(panel, tile));
          }
        }
      }
      for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t column = first + panel * TILE_COLUMNS, count = least(TILE_COLUMNS, end - column);
        for (int64_t i = top; i < bottom; i++) {
          finish(i, column, count, sums(panel, (i - top) / TILE_ROWS) + (i - top) % TILE_ROWS * TILE_COLUMNS);
        }
      }
    }
  });
}

}  // namespace fastvit::FASTVIT_ISA
