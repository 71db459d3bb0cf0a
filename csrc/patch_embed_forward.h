// patch_embed, forward: an implicit GEMM from the image to finished tokens.
//
// tokens[m, d] = scale * sum_k pixel(m, k) W'[d, k] + table[position of m, d]: a block computes a tile of BM patches by
// BN columns, BK values of k at a time. Pixels and weights of the next steps are on their way into shared memory while
// the tensor cores multiply the current ones; no patch matrix exists anywhere else. 16-bit pixels of the compute type
// are copied asynchronously; others pass through registers, where they are normalised and rounded.
#pragma once

#include "numeric.h"
#include "parameters.h"
#include "simt/launch.h"

namespace fastvit {

using simt::shared_address;

template <int BM_, int BN_, int BK_, int WARP_M_, int WARP_N_, int STAGES_, int BLOCKS_>
struct ForwardTile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, WARP_M = WARP_M_, WARP_N = WARP_N_, STAGES = STAGES_;
  static constexpr int BLOCKS = BLOCKS_;  // a multiprocessor is to hold
  static constexpr int THREADS = (BM / WARP_M) * (BN / WARP_N) * 32;
  static constexpr int PIXEL_BYTES = BM * BK * 2, WEIGHT_BYTES = BN * BK * 2, STAGE_BYTES = PIXEL_BYTES + WEIGHT_BYTES;
  // After the last step the same memory holds, for each warp, 16 rows of sums; padding keeps banks apart.
  static constexpr int SUMS_STRIDE = WARP_N + 8;
  static constexpr int SUMS_BYTES = 16 * SUMS_STRIDE * 4, ALL_SUMS_BYTES = THREADS / 32 * SUMS_BYTES;
  static constexpr int PIPELINE_BYTES = STAGES * STAGE_BYTES > ALL_SUMS_BYTES ? STAGES * STAGE_BYTES : ALL_SUMS_BYTES;
  static constexpr int SHARED_BYTES = PIPELINE_BYTES + BM * 8;  // and the origin of each row's patch
};

constexpr int64_t NO_PATCH = -1;   // a row beyond the last patch
constexpr int64_t BAD_PATCH = -2;  // an index in keep that is out of range

// Where the patch of row m starts in the images, in elements.
SIMT_DEVICE int64_t patch_origin(const PatchEmbed& p, int64_t m) {
  if (m >= static_cast<int64_t>(p.batch) * p.kept) return NO_PATCH;
  const int64_t image = m / p.kept;
  int64_t patch = m - image * p.kept;
  if (p.keep) {
    patch = simt::load_element(p.keep + m);
    if (patch < 0 || patch >= p.patches) return BAD_PATCH;
  }
  const int64_t y = patch / p.grid_width, x = patch - y * p.grid_width;
  return image * p.batch_stride + y * p.patch_height * p.row_stride + x * p.stretch;
}

// Walks through k in steps of BK: the offset of a value inside its patch, without a division after the first.
struct PixelWalk {
  int plane, row, value;
  int plane_step, row_step, value_step;

  SIMT_DEVICE void start(const PatchEmbed& p, int k, int step) {
    split(p, k, plane, row, value);
    split(p, step, plane_step, row_step, value_step);
  }
  SIMT_DEVICE void advance(const PatchEmbed& p) {
    value += value_step, row += row_step, plane += plane_step;
    if (value >= p.stretch) value -= p.stretch, row++;
    if (row >= p.patch_height) row -= p.patch_height, plane++;
  }
  SIMT_DEVICE int64_t offset(const PatchEmbed& p) const {
    return plane * p.plane_stride + row * p.row_stride + value;
  }

 private:
  static SIMT_DEVICE void split(const PatchEmbed& p, int k, int& plane, int& row, int& value) {
    const int per_plane = p.patch_height * p.stretch;
    plane = k / per_plane;
    row = (k - plane * per_plane) / p.stretch;
    value = k - plane * per_plane - row * p.stretch;
  }
};

// Byte offset of (row, column) in a [rows, BK] tile of 16-bit values. The 16-byte chunks of a row change places with
// the row, so that the eight rows ldmatrix reads at once lie in different banks.
template <int BK>
SIMT_DEVICE uint32_t swizzled(int row, int column) {
  static_assert(BK == 32 || BK == 64, "rows of 64 or 128 bytes");
  const int phase = BK == 64 ? row & 7 : row >> 1 & 3;
  return row * BK * 2 + (((column >> 3) ^ phase) << 4) + (column & 7) * 2;
}

