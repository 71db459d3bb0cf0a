// patch_embed, forward: an implicit GEMM from the image to finished tokens.
//
// tokens[m, d] = scale * sum_k pixel(m, k) W'[d, k] + table[position of m, d]: a block computes a tile of BM patches by
// BN columns, BK values of k at a time. Pixels and weights of the next steps are on their way into shared memory while
// the current ones are multiplied; no patch matrix exists anywhere else.
#pragma once

#include "patches.h"
#include "products.h"

namespace fastvit {

// Each warp passes 16 rows by 32 columns of sums through a slab of its own; padding keeps their banks apart.
constexpr int SLAB_COLUMNS = 32, SLAB_STRIDE = SLAB_COLUMNS + 8, SLAB_BYTES = 16 * SLAB_STRIDE * 4;

// After the pipeline its memory holds the slabs. Behind it, the origin of each row's patch, and of packed images its
// strides.
template <class Tile, bool PACKED = false>
struct ForwardMemory {
  static constexpr int SLABS_BYTES = Tile::THREADS / 32 * SLAB_BYTES, ORIGINS_BYTES = Tile::BM * (PACKED ? 16 : 8);
  static constexpr int ORIGINS = Tile::PIPELINE_BYTES > SLABS_BYTES ? Tile::PIPELINE_BYTES : SLABS_BYTES;
  static constexpr int BYTES = ORIGINS + ORIGINS_BYTES;
};

SIMT_DEVICE int64_t load_origin(shared_address origins, int row) {
  return load_wide(origins + row * 8);
}

SIMT_DEVICE void store_origin(shared_address origins, int row, int64_t origin) {
  const auto word = static_cast<uint64_t>(origin);
  simt::store_shared<2>(origins + row * 8, {{static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)}});
}

SIMT_DEVICE void store_place(shared_address places, int row, const PackedPlace& place) {
  const auto origin = static_cast<uint64_t>(place.origin);
  simt::store_shared<4>(places + row * 16,
                        {{static_cast<uint32_t>(origin), static_cast<uint32_t>(origin >> 32),
                          static_cast<uint32_t>(place.plane_stride), static_cast<uint32_t>(place.row_stride)}});
}

SIMT_DEVICE PackedPlace load_place(shared_address places, int row) {
  const auto words = simt::load_shared<4>(places + row * 16);
  const uint64_t origin = static_cast<uint64_t>(words.word[1]) << 32 | words.word[0];
  return {static_cast<int64_t>(origin), static_cast<int>(words.word[2]), static_cast<int>(words.word[3])};
}

template <class Tile, bool PACKED>
SIMT_DEVICE void note_origins(const Patches& p, shared_address origins, int first_row) {
  for (int row = simt::thread_index(); row < Tile::BM; row += Tile::THREADS) {
    if constexpr (PACKED) {
      store_place(origins, row, packed_place(p, first_row + row));
    } else {
      store_origin(origins, row, patch_origin(p, first_row + row));
    }
  }
}

// A matrix whose rows are the second operand: W', or the transposed weight.
struct WeightRows {
  const void* data;
  int rows, length;  // a multiple of 8
};

// The share of one thread in the loads of a step's pixels, and the state it keeps between steps.
template <class Image, int VECTOR, class Tile, bool PACKED>
struct PixelLoader {
  static constexpr int PIECE = VECTOR * Tile::SIZE < 4 ? 4 / Tile::SIZE : VECTOR;
  static constexpr int PIECES = Tile::BK / PIECE, ROWS = Tile::THREADS / PIECES, PASSES = Tile::BM / ROWS;
  static_assert(ROWS % 8 == 0, "the swizzle must not change from pass to pass");
  static_assert(ROWS * PASSES == Tile::BM, "tiles are whole passes");

  const Patches& p;
  shared_address origins;
  int pixel_row, pixel_k;
  uint32_t pixel_place;
  PixelWalk walk;
  PixelCopier<Image, typename Tile::Compute, VECTOR, PASSES> pixels;

  SIMT_DEVICE PixelLoader(const Patches& p, shared_address origins) : p(p), origins(origins) {
    pixel_row = simt::thread_index() / PIECES;
    rewind();
    pixel_place = swizzled<Tile::ROW_BYTES>(pixel_row, pixel_k * Tile::SIZE);
  }

  // Back to the first step.
  SIMT_DEVICE void rewind() {
    pixel_k = simt::thread_index() % PIECES * PIECE;
    walk.start(p, pixel_k);
  }

