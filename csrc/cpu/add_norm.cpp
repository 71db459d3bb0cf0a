// add_norm: residual + keep · scale · (branch + bias), and the norm of that sum. A row comes from memory once, and what
// is made of it stays in the first cache until it is written.
#include <cmath>

#include "../ops.h"
#include "isa.h"
#include "threads.h"
#include "vector.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t LONGEST_ROW = 8192;
constexpr int64_t LEAST_ROWS = 32, MOST_CHUNKS = 64;  // of sums over rows

int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// A vector [D] in float32, with zeros behind it to whole registers; one that is not there is `missing` everywhere.
const float* vector_of(const View& view, int64_t width, float missing, const Queue& queue) {
  float* values = queue.scratch<float>("vector", padded(width));
  each_vector(width, [&](int64_t i, int64_t n) { store(values + i, view ? load(view, i, n) : all(missing)); });
  return values;
}

struct Parameters {
  int64_t rows, width, tokens;  // tokens: rows that share a factor
  const float *bias, *scale, *keep, *weight, *norm_bias;
  float centre;  // 0: no mean is subtracted

  Parameters(const AddNormInputs& inputs, const Queue& queue)
      : rows(inputs.residual.sizes[0]), width(inputs.residual.sizes[1]),
        tokens(inputs.keep ? rows / inputs.keep.sizes[0] : 1), bias(vector_of(inputs.bias, width, 0, queue)),
        scale(vector_of(inputs.scale, width, 1, queue)), keep(elements<float>(inputs.keep)),
        weight(vector_of(inputs.weight, width, 0, queue)), norm_bias(vector_of(inputs.norm_bias, width, 0, queue)),
        centre(inputs.rms ? 0.0f : 1.0f) {}

  float factor(int64_t row) const { return keep ? keep[row / tokens] : 1.0f; }
};

// The sum of a row, which is left in `values`, as rounded as it was stored: the norm sees what the next block will, and
// what backward can start from.
float add(const AddNormInputs& in, const Parameters& p, const View& sum, int64_t row, float* values) {
  const int64_t first = row * p.width;
  const float keep = p.factor(row);
  Floats total = {};
  each_vector(p.width, [&](int64_t i, int64_t n) {
    Floats value = load(in.residual, first + i, n);
    if (in.branch) {
      value += (load(in.branch, first + i, n) + load(p.bias + i)) * (load(p.scale + i) * keep);
      value = store(sum, first + i, value, n);
    }
    store(values + i, value);
    total += value;
  });
  return FASTVIT_ISA::sum(total);
}

struct Statistics {
  float mean, deviation;  // the deviation's reciprocal
};

Statistics statistics_of(const Parameters& p, float total, float eps, const float* values) {
  const float mean = total / p.width * p.centre;
  Floats squares = {};
  each_vector(p.width, [&](int64_t i, int64_t n) {
    const Floats difference = first_of(load(values + i) - mean, n);
    squares += difference * difference;
  });
  return {mean, 1 / std::sqrt(FASTVIT_ISA::sum(squares) / p.width + eps)};
}

// Of a chunk of rows what the backward sums over them: gradients of weight, norm's bias, of what is added to the
// residual and, behind the sum, of the scale.
constexpr int SUMS = 4;

struct Backward {
  const AddNormInputs& in;
  const AddNormGradients& gradients;
  Parameters p;
  const float* statistics;