// VECTOR pixels as they lie in memory, by the widest load.
template <class Image, int VECTOR>
struct RawPixels {
  static constexpr int BYTES = VECTOR * static_cast<int>(sizeof(Image));
  uint32_t word[BYTES < 4 ? 1 : BYTES / 4];

  SIMT_DEVICE void load(const Image* from) {
    if constexpr (BYTES == 1) {
      word[0] = simt::load_element(reinterpret_cast<const uint8_t*>(from));
    } else if constexpr (BYTES == 2) {
      word[0] = simt::load_element(reinterpret_cast<const uint16_t*>(from));
    } else {
      constexpr int WORDS = BYTES < 16 ? BYTES / 4 : 4;
      SIMT_UNROLL for (int first = 0; first < BYTES / 4; first += WORDS) {
        const auto part = simt::load_global<WORDS>(reinterpret_cast<const uint32_t*>(from) + first);
        SIMT_UNROLL for (int i = 0; i < WORDS; i++) word[first + i] = part.word[i];
      }
    }
  }
  SIMT_DEVICE void clear() {
    SIMT_UNROLL for (uint32_t& w : word) w = 0;
  }
  SIMT_DEVICE float value(int i) const {
    if constexpr (std::is_same_v<Image, uint8_t>) {
      return static_cast<float>(word[i / 4] >> (8 * (i % 4)) & 0xff);
    } else if constexpr (sizeof(Image) == 2) {
      return simt::half_of<Image>(word[i / 2], i % 2);
    } else {
      return simt::from_bits(word[i]);
    }
  }
};

// Two pixels that may lie in different rows, at any address.
template <class Image>
SIMT_DEVICE void load_pixel_pair(const PatchEmbed& p, PixelWalk walk, int k, const Image* images, int64_t origin,
                                 bool is_inside, RawPixels<Image, 2>& to) {
  constexpr int BITS = 8 * static_cast<int>(sizeof(Image)), PER_WORD = BITS < 32 ? 32 / BITS : 1;
  to.clear();
  if (!is_inside) return;
  SIMT_UNROLL for (int i = 0; i < 2; i++) {
    if (k + i < p.k_length) {
      RawPixels<Image, 1> one;
      one.load(images + origin + walk.offset(p));
      to.word[i / PER_WORD] |= one.word[0] << (BITS * (i % PER_WORD));
    }
    if (++walk.value == p.stretch) walk.value = 0, walk.row++;
    if (walk.row == p.patch_height) walk.row = 0, walk.plane++;
  }
}

SIMT_DEVICE float normalised(const PatchEmbed& p, float pixel, int k) {
  if (!p.normaliser) return pixel;
  return (pixel - simt::load_element(p.normaliser + k)) * simt::load_element(p.normaliser + p.k_padded + k);
}

// The share of one thread in the loads of a step, and the state it keeps between steps.
template <class Image, class Compute, int VECTOR, class Tile>
struct ForwardLoader {
  static constexpr bool ASYNC = std::is_same_v<Image, Compute> && VECTOR > 1;
  static constexpr int PIECE = VECTOR > 1 ? VECTOR : 2;  // pixels a thread stores to shared memory at once
  static constexpr int PIECES = Tile::BK / PIECE, ROWS = Tile::THREADS / PIECES, PASSES = Tile::BM / ROWS;
  static constexpr int WEIGHT_PIECES = Tile::BK / 8, WEIGHT_ROWS = Tile::THREADS / WEIGHT_PIECES;
  static constexpr int WEIGHT_PASSES = Tile::BN / WEIGHT_ROWS;
  static_assert(ROWS % 8 == 0 && WEIGHT_ROWS % 8 == 0, "the swizzle must not change from pass to pass");
  static_assert(ROWS * PASSES == Tile::BM && WEIGHT_ROWS * WEIGHT_PASSES == Tile::BN, "tiles are whole passes");

  const PatchEmbed& p;
  shared_address stages, origins;
  int first_column;
  int pixel_row, pixel_k, weight_row, weight_k;
  uint32_t pixel_place, weight_place;
  PixelWalk walk;
  RawPixels<Image, PIECE> raw[ASYNC ? 1 : PASSES];

  SIMT_DEVICE ForwardLoader(const PatchEmbed& p, shared_address stages, shared_address origins, int first_column)
      : p(p), stages(stages), origins(origins), first_column(first_column) {
    const int thread = simt::thread_index();
    pixel_row = thread / PIECES, pixel_k = thread % PIECES * PIECE;
    weight_row = thread / WEIGHT_PIECES, weight_k = thread % WEIGHT_PIECES * 8;
    pixel_place = swizzled<Tile::BK>(pixel_row, pixel_k);
    weight_place = Tile::PIXEL_BYTES + swizzled<Tile::BK>(weight_row, weight_k);
    walk.start(p, pixel_k, Tile::BK);
  }

