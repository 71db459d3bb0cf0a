// add_norm: residual + keep · scale · (branch + bias), and the norm of that sum. A row comes from memory once, and what
// is made of it stays in the first cache until it is written.
#include <cmath>

#include "isa.h"
#include "rows.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t LONGEST_ROW = 8192;
constexpr int TOGETHER = 4;  // rows whose sums are read and written once

struct Parameters {
  int64_t rows, width, tokens;  // tokens: rows that share a factor
  const float *bias, *scale, *keep, *weight, *norm_bias;
  float centre;  // 0: no mean is subtracted

  Parameters(const AddNormInputs& inputs, const Queue& queue)
      : rows(inputs.residual.sizes[0]), width(inputs.residual.sizes[1]),
        tokens(inputs.keep && rows ? rows / inputs.keep.sizes[0] : 1), bias(vector_of(inputs.bias, width, 0, queue)),
        scale(vector_of(inputs.scale, width, 1, queue)), keep(elements<float>(inputs.keep)),
        weight(vector_of(inputs.weight, width, 0, queue)), norm_bias(vector_of(inputs.norm_bias, width, 0, queue)),
        centre(inputs.rms ? 0.0f : 1.0f) {}

  float factor(int64_t row) const { return keep ? keep[row / tokens] : 1.0f; }
};

template <class Stream, class Other>
struct Forward {
  const Parameters& p;
  Stream residual, sum;
  Other branch, normed;
  bool has_branch;
  float eps;
  float* statistics;

  // The sum of a row, which is left in `values` as it was rounded: the norm sees what the next block will, and what
  // backward can start from.
  float add(int64_t first, float keep, float* values) const {
    const Stream residual = this->residual + first, sum = this->sum + first;
    const Other branch = this->branch + first;
    const float *bias = p.bias, *scale = p.scale;
    Floats total = {};
    each_vector(p.width, [=, &total](int64_t i, auto n) {
      const Floats change = (load(branch + i, n) + load(bias + i)) * (load(scale + i) * keep);
      const Floats value = store_rounded(sum + i, load(residual + i, n) + change, n);
      store(values + i, value);
      total += value;
    });
    return FASTVIT_ISA::sum(total);
  }

  float copy(int64_t first, float* values) const {
    const Stream residual = this->residual + first;
    Floats total = {};
    each_vector(p.width, [=, &total](int64_t i, auto n) {
      const Floats value = load(residual + i, n);
      store(values + i, value);
      total += value;
    });
    return FASTVIT_ISA::sum(total);
  }

  void run(int64_t begin, int64_t end) const {
    float values[LONGEST_ROW];
    for (int64_t row = begin; row < end; row++) {
      const int64_t first = row * p.width;
      const float total = has_branch ? add(first, p.factor(row), values) : copy(first, values);
      const float mean = total / p.width * p.centre;
      Floats squares = {};
      each_vector(p.width, [&](int64_t i, auto n) {
        const Floats difference = first_of(load(values + i) - mean, n);
        squares += difference * difference;
      });
      const float deviation = 1 / std::sqrt(FASTVIT_ISA::sum(squares) / p.width + eps);
      statistics[row] = mean, statistics[p.rows + row] = deviation;
      const Other normed = this->normed + first;
      const float *weight = p.weight, *norm_bias = p.norm_bias;
      each_vector(p.width, [=, &values](int64_t i, auto n) {
        const Floats value = (load(values + i) - mean) * deviation;
        store(normed + i, value * load(weight + i) + load(norm_bias + i), n);
      });
    }
  }
};

// Of a chunk of rows what is summed over them: gradients of the weight, of the norm's bias, of what is added to the
// residual and, behind that sum, of the scale.
struct Sums {
  float *weight, *norm_bias, *change, *scale;
};

template <class Stream, class Other>
struct Backward {
  const Parameters& p;
  Stream total, d_sum, d_residual;
  Other d_normed, branch, d_branch;
  bool has_d_sum, has_scale, has_bias, is_apart;
  const float* statistics;