  // The gradient of a row; adds to the sums.
  template <bool SCALED>
  void row(int64_t row, float* const (&sums)[SUMS]) const {
    const int64_t first = row * p.width;
    const float mean = statistics[row], deviation = statistics[p.rows + row];
    Floats with_normed = {}, with_ones = {};
    each_vector(p.width, [&](int64_t i, int64_t n) {
      const Floats normed = (load(in.residual, first + i, n) - mean) * deviation;
      const Floats grad = load(gradients.d_normed, first + i, n);  // zero behind the row
      store(sums[0] + i, load(sums[0] + i) + grad * normed);
      store(sums[1] + i, load(sums[1] + i) + grad);
      const Floats d_hat = grad * load(p.weight + i);
      with_normed += d_hat * normed;
      with_ones += d_hat;
    });
    const float along_normed = sum(with_normed) / p.width, along_mean = sum(with_ones) / p.width * p.centre;

    const float keep = p.factor(row);
    each_vector(p.width, [&](int64_t i, int64_t n) {
      const Floats normed = (load(in.residual, first + i, n) - mean) * deviation;
      const Floats d_hat = load(gradients.d_normed, first + i, n) * load(p.weight + i);
      Floats result = (d_hat - normed * along_normed - along_mean) * deviation;
      if (gradients.d_sum) result += load(gradients.d_sum, first + i, n);
      store(gradients.d_residual, first + i, result, n);
      if (SCALED) {
        result *= keep;
        if (in.scale) store(sums[3] + i, load(sums[3] + i) + result * load(in.branch, first + i, n));
      }
      if (SCALED || in.bias) store(sums[2] + i, load(sums[2] + i) + result);
      if (SCALED) result *= load(p.scale + i);
      if (gradients.d_branch) store(gradients.d_branch, first + i, result, n);
    });
  }

  template <bool SCALED>
  void chunk(int64_t first, int64_t end, float* const (&sums)[SUMS]) const {
    for (float* of_one : sums) {
      for (int64_t i = 0; i < p.width; i += LANES) store(of_one + i, Floats{});
    }
    for (int64_t row = first; row < end; row++) this->row<SCALED>(row, sums);
    if (!SCALED) return;
    // scale · (branch + bias): what all rows have of both gradients is in these two sums.
    for (int64_t i = 0; i < p.width; i += LANES) {
      const Floats d_change = load(sums[2] + i);
      store(sums[3] + i, load(sums[3] + i) + d_change * load(p.bias + i));
      store(sums[2] + i, d_change * load(p.scale + i));
    }
  }
};

}  // namespace

void add_norm(const AddNormInputs& inputs, float eps, const View& sum, const View& normed, const View& statistics,
              const Queue& queue) {
  const Parameters p(inputs, queue);
  float* to = writable<float>(statistics);
  parallel(p.rows, p.width, [&](int64_t begin, int64_t end) {
    float values[LONGEST_ROW];
    for (int64_t row = begin; row < end; row++) {
      const float total = add(inputs, p, sum, row, values);
      const auto [mean, deviation] = statistics_of(p, total, eps, values);
      to[row] = mean, to[p.rows + row] = deviation;
      each_vector(p.width, [&, mean = mean, deviation = deviation](int64_t i, int64_t n) {
        const Floats value = (load(values + i) - mean) * deviation * load(p.weight + i) + load(p.norm_bias + i);
        store(normed, row * p.width + i, value, n);
      });
    }
  });
}

void add_norm_backward(const AddNormInputs& inputs, const AddNormGradients& gradients, const Queue& queue) {
  const Backward op{inputs, gradients, Parameters(inputs, queue), elements<float>(gradients.statistics)};
  const int64_t width = op.p.width, stride = padded(width);
  const Chunks chunks(op.p.rows, LEAST_ROWS, MOST_CHUNKS);
  float* partials = queue.scratch<float>("partial sums", chunks.count * SUMS * stride);
  const bool is_scaled = inputs.scale || inputs.keep;
  parallel(chunks.count, chunks.size * width, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* first = partials + chunk * SUMS * stride;
      float* const sums[SUMS] = {first, first + stride, first + 2 * stride, first + 3 * stride};
      is_scaled ? op.chunk<true>(chunks.first(chunk), chunks.end(chunk), sums)
                : op.chunk<false>(chunks.first(chunk), chunks.end(chunk), sums);
    }
  });

  float* to = writable<float>(gradients.d_vectors);
  const bool is_there[SUMS] = {true, bool(inputs.norm_bias), bool(inputs.bias), bool(inputs.scale)};
  for (int which = 0; which < SUMS; which++) {
    if (!is_there[which]) continue;
    each_vector(width, [&](int64_t i, int64_t n) {
      Floats total = {};
      for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
        total += load(partials + (chunk * SUMS + which) * stride + i);
      }
      store(to + i, total, n);
    });
    to += width;
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