  // Starts the loads of the next step.
  SIMT_DEVICE void start(shared_address stage) {
    const Strides strides = p.strides();
    const int64_t offset = walk.offset(strides);
    SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) {
      const int row = pixel_row + pass * ROWS;
      const shared_address to = stage + pixel_place + pass * ROWS * Tile::ROW_BYTES;
      if constexpr (PACKED) {
        const PackedPlace place = load_place(origins, row);
        const Strides own{place.plane_stride, place.row_stride};
        pixels.start(p, walk, own, walk.offset(own), pixel_k, place.origin, pass, to);
      } else {
        pixels.start(p, walk, strides, offset, pixel_k, load_origin(origins, row), pass, to);
      }
    }
  }

  SIMT_DEVICE void finish(shared_address stage) {
    pixels.finish(p, pixel_k, [&](int pass) { return stage + pixel_place + pass * ROWS * Tile::ROW_BYTES; });
    pixel_k += Tile::BK;
    walk.advance(p);
  }
};

// The same with the weights.
template <class Image, int VECTOR, class Tile, bool PACKED>
struct ForwardLoader : PixelLoader<Image, VECTOR, Tile, PACKED> {
  using Base = PixelLoader<Image, VECTOR, Tile, PACKED>;
  using Compute = typename Tile::Compute;
  static constexpr int WEIGHT_PIECE = 16 / Tile::SIZE, WEIGHT_PIECES = Tile::BK / WEIGHT_PIECE;
  static constexpr int WEIGHT_ROWS = Tile::THREADS / WEIGHT_PIECES, WEIGHT_PASSES = Tile::BN / WEIGHT_ROWS;
  static_assert(WEIGHT_ROWS % 8 == 0, "the swizzle must not change from pass to pass");
  static_assert(WEIGHT_ROWS * WEIGHT_PASSES == Tile::BN, "tiles are whole passes");

  WeightRows weight;
  int first_column, weight_row, weight_k;
  uint32_t weight_place;

  SIMT_DEVICE ForwardLoader(const Patches& p, const WeightRows& weight, shared_address origins, int first_column)
      : Base(p, origins), weight(weight), first_column(first_column) {
    const int thread = simt::thread_index();
    weight_row = thread / WEIGHT_PIECES, weight_k = thread % WEIGHT_PIECES * WEIGHT_PIECE;
    weight_place = Tile::FIRST_BYTES + swizzled<Tile::ROW_BYTES>(weight_row, weight_k * Tile::SIZE);
  }

  SIMT_DEVICE void start(shared_address stage) {
    Base::start(stage);
    SIMT_UNROLL for (int pass = 0; pass < WEIGHT_PASSES; pass++) {
      const int row = first_column + weight_row + pass * WEIGHT_ROWS;
      const bool is_inside = row < weight.rows && weight_k < weight.length;
      const Compute* from = static_cast<const Compute*>(weight.data);
      if (is_inside) from += static_cast<int64_t>(row) * weight.length + weight_k;
      simt::copy_async<16>(stage + weight_place + pass * WEIGHT_ROWS * Tile::ROW_BYTES, from, is_inside);
    }
    weight_k += Tile::BK;
  }
};

// The sums of a tile of patches, from the tile's first row and column on.
template <class Image, int VECTOR, class Tile, bool PACKED = false, class Product>
SIMT_DEVICE void multiply_tile(const Patches& p, const WeightRows& weight, shared_address memory, int first_row,
                               int first_column, Product& product) {
  const shared_address origins = memory + ForwardMemory<Tile, PACKED>::ORIGINS;
  note_origins<Tile, PACKED>(p, origins, first_row);
  simt::sync_threads();
  ForwardLoader<Image, VECTOR, Tile, PACKED> loader(p, weight, origins, first_column);
  run_pipeline<Tile>(memory, (p.k_length + Tile::BK - 1) / Tile::BK, loader, product);
}

