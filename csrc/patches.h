// Patches where they lie: where each starts, how k walks through it, and pixels on their way into shared memory.
#pragma once

#include "pipeline.h"

namespace fastvit {

constexpr int64_t NO_PATCH = -1;  // a row beyond the last patch, or an index in keep that is out of range

// 64 bits of shared memory, where origins are kept.
SIMT_DEVICE int64_t load_wide(shared_address from) {
  const auto words = simt::load_shared<2>(from);
  return static_cast<int64_t>(static_cast<uint64_t>(words.word[1]) << 32 | words.word[0]);
}

// A place of 16 bytes, or a pair of 8, in global memory.
SIMT_DEVICE PackedPlace load_place(const PackedPlace* from) {
  const auto words = simt::load_global<4>(from);
  const uint64_t origin = static_cast<uint64_t>(words.word[1]) << 32 | words.word[0];
  return {static_cast<int64_t>(origin), static_cast<int>(words.word[2]), static_cast<int>(words.word[3])};
}

SIMT_DEVICE PackedToken load_token(const PackedToken* from) {
  const auto words = simt::load_global<2>(from);
  return {static_cast<int>(words.word[0]), static_cast<int>(words.word[1])};
}

// Where the patch of row m starts in the images, in elements.
SIMT_DEVICE int64_t patch_origin(const Patches& p, int m) {
  if (m >= p.rows()) return NO_PATCH;
  const int image = p.over_kept.quotient(m);
  int patch = p.over_kept.remainder(m, image);
  if (p.keep) {
    const int64_t chosen = simt::load_element(p.keep + m);
    if (!p.has_patch(chosen)) return NO_PATCH;
    patch = static_cast<int>(chosen);
  }
  const int y = p.over_grid_width.quotient(patch), x = p.over_grid_width.remainder(patch, y);
  return image * p.batch_stride + static_cast<int64_t>(y) * p.patch_height * p.row_stride +
         static_cast<int64_t>(x) * p.stretch;
}

// The place of row m in packed images.
SIMT_DEVICE PackedPlace packed_place(const Patches& p, int m) {
  return m < p.packed.rows ? load_place(p.packed.places + m) : PackedPlace{NO_PATCH, 0, 0};
}

template <bool PACKED>
SIMT_DEVICE int patch_rows(const Patches& p) {
  return PACKED ? p.packed.rows : p.rows();
}

// The row of the sequence, in a batch of sequences with prefix rows, that holds the token of patch row m.
SIMT_DEVICE int64_t token_row(const Patches& p, int prefix_rows, int m) {
  return m + (static_cast<int64_t>(p.over_kept.quotient(m)) + 1) * prefix_rows;
}

// Walks through k, in the steps that a launch has settled: the offset of a value inside its patch, without a division
// after the first.
struct PixelWalk : PixelPlace {
  SIMT_DEVICE void start(const Patches& p, int k) { static_cast<PixelPlace&>(*this) = p.place_of(k); }
  SIMT_DEVICE void advance(const Patches& p) {
    value += p.step.value, row += p.step.row, plane += p.step.plane;
    if (value >= p.stretch) value -= p.stretch, row++;
    if (row >= p.patch_height) row -= p.patch_height, plane++;
  }
  SIMT_DEVICE void next(const Patches& p) {
    if (++value == p.stretch) value = 0, row++;
    if (row == p.patch_height) row = 0, plane++;
  }
  SIMT_DEVICE int64_t offset(const Strides& strides) const { return plane * strides.plane + row * strides.row + value; }
};

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
        const auto words = simt::load_global<WORDS>(from + first * 4 / sizeof(Image));
        SIMT_UNROLL for (int i = 0; i < WORDS; i++) word[first + i] = words.word[i];
      }
    }
  }
  SIMT_DEVICE void clear() {
    SIMT_UNROLL for (uint32_t& w : word) w = 0;
  }
  // A value is that of a pixel and ZERO: a byte becomes the lowest of the mantissa of 2^23, which takes no shift, no mask
  // and no conversion.
  static constexpr float ZERO = std::is_same_v<Image, uint8_t> ? 0x1p23f : 0.0f;
  SIMT_DEVICE float value(int i) const {
    if constexpr (std::is_same_v<Image, uint8_t>) {
      return simt::from_bits(simt::permute_bytes(word[i / 4], 0x4b000000u, 0x7440u | (i % 4)));
    } else if constexpr (sizeof(Image) == 2) {
      return simt::half_of<Image>(word[i / 2], i % 2);
    } else {
      return simt::from_bits(word[i]);
    }
  }
};