  // Starts the loads of the next step, whose place is `stage`.
  SIMT_DEVICE void start(int stage) {
    const shared_address base = stages + stage * Tile::STAGE_BYTES;
    SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) {
      const auto words = simt::load_shared<2>(origins + (pixel_row + pass * ROWS) * 8);
      const auto origin = static_cast<int64_t>(static_cast<uint64_t>(words.word[1]) << 32 | words.word[0]);
      load_pixels(base, pass, origin);
    }
    SIMT_UNROLL for (int pass = 0; pass < WEIGHT_PASSES; pass++) {
      const int column = first_column + weight_row + pass * WEIGHT_ROWS;
      const bool is_inside = column < p.width && weight_k < p.k_padded;
      const Compute* weight = static_cast<const Compute*>(p.weight);
      if (is_inside) weight += static_cast<int64_t>(column) * p.k_padded + weight_k;
      simt::copy_async<16>(base + weight_place + pass * WEIGHT_ROWS * Tile::BK * 2, weight, is_inside);
    }
    if constexpr (ASYNC) advance();
  }

  // Converts the pixels that `start` left in registers. Called once the multiplications of a step are under way.
  SIMT_DEVICE void finish(int stage) {
    if constexpr (!ASYNC) {
      const shared_address base = stages + stage * Tile::STAGE_BYTES + pixel_place;
      SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) {
        simt::Vector<PIECE / 2> words;
        SIMT_UNROLL for (int i = 0; i < PIECE / 2; i++) {
          words.word[i] = simt::pack<Compute>(pixel(pass, 2 * i), pixel(pass, 2 * i + 1));
        }
        simt::store_shared<PIECE / 2>(base + pass * ROWS * Tile::BK * 2, words);
      }
      advance();
    }
  }

 private:
  SIMT_DEVICE void load_pixels(shared_address base, int pass, int64_t origin) {
    const Image* images = static_cast<const Image*>(p.images);
    const bool is_inside = origin >= 0 && pixel_k < p.k_length;
    const Image* from = is_inside ? images + origin + walk.offset(p) : images;
    if constexpr (ASYNC) {
      const shared_address target = base + pixel_place + pass * ROWS * Tile::BK * 2;
      simt::copy_async<PIECE * 2>(target, from, is_inside);
    } else if constexpr (VECTOR > 1) {
      if (is_inside) {
        raw[pass].load(from);
      } else {
        raw[pass].clear();
      }
    } else {
      load_pixel_pair(p, walk, pixel_k, images, origin, is_inside, raw[pass]);
    }
  }

  SIMT_DEVICE float pixel(int pass, int i) const {
    const float value = raw[pass].value(i);
    return pixel_k + i < p.k_length ? normalised(p, value, pixel_k + i) : value;
  }

  SIMT_DEVICE void advance() {
    pixel_k += Tile::BK, weight_k += Tile::BK;
    walk.advance(p);
  }
};

// Writes the origin of each row's patch to shared memory.
template <class Tile>
SIMT_DEVICE void find_origins(const PatchEmbed& p, shared_address origins, int64_t first_row) {
  for (int row = simt::thread_index(); row < Tile::BM; row += Tile::THREADS) {
    const auto origin = static_cast<uint64_t>(patch_origin(p, first_row + row));
    simt::store_shared<2>(origins + row * 8, {{static_cast<uint32_t>(origin), static_cast<uint32_t>(origin >> 32)}});
  }
}