// The sums go through shared memory, a slab of a warp at a time, so that a lane has eight columns of a row:
// `put(row of the tile, column of the tile, eight sums)`.
template <class Tile, class Put>
SIMT_DEVICE void finish_tile(const Sums<Tile>& sums, shared_address slabs, Put put) {
  constexpr int LANES_A_ROW = SLAB_COLUMNS / 8, ROWS_A_PASS = 32 / LANES_A_ROW;
  constexpr int SLABS_A_ROW = Tile::WARP_N / SLAB_COLUMNS;
  const int thread = simt::thread_index(), lane = thread % 32;
  const shared_address slab = slabs + thread / 32 * SLAB_BYTES;
  SIMT_UNROLL for (int which = 0; which < Tile::WARP_M / 16 * SLABS_A_ROW; which++) {
    const int i = which / SLABS_A_ROW, first_column = which % SLABS_A_ROW * SLAB_COLUMNS;
    SIMT_UNROLL for (int j = 0; j < LANES_A_ROW; j++) {
      SIMT_UNROLL for (int part = 0; part < 2; part++) {
        const int place = (lane / 4 + part * 8) * SLAB_STRIDE + j * 8 + lane % 4 * 2;
        const float* pair = sums[i][first_column / 8 + j] + part * 2;
        simt::store_shared<2>(slab + place * 4, {{simt::bits(pair[0]), simt::bits(pair[1])}});
      }
    }
    simt::sync_warp();
    SIMT_UNROLL for (int pass = 0; pass < 16 / ROWS_A_PASS; pass++) {
      const int row = pass * ROWS_A_PASS + lane / LANES_A_ROW, column = lane % LANES_A_ROW * 8;
      const shared_address from = slab + (row * SLAB_STRIDE + column) * 4;
      // Every other four lanes begin with the second half of their eight, which lies in the banks the others leave free.
      const int swap = lane / 4 % 2;
      const auto first = simt::load_shared<4>(from + swap * 16), second = simt::load_shared<4>(from + 16 - swap * 16);
      float value[8];
      SIMT_UNROLL for (int e = 0; e < 4; e++) {
        value[e] = simt::from_bits(swap ? second.word[e] : first.word[e]);
        value[4 + e] = simt::from_bits(swap ? first.word[e] : second.word[e]);
      }
      put(Tile::warp_row() + i * 16 + row, Tile::warp_column() + first_column + column, value);
    }
    simt::sync_warp();
  }
}

// COUNT finished values: scaled sums plus the table's row, rounded once. NaN for a patch that does not exist, whose row
// of the table need not be there: `keep` may be longer than the table.
template <int COUNT>
SIMT_DEVICE void finish_token(const PatchEmbed& p, int m, int column, const float* sums) {
  const Patches& pixels = p.pixels;
  const int64_t patch = pixels.keep ? simt::load_element(pixels.keep + m)
                                    : pixels.over_kept.remainder(m, pixels.over_kept.quotient(m));
  const bool is_there = pixels.has_patch(patch);
  float value[COUNT];
  load(p.table + (p.prefix_rows + (is_there ? patch : 0)) * p.width + column, value);
  SIMT_UNROLL for (int i = 0; i < COUNT; i++) {
    value[i] += sums[i] * p.scale;
    if (!is_there) value[i] = simt::from_bits(0x7fc00000u);
  }
  store(p.tokens_type, p.tokens, token_row(pixels, p.prefix_rows, m) * p.width + column, value);
}

// The same for images of any sizes: all patches start from one row, and each has its own of the positions.
template <int COUNT>
SIMT_DEVICE void finish_packed_token(const PatchEmbed& p, int m, int column, const float* sums) {
  const PackedToken at = load_token(p.pixels.packed.tokens + m);
  float value[COUNT], position[COUNT] = {};
  load(p.table + static_cast<int64_t>(p.prefix_rows) * p.width + column, value);
  if (p.positions.data) {
    load(p.positions.type, p.positions.data, static_cast<int64_t>(at.position) * p.width + column, position);
  }
  SIMT_UNROLL for (int i = 0; i < COUNT; i++) value[i] += position[i] + sums[i] * p.scale;
  store(p.tokens_type, p.tokens, static_cast<int64_t>(at.token) * p.width + column, value);
}

// The first token of an image.
template <bool PACKED>
SIMT_DEVICE int64_t first_token(const PatchEmbed& p, int image) {
  const int64_t before = static_cast<int64_t>(image) * p.prefix_rows;
  if constexpr (PACKED) return simt::load_element(p.pixels.packed.table + image) + before;
  return before + static_cast<int64_t>(image) * p.pixels.kept;
}

template <bool PACKED>
SIMT_DEVICE int prefix_rows_of_all(const PatchEmbed& p) {
  return (PACKED ? p.pixels.packed.count : p.pixels.batch) * p.prefix_rows;
}

// Rows of the table as they are: class and register tokens, COUNT columns at a time, by THREADS threads.
template <int COUNT, class Tile, int THREADS, bool PACKED>
SIMT_DEVICE void copy_prefix(const PatchEmbed& p, int first_row, int first_column) {
  constexpr int PIECES = Tile::BN / COUNT;
  const int rows = prefix_rows_of_all<PACKED>(p);
  for (int index = simt::thread_index(); index < Tile::BM * PIECES; index += THREADS) {
    const int m = first_row + index / PIECES, column = first_column + index % PIECES * COUNT;
    if (m >= rows || column >= p.width) continue;
    const int image = m / p.prefix_rows, row = m - image * p.prefix_rows;
    float value[COUNT];
    load(p.table + static_cast<int64_t>(row) * p.width + column, value);
    store(p.tokens_type, p.tokens, (first_token<PACKED>(p, image) + row) * p.width + column, value);
  }
}