  // ROWS rows; adds to the sums.
  template <int ROWS, bool SCALED>
  void rows(int64_t row, const Sums& sums) const {
    const int64_t width = p.width, first = row * width;
    float mean[ROWS], deviation[ROWS];
    Floats with_normed[ROWS] = {}, with_ones[ROWS] = {};
    for (int r = 0; r < ROWS; r++) mean[r] = statistics[row + r], deviation[r] = statistics[p.rows + row + r];
    const Stream total = this->total + first;
    const Other d_normed = this->d_normed + first;
    const float* weight = p.weight;
    each_vector(width, [=, &with_normed, &with_ones, &mean, &deviation](int64_t i, auto n) {
      Floats d_weight = load(sums.weight + i), d_norm_bias = load(sums.norm_bias + i);
      const Floats factor = load(weight + i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const Floats normed = (load(total + (r * width + i), n) - mean[r]) * deviation[r];
        const Floats grad = load(d_normed + (r * width + i), n);  // zero behind the row
        d_weight += grad * normed, d_norm_bias += grad;
        const Floats d_hat = grad * factor;
        with_normed[r] += d_hat * normed, with_ones[r] += d_hat;
      }
      store(sums.weight + i, d_weight), store(sums.norm_bias + i, d_norm_bias);
    });

    float along_normed[ROWS], along_mean[ROWS], keep[ROWS];
    for (int r = 0; r < ROWS; r++) {
      along_normed[r] = sum(with_normed[r]) / width, along_mean[r] = sum(with_ones[r]) / width * p.centre;
      keep[r] = p.factor(row + r);
    }
    const Stream d_sum = this->d_sum + first, d_residual = this->d_residual + first;
    const Other branch = this->branch + first, d_branch = this->d_branch + first;
    const bool has_d_sum = this->has_d_sum, has_scale = this->has_scale, has_change = has_bias || has_scale;
    const bool is_apart = this->is_apart;
    const float* scale = p.scale;
    each_vector(width, [&](int64_t i, auto n) {
      Floats d_change = load(sums.change + i), d_scale = load(sums.scale + i);
      const Floats factor = load(weight + i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const int64_t place = r * width + i;
        const Floats normed = (load(total + place, n) - mean[r]) * deviation[r];
        const Floats d_hat = load(d_normed + place, n) * factor;
        Floats result = (d_hat - normed * along_normed[r] - along_mean[r]) * deviation[r];
        if (has_d_sum) result += load(d_sum + place, n);
        store(d_residual + place, result, n);
        if (SCALED) {
          result *= keep[r];
          if (has_scale) d_scale += result * load(branch + place, n);
        }
        d_change += result;
        if (SCALED) result *= load(scale + i);
        if (is_apart) store(d_branch + place, result, n);
      }
      if (has_change) store(sums.change + i, d_change);
      if (has_scale) store(sums.scale + i, d_scale);
    });
  }

  template <bool SCALED>
  void chunk(int64_t row, int64_t end, const Sums& sums) const {
    if constexpr (!std::is_same_v<Stream, Any>) {
      for (; row + TOGETHER <= end; row += TOGETHER) rows<TOGETHER, SCALED>(row, sums);
    }
    for (; row < end; row++) rows<1, SCALED>(row, sums);
    if (!SCALED) return;
    // scale · (branch + bias): what all rows have of both gradients is in these two sums.
    for (int64_t i = 0; i < p.width; i += LANES) {
      const Floats d_change = load(sums.change + i);
      store(sums.scale + i, load(sums.scale + i) + d_change * load(p.bias + i));
      store(sums.change + i, d_change * load(p.scale + i));
    }
  }
};

}  // namespace

void add_norm(const AddNormInputs& inputs, float eps, const View& sum, const View& normed, const View& statistics,
              const Queue& queue) {
  const Parameters p(inputs, queue);
  with_types(common(inputs.residual, sum), common(inputs.branch, normed), [&](auto stream, auto other) {
    using Stream = decltype(stream);
    using Other = decltype(other);
    const Forward<Stream, Other> op{p, pointer_to<Stream>(inputs.residual), pointer_to<Stream>(sum),
                                    pointer_to<Other>(inputs.branch), pointer_to<Other>(normed), bool(inputs.branch),
                                    eps, writable<float>(statistics)};
    parallel(p.rows, p.width, [&](int64_t begin, int64_t end) { op.run(begin, end); });
  });
}

void add_norm_backward(const AddNormInputs& inputs, const AddNormGradients& gradients, const Queue& queue) {
  constexpr int SUMS = 4;
  const Parameters p(inputs, queue);
  const int64_t stride = padded(p.width);
  const RowSums row_sums(p.rows, SUMS * stride, queue);
  const bool is_scaled = inputs.scale || inputs.keep;
  const Type stream = common(inputs.residual, gradients.d_sum, gradients.d_residual);
  with_types(stream, common(gradients.d_normed, inputs.branch, gradients.d_branch), [&](auto stream, auto other) {
    using Stream = decltype(stream);
    using Other = decltype(other);
    const Backward<Stream, Other> op{
        p, pointer_to<Stream>(inputs.residual), pointer_to<Stream>(gradients.d_sum),
        pointer_to<Stream>(gradients.d_residual), pointer_to<Other>(gradients.d_normed),
        pointer_to<Other>(inputs.branch), pointer_to<Other>(gradients.d_branch), bool(gradients.d_sum),
        bool(inputs.scale), bool(inputs.bias), bool(gradients.d_branch), elements<float>(gradients.statistics)};
    row_sums.run(p.width, [&](int64_t first, int64_t end, float* of_chunk) {
      const Sums sums{of_chunk, of_chunk + stride, of_chunk + 2 * stride, of_chunk + 3 * stride};
      is_scaled ? op.template chunk<true>(first, end, sums) : op.template chunk<false>(first, end, sums);
    });
  });

  float* to = writable<float>(gradients.d_vectors);
  const bool is_there[SUMS] = {true, bool(inputs.norm_bias), bool(inputs.bias), bool(inputs.scale)};
  for (int which = 0; which < SUMS; which++) {
    if (!is_there[which]) continue;
    row_sums.add_up(which * stride, p.width, to);
    to += p.width;
  }
}

}  // namespace fastvit::FASTVIT_ISA

FASTVIT_CHOOSE(add_norm,
               (const AddNormInputs& inputs, float eps, const View& sum, const View& normed, const View& statistics,
                const Queue& queue),
               (inputs, eps, sum, normed, statistics, queue))
FASTVIT_CHOOSE(add_norm_backward,
               (const AddNormInputs& inputs, const AddNormGradients& gradients, const Queue& queue),
               (inputs, gradients, queue))
