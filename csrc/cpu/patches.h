// Patches of images as rows of values, in the order in which they lie in memory.
#pragma once

#include "../ops.h"
#include "product.h"

namespace fastvit::FASTVIT_ISA {

class Patches {
 public:
  Patches(const PatchEmbedInputs& inputs, const Queue& queue)
      : images_(inputs.images), keep_(elements<int64_t>(inputs.keep)) {
    const int64_t* patch = inputs.weight.sizes;
    channels_ = patch[1], area_ = patch[2] * patch[3], length_ = channels_ * area_;
    height_ = patch[2], width_ = patch[3];
    grid_width_ = images_.sizes[3] / width_;
    patches_ = images_.sizes[2] / height_ * grid_width_;
    kept_ = inputs.keep ? inputs.keep.sizes[1] : patches_;
    channels_last_ = !is_nchw(images_);
    runs_ = channels_last_ ? height_ : channels_ * height_;
    run_ = length_ / runs_;
    sources_ = queue.scratch<int64_t>("places of values", length_);
    for (int64_t k = 0; k < length_; k++) sources_[k] = channels_last_ ? k % channels_ * area_ + k / channels_ : k;
    for (float*& row : constants_) row = queue.scratch<float>("constants", padded_length());
    for (int64_t k = 0; k < padded_length(); k++) {
      const int64_t channel = k < length_ ? sources_[k] / area_ : 0;
      for (int i = 0; i < 4; i++) constants_[i][k] = elements<float>(inputs.constants)[i * channels_ + channel];
      if (images_.type == Type::UINT8) constants_[WEIGHT_SCALE][k] *= INVERSE_FACTOR;
      normalises_ = normalises_ || constants_[PIXEL_SHIFT][k] != 0 || constants_[PIXEL_SCALE][k] != 1;
      has_bias_shift_ = has_bias_shift_ || constants_[BIAS_SHIFT][k] != 0;
    }
  }

  static bool is_nchw(const View& images) { return images.sizes[3] == 1 || images.strides[3] == 1; }
  static bool is_nhwc(const View& images) {
    return (images.sizes[1] == 1 || images.strides[1] == 1) &&
           (images.sizes[3] == 1 || images.strides[3] == images.sizes[1]);
  }

  int64_t length() const { return length_; }                   // values of a patch
  int64_t padded_length() const { return length_ + LANES; }    // so that whole vectors may be read
  int64_t patches() const { return patches_; }                 // of an image
  int64_t kept() const { return kept_; }                       // of an image that are projected
  int64_t rows() const { return images_.sizes[0] * kept_; }    // of all images

  // Where the values of a row are in the weight's [C, P_h, P_w]; null where they have the same order.
  const int64_t* sources() const { return channels_last_ ? sources_ : nullptr; }
  // What each value's weight is multiplied by, and what is left of the mean, for the bias.
  const float* weight_scale() const { return constants_[WEIGHT_SCALE]; }
  const float* bias_shift() const { return constants_[BIAS_SHIFT]; }
  bool has_bias_shift() const { return has_bias_shift_; }

  // Which patch of its image a row is; -1 where `keep` has no such patch.
  int64_t number(int64_t row) const {
    if (!keep_) return row % kept_;
    return keep_[row] >= 0 && keep_[row] < patches_ ? keep_[row] : -1;
  }

  // Values first to end of a row, normalised and rounded to Element; zeros for a row that is no patch. Up to LANES - 1
  // places behind them are written too.
  template <class Element>
  void read(int64_t row, int64_t first, int64_t end, Element* to) const {
    const int64_t patch = number(row);
    if (patch < 0) {
      for (int64_t k = first; k < end; k += LANES) store(to + k - first, Floats{});
      return;
    }
    const int64_t place = row / kept_ * images_.strides[0] + patch / grid_width_ * height_ * images_.strides[2] +
                          patch % grid_width_ * width_ * images_.strides[3];
    switch (images_.type) {
      case Type::UINT8: return read_from<uint8_t>(place, first, end, to);
      case Type::FLOAT32: return read_from<float>(place, first, end, to);
      case Type::BFLOAT16: return read_from<bfloat16>(place, first, end, to);
      default: return read_from<float16>(place, first, end, to);
    }
  }

 private:
  template <class Pixel, class Element>
  void read_from(int64_t place, int64_t first, int64_t end, Element* to) const {
    const Pixel* pixels = elements<Pixel>(images_) + place;
    const Pixel* last_whole = elements<Pixel>(images_) + static_cast<int64_t>(images_.extent() / sizeof(Pixel)) - LANES;
    const float *shift = constants_[PIXEL_SHIFT], *scale = constants_[PIXEL_SCALE];
    int64_t run = first / run_, within = first % run_;
    for (int64_t k = first; k < end; run++, within = 0) {
      const int64_t row_of_run = run % height_, channel = run / height_;
      const Pixel* from = pixels + row_of_run * images_.strides[2] + (channels_last_ ? 0 : channel * images_.strides[1]);
      const int64_t count = least(run_ - within, end - k);
      for (int64_t i = 0; i < count; i += LANES) {
        const Pixel* at = from + within + i;
        Floats values = at <= last_whole ? load(at) : load(at, count - i);
        if (normalises_) values = (values - load(shift + k + i)) * load(scale + k + i);
        store(to + k - first + i, values);
      }
      k += count;
    }
  }

  enum Constant { WEIGHT_SCALE, PIXEL_SHIFT, BIAS_SHIFT, PIXEL_SCALE };  // rows of the constants
  // The weight scale of uint8 images has 256 in it, for the sake of fp16, which is never multiplied here.
  static constexpr float INVERSE_FACTOR = 1.0f / 256;

  const View& images_;
  const int64_t* keep_;
  int64_t channels_, area_, length_, height_, width_, grid_width_, patches_, kept_, runs_, run_;
  bool channels_last_, normalises_ = false, has_bias_shift_ = false;
  int64_t* sources_;
  float* constants_[4];  // of each value of a row
};

}  // namespace fastvit::FASTVIT_ISA