// Multiplies one stage: each warp WARP_M rows by WARP_N columns.
template <class Compute, class Tile>
SIMT_DEVICE void multiply_stage(shared_address stage, int warp_row, int warp_column,
                                float (&sums)[Tile::WARP_M / 16][Tile::WARP_N / 8][4]) {
  constexpr int BK = Tile::BK, ROWS = Tile::WARP_M / 16, COLUMNS = Tile::WARP_N / 8;
  const int lane = simt::thread_index() % 32;
  // Stepping 16 values of k further only flips bits of the chunk, so the swizzle is computed once.
  const uint32_t pixels = stage + swizzled<BK>(warp_row + lane % 16, lane / 16 * 8);
  const uint32_t weights =
      stage + Tile::PIXEL_BYTES + swizzled<BK>(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  SIMT_UNROLL for (int k = 0; k < BK; k += 16) {
    uint32_t a[ROWS][4], b[COLUMNS / 2][4];
    SIMT_UNROLL for (int i = 0; i < ROWS; i++) simt::load_matrices(a[i], (pixels ^ k * 2) + i * 16 * BK * 2);
    SIMT_UNROLL for (int j = 0; j < COLUMNS / 2; j++) simt::load_matrices(b[j], (weights ^ k * 2) + j * 16 * BK * 2);
    SIMT_UNROLL for (int i = 0; i < ROWS; i++) {
      SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
        simt::multiply_add<Compute>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// COUNT finished values: scaled sums plus the table's row, rounded once. NaN for a patch that does not exist.
template <int COUNT, class Out>
SIMT_DEVICE void finish_token(const PatchEmbed& p, int64_t m, int64_t origin, int column, const float* sums) {
  const int64_t image = m / p.kept, place = m - image * p.kept;
  int64_t patch = place;
  if (p.keep && origin != BAD_PATCH) patch = simt::load_element(p.keep + m);
  float value[COUNT];
  load(p.table + (p.prefix_rows + patch) * p.width + column, value);
  SIMT_UNROLL for (int i = 0; i < COUNT; i++) {
    value[i] += sums[i] * p.scale;
    if (origin == BAD_PATCH) value[i] = simt::from_bits(0x7fc00000u);
  }
  const int64_t row = image * (p.prefix_rows + p.kept) + p.prefix_rows + place;
  store(static_cast<Out*>(p.tokens) + row * p.width + column, value);
}

// The tile's sums go through shared memory, 16 rows of a warp at a time, so that a lane stores eight columns at once.
template <class Out, class Tile>
SIMT_DEVICE void finish_tile(const PatchEmbed& p, shared_address pipeline, shared_address origins, int64_t first_row,
                             int first_column, int warp_row, int warp_column, bool is_wide,
                             const float (&sums)[Tile::WARP_M / 16][Tile::WARP_N / 8][4]) {
  constexpr int LANES_A_ROW = Tile::WARP_N / 8, ROWS_A_PASS = 32 / LANES_A_ROW;
  const int thread = simt::thread_index(), lane = thread % 32;
  const shared_address slab = pipeline + thread / 32 * Tile::SUMS_BYTES;
  const int column = first_column + warp_column + lane % LANES_A_ROW * 8;
  SIMT_UNROLL for (int i = 0; i < Tile::WARP_M / 16; i++) {
    SIMT_UNROLL for (int j = 0; j < Tile::WARP_N / 8; j++) {
      SIMT_UNROLL for (int half = 0; half < 2; half++) {
        const int place = (lane / 4 + half * 8) * Tile::SUMS_STRIDE + j * 8 + lane % 4 * 2;
        const float *pair = sums[i][j] + half * 2;
        simt::store_shared<2>(slab + place * 4, {{simt::bits(pair[0]), simt::bits(pair[1])}});
      }
    }
    simt::sync_warp();
    SIMT_UNROLL for (int pass = 0; pass < 16 / ROWS_A_PASS; pass++) {
      const int row = pass * ROWS_A_PASS + lane / LANES_A_ROW;
      const shared_address from = slab + (row * Tile::SUMS_STRIDE + lane % LANES_A_ROW * 8) * 4;
      float value[8];
      SIMT_UNROLL for (int half = 0; half < 2; half++) {
        const auto words = simt::load_shared<4>(from + half * 16);
        SIMT_UNROLL for (int e = 0; e < 4; e++) value[half * 4 + e] = simt::from_bits(words.word[e]);
      }
      const int tile_row = warp_row + i * 16 + row;
      const auto words = simt::load_shared<2>(origins + tile_row * 8);
      const auto origin = static_cast<int64_t>(static_cast<uint64_t>(words.word[1]) << 32 | words.word[0]);
      if (origin == NO_PATCH) continue;
      if (is_wide && column < p.width) {
        finish_token<EIGHT, Out>(p, first_row + tile_row, origin, column, value);
      } else {
        SIMT_UNROLL for (int e = 0; e < 8; e++) {
          if (column + e < p.width) finish_token<1, Out>(p, first_row + tile_row, origin, column + e, value + e);
        }
      }
    }
    simt::sync_warp();
  }
}

// Rows of the table as they are: class and register tokens.
template <class Out, class Tile>
SIMT_DEVICE void copy_prefix(const PatchEmbed& p, int64_t first_row, int first_column) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.prefix_rows;
  for (int index = simt::thread_index(); index < Tile::BM * Tile::BN; index += Tile::THREADS) {
    const int64_t m = first_row + index / Tile::BN;
    const int column = first_column + index % Tile::BN;
    if (m >= rows || column >= p.width) continue;
    const int64_t image = m / p.prefix_rows, row = m - image * p.prefix_rows;
    const float value[1] = {simt::load_element(p.table + row * p.width + column)};
    const int64_t token = image * (p.prefix_rows + p.kept) + row;
    store(static_cast<Out*>(p.tokens) + token * p.width + column, value);
  }
}

template <class Image, class Compute, class Out, int VECTOR, class Tile>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_forward(PatchEmbed p) {
  constexpr int BM = Tile::BM, BN = Tile::BN, STAGES = Tile::STAGES, WARPS_A_ROW = BN / Tile::WARP_N;
  // Blocks side by side in x share their patches; behind the tiles of patches come those of the prefix.
  const int tiles_n = (p.width + BN - 1) / BN;
  const int64_t patch_rows = static_cast<int64_t>(p.batch) * p.kept;
  const int64_t patch_tiles = (patch_rows + BM - 1) / BM, tile = simt::block_x() / tiles_n;
  const int first_column = (simt::block_x() - static_cast<int>(tile) * tiles_n) * BN;
  if (tile >= patch_tiles) return copy_prefix<Out, Tile>(p, (tile - patch_tiles) * BM, first_column);

  const int64_t first_row = tile * BM;
  const shared_address pipeline = simt::shared_base(), origins = pipeline + Tile::PIPELINE_BYTES;
  find_origins<Tile>(p, origins, first_row);
  simt::sync_threads();

  ForwardLoader<Image, Compute, VECTOR, Tile> loader(p, pipeline, origins, first_column);
  const int steps = (p.k_length + Tile::BK - 1) / Tile::BK;
  SIMT_UNROLL for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < steps) {
      loader.start(stage);
      loader.finish(stage);
    }
    simt::copy_commit();
  }

  const int warp = simt::thread_index() / 32;
  const int warp_row = warp / WARPS_A_ROW * Tile::WARP_M, warp_column = warp % WARPS_A_ROW * Tile::WARP_N;
  float sums[Tile::WARP_M / 16][Tile::WARP_N / 8][4] = {};
  int reading = 0, writing = STAGES - 1;
  for (int step = 0; step < steps; step++) {
    simt::copy_wait<STAGES - 2>();
    simt::sync_threads();
    const bool has_more = step + STAGES - 1 < steps;
    if (has_more) loader.start(writing);
    simt::copy_commit();
    multiply_stage<Compute, Tile>(pipeline + reading * Tile::STAGE_BYTES, warp_row, warp_column, sums);
    if (has_more) loader.finish(writing);
    reading = reading + 1 == STAGES ? 0 : reading + 1;
    writing = writing + 1 == STAGES ? 0 : writing + 1;
  }
  simt::copy_wait<0>();
  simt::sync_threads();
  const bool is_wide = p.width % EIGHT == 0 && is_aligned(p.tokens) && is_aligned(p.table);
  finish_tile<Out, Tile>(p, pipeline, origins, first_row, first_column, warp_row, warp_column, is_wide, sums);
}

// Launcher

// The widest vector of pixels that every run of a patch consists of: 8, 2 or 1.
inline int pixel_vector(const PatchEmbed& p, int element_bytes) {
  for (const int vector : {8, 2}) {
    const bool fits = p.stretch % vector == 0 && p.row_stride % vector == 0 && p.plane_stride % vector == 0 &&
                      p.batch_stride % vector == 0;
    const int bytes = vector * element_bytes < 16 ? vector * element_bytes : 16;
    if (fits && reinterpret_cast<uintptr_t>(p.images) % bytes == 0) return vector;
  }
  return 1;
}

using SmallForwardTile = ForwardTile<64, 64, 32, 32, 32, 3, 2>;

template <class Image, class Compute, class Out>
void launch_patch_embed(const PatchEmbed& p, simt::Stream& stream) {
  using Tile = SmallForwardTile;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.kept, prefix = static_cast<int64_t>(p.batch) * p.prefix_rows;
  const int tiles = simt::blocks_for(rows, Tile::BM) + simt::blocks_for(prefix, Tile::BM);
  const int vector = pixel_vector(p, sizeof(Image));
  const auto kernel = vector == 8   ? patch_embed_forward<Image, Compute, Out, 8, Tile>
                      : vector == 2 ? patch_embed_forward<Image, Compute, Out, 2, Tile>
                                    : patch_embed_forward<Image, Compute, Out, 1, Tile>;
  stream.launch(kernel, tiles * simt::blocks_for(p.width, Tile::BN), 1, Tile::THREADS, Tile::SHARED_BYTES, p);
}

}  // namespace fastvit
