// Patches of images as rows of values, in the order in which they lie in memory.
#pragma once

#include "../ops.h"
#include "product.h"

namespace fastvit::FASTVIT_ISA {

class Patches {
 public:
  // Of a batch of images of one size, of which `keep` may choose patches.
  Patches(const PatchEmbedInputs& inputs, int64_t prefix_rows, const Queue& queue)
      : Patches(inputs, inputs.images, !is_nchw(inputs.images), prefix_rows, 1, queue) {
    const int64_t patches = patches_of(inputs.images), kept = inputs.keep ? inputs.keep.sizes[1] : patches;
    places_of_rows_ = queue.scratch<Place>("rows", inputs.images.sizes[0] * kept);
    add(inputs.images, kept, elements<int64_t>(inputs.keep), 0);
    places_ = patches;
  }

  // Of images of any sizes, one behind the other.
  Patches(const PatchEmbedInputs& inputs, const PackedImages& packed, int64_t prefix_rows, const Queue& queue)
      : Patches(inputs, packed.images[0], packed.channels_last, prefix_rows, packed.count, queue) {
    int64_t patches = 0;
    for (int64_t i = 0; i < packed.count; i++) patches += patches_of(packed.images[i]);
    places_of_rows_ = queue.scratch<Place>("rows", patches);
    for (int64_t i = 0; i < packed.count; i++) {
      add(packed.images[i], patches_of(packed.images[i]), nullptr, packed.starts[i]);
    }
    places_ = packed.places;
  }

  int64_t length() const { return length_; }                   // values of a patch
  int64_t padded_length() const { return length_ + LANES; }    // so that whole vectors may be read
  int64_t rows() const { return rows_; }                       // patches of all images that are projected
  int64_t places() const { return places_; }                   // rows of the table of positions
  int64_t prefix_rows() const { return prefix_rows_; }         // tokens of an image before its patches

  // Where the values of a row are in the weight's [C, P_h, P_w]; null where they have the same order.
  const int64_t* sources() const { return channels_last_ ? sources_ : nullptr; }
  // What each value's weight is multiplied by, and what is left of the mean, for the bias.
  const float* weight_scale() const { return constants_[WEIGHT_SCALE]; }
  const float* bias_shift() const { return constants_[BIAS_SHIFT]; }
  bool has_bias_shift() const { return has_bias_shift_; }

  // What a row is: a patch of its images, the token that it becomes, and the row of the table that is its position.
  struct Place {
    const View* images;
    int64_t start, token, position;  // start: of the patch's first pixel; less than 0 where `keep` names no patch
    bool is_there() const { return start >= 0; }
  };

  const Place& place(int64_t row) const { return places_of_rows_[row]; }

  // Calls use(token) with the first token of every image.
  template <class Use>
  void each_image(const Use& use) const {
    for (const Group* group = groups_; group < groups_ + count_; group++) {
      for (int64_t image = 0; image < group->images; image++) {
        use(group->first_token + image * (prefix_rows_ + group->kept));
      }
    }
  }

  // Values first to end of a row, normalised and rounded to Element; zeros for a row that is no patch. Up to LANES - 1
  // places behind them are written too.
  template <class Element>
  void read(int64_t row, int64_t first, int64_t end, Element* to) const {
    const Place& at = place(row);
    if (!at.is_there()) {
      for (int64_t k = first; k < end; k += LANES) store(to + k - first, Floats{});
      return;
    }
    const View& images = *at.images;
    switch (images.type) {
      case Type::UINT8: return read_from<uint8_t>(images, at.start, first, end, to);
      case Type::FLOAT32: return read_from<float>(images, at.start, first, end, to);
      case Type::BFLOAT16: return read_from<bfloat16>(images, at.start, first, end, to);
      default: return read_from<float16>(images, at.start, first, end, to);
    }
  }

  // Asks for the memory of what will be read.
  void expect(int64_t row, int64_t first, int64_t end) const {
    const Place& at = place(row);
    if (!at.is_there()) return;
    const int64_t size = bytes_of(at.images->type);
    each_run(*at.images, first, end, [&](int64_t, int64_t offset, int64_t count) {
      prefetch(static_cast<const char*>(at.images->data) + (at.start + offset) * size, count * size);
    });
  }