// PIECE pixels at consecutive k of each of PASSES rows, on their way into a tile of Compute values. Where they are of
// the compute type and lie side by side they are copied asynchronously; others pass through registers, where those of
// another type are normalised and rounded. Where vectors do not fit, a piece is as many single pixels as make a word.
template <class Image, class Compute, int VECTOR, int PASSES>
struct PixelCopier {
  static constexpr int SIZE = sizeof(Compute);
  static constexpr int PIECE = VECTOR * SIZE < 4 ? 4 / SIZE : VECTOR, WORDS = PIECE * SIZE / 4;
  static constexpr bool SINGLE = VECTOR < PIECE;
  static constexpr bool CONVERTED = !std::is_same_v<Image, Compute>, ASYNC = !CONVERTED && !SINGLE;
  RawPixels<Image, PIECE> raw[ASYNC ? 1 : PASSES];

  // Of a piece, the same for every pass; the shift with what a value is besides its pixel. Of uint8 it is an integer from
  // 0 to 255, whose sum with 2^23 is exact.
  struct Normaliser {
    float shift[PIECE], scale[PIECE];
  };

  // `offset` is the walk's, with the strides of the patch's image; `origin` < 0: no such patch, zeros.
  SIMT_DEVICE void start(const Patches& p, const PixelWalk& walk, const Strides& strides, int64_t offset, int k,
                         int64_t origin, int pass, shared_address to) {
    const Image* images = static_cast<const Image*>(p.images);
    const bool is_inside = origin >= 0 && k < p.k_length;
    const Image* from = is_inside ? images + (origin + offset) : images;
    if constexpr (ASYNC) {
      simt::copy_async<PIECE * SIZE>(to, from, is_inside);
    } else {
      raw[pass].clear();
      if (!is_inside) return;
      if constexpr (SINGLE) {
        load_pair(p, walk, strides, k, images + origin, raw[pass]);
      } else {
        raw[pass].load(from);
      }
    }
  }

  // Converts what `start` left in registers; `place(pass)` is where each pass goes.
  template <class Place>
  SIMT_DEVICE void finish(const Patches& p, int k, Place place) {
    if constexpr (!ASYNC) {
      const Normaliser normaliser = normaliser_of(p, k);
      SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) finish(pass, normaliser, place(pass));
    }
  }

  static SIMT_DEVICE Normaliser normaliser_of(const Patches& p, int k) {
    Normaliser found;
    SIMT_UNROLL for (int i = 0; i < PIECE; i++) found.shift[i] = found.scale[i] = 0.0f;
    if constexpr (CONVERTED) {
      if (k < p.k_padded) {
        load_piece(p.normaliser + k, found.shift);
        load_piece(p.normaliser + p.k_padded + k, found.scale);
      }
    }
    if constexpr (std::is_same_v<Image, uint8_t>) {
      SIMT_UNROLL for (float& shift : found.shift) shift += RawPixels<Image, PIECE>::ZERO;
    }
    return found;
  }

  SIMT_DEVICE void finish(int pass, const Normaliser& normaliser, shared_address to) const {
    float value[PIECE];
    SIMT_UNROLL for (int i = 0; i < PIECE; i++) {
      value[i] = raw[pass].value(i);
      if constexpr (CONVERTED) value[i] -= normaliser.shift[i];
      if constexpr (CONVERTED && !std::is_same_v<Image, uint8_t>) value[i] *= normaliser.scale[i];  // of uint8 it is 1
    }
    simt::Vector<WORDS> words;
    SIMT_UNROLL for (int i = 0; i < WORDS; i++) {
      if constexpr (SIZE == 2) {
        words.word[i] = simt::pack<Compute>(value[2 * i], value[2 * i + 1]);
      } else {
        words.word[i] = simt::bits(value[i]);
      }
    }
    simt::store_shared<WORDS>(to, words);
  }

 private:
  // Pixels that may lie in different rows, at any address.
  static SIMT_DEVICE void load_pair(const Patches& p, PixelWalk walk, const Strides& strides, int k,
                                    const Image* patch, RawPixels<Image, PIECE>& to) {
    constexpr int BITS = 8 * static_cast<int>(sizeof(Image)), PER_WORD = BITS < 32 ? 32 / BITS : 1;
    SIMT_UNROLL for (int i = 0; i < PIECE; i++) {
      if (k + i < p.k_length) {
        RawPixels<Image, 1> one;
        one.load(patch + walk.offset(strides));
        to.word[i / PER_WORD] |= one.word[0] << (BITS * (i % PER_WORD));
      }
      walk.next(p);
    }
  }

  static SIMT_DEVICE void load_piece(const float* from, float (&values)[PIECE]) {
    if constexpr (PIECE == 8) {
      load(from, values);
    } else if constexpr (PIECE == 4 || PIECE == 2) {
      const auto words = simt::load_global<PIECE>(from);
      SIMT_UNROLL for (int i = 0; i < PIECE; i++) values[i] = simt::from_bits(words.word[i]);
    } else {
      values[0] = simt::load_element(from);
    }
  }
};

}  // namespace fastvit