template <class Tile, int THREADS = Tile::THREADS, bool PACKED = false>
SIMT_DEVICE void copy_prefix_tile(const PatchEmbed& p, int first_row, int first_column, bool is_wide) {
  if (is_wide) return copy_prefix<EIGHT, Tile, THREADS, PACKED>(p, first_row, first_column);
  copy_prefix<1, Tile, THREADS, PACKED>(p, first_row, first_column);
}

// The tokens of a tile, as finish_tile puts them.
template <bool PACKED>
struct Tokens {
  const PatchEmbed& p;
  int first_row, first_column;
  bool is_wide;

  SIMT_DEVICE void operator()(int row, int column, const float* sums) const {
    row += first_row, column += first_column;
    if (row >= patch_rows<PACKED>(p.pixels)) return;
    if (is_wide && column < p.width) return finish<EIGHT>(row, column, sums);
    SIMT_UNROLL for (int e = 0; e < EIGHT; e++) {
      if (column + e < p.width) finish<1>(row, column + e, sums + e);
    }
  }

 private:
  template <int COUNT>
  SIMT_DEVICE void finish(int m, int column, const float* sums) const {
    if constexpr (PACKED) {
      finish_packed_token<COUNT>(p, m, column, sums);
    } else {
      finish_token<COUNT>(p, m, column, sums);
    }
  }
};

// A block makes a tile. Blocks side by side in x share their patches; tiles of the prefix, short work, come first.
template <class Image, int VECTOR, class Tile, class Product, bool PACKED = false>
SIMT_DEVICE void make_tokens(const PatchEmbed& p) {
  const int tiles_n = (p.width + Tile::BN - 1) / Tile::BN, tile = simt::block_x() / tiles_n;
  const int prefix_tiles = (prefix_rows_of_all<PACKED>(p) + Tile::BM - 1) / Tile::BM;
  const int first_column = (simt::block_x() - tile * tiles_n) * Tile::BN;
  const bool is_wide = p.width % EIGHT == 0 && is_aligned(p.tokens) && (!PACKED || is_aligned(p.positions.data));
  if (tile < prefix_tiles) {
    return copy_prefix_tile<Tile, Tile::THREADS, PACKED>(p, tile * Tile::BM, first_column, is_wide);
  }

  const int first_row = (tile - prefix_tiles) * Tile::BM;
  const shared_address memory = simt::shared_base();
  Product product;
  multiply_tile<Image, VECTOR, Tile, PACKED>(p.pixels, {p.weight, p.width, p.pixels.k_padded}, memory, first_row,
                                             first_column, product);
  finish_tile<Tile>(product.sums, memory, Tokens<PACKED>{p, first_row, first_column, is_wide});
}

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_forward(PatchEmbed p) {
  make_tokens<Image, VECTOR, Tile, Product>(p);
}

// The image's gradient: the same product of gradients and the transposed weight, whose columns k are pixels.
template <class Compute, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_image_gradient(ImageGradient p) {
  const Patches& target = p.target;
  const int tiles_n = (target.k_length + Tile::BN - 1) / Tile::BN, tile = simt::block_x() / tiles_n;
  const int first_row = tile * Tile::BM, first_column = (simt::block_x() - tile * tiles_n) * Tile::BN;
  const shared_address memory = simt::shared_base();
  Product product;
  multiply_tile<Compute, VECTOR, Tile>(p.gradients, {p.weight, target.k_length, p.gradients.k_padded}, memory,
                                       first_row, first_column, product);
  finish_tile<Tile>(product.sums, memory, [&](int row, int column, const float* sums) {
    if (first_row + row >= target.rows()) return;
    PixelWalk walk;
    walk.start(target, first_column + column);
    const int64_t origin = patch_origin(target, first_row + row);
    float value[EIGHT];
    SIMT_UNROLL for (int e = 0; e < EIGHT; e++) {
      const int k = first_column + column + e;
      value[e] = k < target.k_length ? sums[e] * simt::load_element(p.scale + k) : 0.0f;
    }
    if (p.is_wide) {
      if (first_column + column < target.k_length) {
        store(p.target_type, const_cast<void*>(target.images), origin + walk.offset(target.strides()), value);
      }
      return;
    }
    SIMT_UNROLL for (int e = 0; e < EIGHT; e++) {
      const float single[1] = {value[e]};
      if (first_column + column + e < target.k_length) {
        store(p.target_type, const_cast<void*>(target.images), origin + walk.offset(target.strides()), single);
      }
      walk.next(target);
    }
  });
}

}  // namespace fastvit