 private:
  Patches(const PatchEmbedInputs& inputs, const View& like, bool channels_last, int64_t prefix_rows, int64_t most,
          const Queue& queue)
      : prefix_rows_(prefix_rows), channels_last_(channels_last), groups_(queue.scratch<Group>("groups", most)) {
    const int64_t* patch = inputs.weight.sizes;
    channels_ = patch[1], area_ = patch[2] * patch[3], length_ = channels_ * area_;
    height_ = patch[2], width_ = patch[3];
    run_ = length_ / (channels_last_ ? height_ : channels_ * height_);
    sources_ = queue.scratch<int64_t>("places of values", length_);
    for (int64_t k = 0; k < length_; k++) sources_[k] = channels_last_ ? k % channels_ * area_ + k / channels_ : k;
    for (float*& row : constants_) row = queue.scratch<float>("constants", padded_length());
    for (int64_t k = 0; k < padded_length(); k++) {
      const int64_t channel = k < length_ ? sources_[k] / area_ : 0;
      for (int i = 0; i < 4; i++) constants_[i][k] = elements<float>(inputs.constants)[i * channels_ + channel];
      if (like.type == Type::UINT8) constants_[WEIGHT_SCALE][k] *= INVERSE_FACTOR;
      normalises_ = normalises_ || constants_[PIXEL_SHIFT][k] != 0 || constants_[PIXEL_SCALE][k] != 1;
      has_bias_shift_ = has_bias_shift_ || constants_[BIAS_SHIFT][k] != 0;
    }
  }

  // Images of one size, in memory of their own.
  struct Group {
    int64_t images, kept, first_token;
  };

  int64_t patches_of(const View& images) const { return images.sizes[2] / height_ * (images.sizes[3] / width_); }

  // kept: patches of an image, those that `keep` has for each, or all. The rows are described once: they are read again
  // for every panel of a product.
  void add(const View& images, int64_t kept, const int64_t* keep, int64_t first_place) {
    const int64_t grid_width = images.sizes[3] / width_, patches = patches_of(images);
    const int64_t down = height_ * images.strides[2], right = width_ * images.strides[3];
    groups_[count_++] = {images.sizes[0], kept, tokens_};
    for (int64_t image = 0; image < images.sizes[0]; image++) {
      tokens_ += prefix_rows_;
      for (int64_t number = 0; number < kept; number++, rows_++, tokens_++) {
        const int64_t patch = keep ? keep[rows_] : number;
        Place& place = places_of_rows_[rows_] = {&images, -1, tokens_, 0};
        if (patch < 0 || patch >= patches) continue;
        place.start = image * images.strides[0] + patch / grid_width * down + patch % grid_width * right;
        place.position = first_place + patch;
      }
    }
  }

  // Calls use(k, offset, count) for values of first to end that lie side by side: those from k on, so far from the
  // patch's first.
  template <class Use>
  void each_run(const View& images, int64_t first, int64_t end, const Use& use) const {
    int64_t run = first / run_, within = first % run_;
    for (int64_t k = first; k < end; run++, within = 0) {
      const int64_t row_of_run = run % height_, channel = run / height_, count = least(run_ - within, end - k);
      use(k, row_of_run * images.strides[2] + (channels_last_ ? 0 : channel * images.strides[1]) + within, count);
      k += count;
    }
  }

  template <class Pixel, class Element>
  void read_from(const View& images, int64_t start, int64_t first, int64_t end, Element* to) const {
    const Pixel* pixels = elements<Pixel>(images) + start;
    const Pixel* last_whole = elements<Pixel>(images) + static_cast<int64_t>(images.extent() / sizeof(Pixel)) - LANES;
    const float *shift = constants_[PIXEL_SHIFT], *scale = constants_[PIXEL_SCALE];
    each_run(images, first, end, [&](int64_t k, int64_t offset, int64_t count) {
      for (int64_t i = 0; i < count; i += LANES) {
        const Pixel* at = pixels + offset + i;
        Floats values = at <= last_whole ? load(at) : load(at, count - i);
        if (normalises_) values = (values - load(shift + k + i)) * load(scale + k + i);
        store(to + k - first + i, values);
      }
    });
  }

  enum Constant { WEIGHT_SCALE, PIXEL_SHIFT, BIAS_SHIFT, PIXEL_SCALE };  // rows of the constants
  // The weight scale of uint8 images has 256 in it, for the sake of fp16, which is never multiplied here.
  static constexpr float INVERSE_FACTOR = 1.0f / 256;

  Place* places_of_rows_;
  int64_t prefix_rows_, channels_, area_, length_, height_, width_, run_, places_ = 0;
  bool channels_last_, normalises_ = false, has_bias_shift_ = false;
  int64_t* sources_;
  float* constants_[4];  // of each value of a row
  Group* groups_;
  int64_t count_ = 0, rows_ = 0, tokens_ = 0;
};

}  // namespace fastvit::FASTVIT_ISA
