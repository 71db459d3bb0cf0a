// bias_act: act(x + bias), perhaps times (up + up_bias); a read and a write of each.
#include "isa.h"
#include "rows.h"

namespace fastvit::FASTVIT_ISA {
namespace {

inline Floats absolute(Floats x) { return bits_as<Floats>(bits_as<Words>(x) & 0x7fffffff); }

struct Activated {
  Floats value, slope;
};

// The functions, by the numbers of BiasAct (../parameters.h): each is code of its own, as a vector has no time for a
// choice or a call.
enum { GELU, RELU, GATE };

template <int FUNCTION>
__attribute__((always_inline)) inline Activated activate(float linear, float cubic, Floats x) {
  if constexpr (FUNCTION == GELU) {
    // The normal distribution up to -|x|: its density times a polynomial in t, fitted to 2e-8 of it.
    const Floats power = exp_of_negative(x * x * -0.5f), t = 1.0f / (1.0f + 0.26f * absolute(x));
    Floats q = t * 0.0309525616f - 0.1550171375f;
    for (const float c : {0.2560449839f, -0.1562065333f, 0.1646236330f, 0.0494374856f, 0.1034451798f, 0.1029571369f,
                          0.1037626639f}) {
      q = q * t + c;
    }
    const Floats tail = power * (q * t), cdf = select(x < 0.0f, tail, 1.0f - tail);
    return {x * cdf, cdf + x * (0.3989422804f * power)};
  } else if constexpr (FUNCTION == RELU) {
    return {select(x < 0.0f, Floats{}, x), select(x <= 0.0f, Floats{}, all(1.0f))};  // NaN stays
  } else {
    const Floats bounded = minimum(absolute(x), all(1e19f));  // 0 · ∞ would be no number
    const Floats bend = cubic * bounded * bounded, inner = x * (linear + bend);
    // Neither sigmoid nor its slope is a difference of numbers that are nearly equal.
    const Floats small = exp_of_negative(-absolute(inner)), large = 1.0f / (1.0f + small);
    const Floats gate = select(inner < 0.0f, small * large, large);
    return {x * gate, gate + x * (small * large * large) * (linear + 3.0f * bend)};
  }
}

// The value alone, which GELU has for less than half: the distribution is 1/2 and x times a ratio of polynomials in x²,
// fitted to 7e-9 up to 5.5; from there on it is 0 or 1. Within 2.1e-7 of x, where PyTorch's own is within 3.3e-7.
template <int FUNCTION>
__attribute__((always_inline)) inline Floats value_of(float linear, float cubic, Floats x) {
  if constexpr (FUNCTION != GELU) return activate<FUNCTION>(linear, cubic, x).value;
  const Floats square = x * x;
  Floats above = square * 2.274934552e-08f + 6.352124274e-06f, below = square * 1.197503821e-06f + 7.364778139e-05f;
  above = above * square + 1.688265329e-04f, below = below * square + 1.884449739e-03f;
  above = above * square + 4.677265882e-03f, below = below * square + 2.864591964e-02f;
  above = above * square + 3.385272995e-02f, below = below * square + 2.515221238e-01f;
  above = above * square + 3.989422321e-01f, below = below * square + 1.0f;
  const Floats cdf = x * (above / below) + 0.5f;
  return x * select(x > 5.5f, all(1.0f), select(x < -5.5f, Floats{}, cdf));
}

// Calls `use` with the function as a type.
template <class Use>
inline void with_function(int function, const Use& use) {
  if (function == GELU) return use(std::integral_constant<int, GELU>());
  if (function == RELU) return use(std::integral_constant<int, RELU>());
  use(std::integral_constant<int, GATE>());
}

// Where rows of what goes through the function begin, and of what it is multiplied by: x and up, or the halves of x.
template <class In, class Out>
struct BiasAct {
  float linear, cubic;
  bool is_gated;
  int64_t rows, width, row_stride;
  In x, up, d_x, d_up;
  Out out;  // or its gradient
  const float *bias, *up_bias;
  int64_t sums, up_sums;  // places of their sums

  BiasAct(const BiasActInputs& inputs, const View& out, const View& d_x, const View& d_up, const Queue& queue)
      : linear(inputs.linear), cubic(inputs.cubic),
        is_gated(inputs.up || inputs.gate_last), rows(out.sizes[0]), width(out.sizes[1]),
        row_stride(inputs.x.sizes[1]), x(pointer_to<In>(inputs.x)), up(pointer_to<In>(inputs.up)),
        d_x(pointer_to<In>(d_x)), d_up(pointer_to<In>(d_up)), out(pointer_to<Out>(out)),
        bias(vector_of(inputs.bias, row_stride, 0, queue)), up_bias(vector_of(inputs.up_bias, width, 0, queue)),
        sums(0), up_sums(width) {
    if (!inputs.gate_last) return;
    const int64_t gate = *inputs.gate_last ? width : 0, other = width - gate;
    up = x + other, this->d_up = this->d_x + other, up_bias = bias + other, up_sums = other;
    x = x + gate, this->d_x = this->d_x + gate, bias = bias + gate, sums = gate;
  }

  template <int FUNCTION>
  void forward(int64_t row) const {
    const In x = this->x + row * row_stride, up = this->up + row * row_stride;
    const Out out = this->out + row * width;
    each_vector(width, [=, *this](int64_t i, auto n) {
      Floats value = value_of<FUNCTION>(linear, cubic, load(x + i, n) + load(bias + i, n));
      if (is_gated) value *= load(up + i, n) + load(up_bias + i, n);
      store(out + i, value, n);
    });
  }

  // Adds to the sums, where there are some.
  template <int FUNCTION>
  void backward(int64_t row, float* sums, float* up_sums) const {
    const In x = this->x + row * row_stride, up = this->up + row * row_stride;
    const In d_x = this->d_x + row * row_stride, d_up = this->d_up + row * row_stride;
    const Out d_out = this->out + row * width;
    each_vector(width, [=, *this](int64_t i, auto n) {
      Floats grad = load(d_out + i, n);  // zero behind the row
      const Activated at = activate<FUNCTION>(linear, cubic, load(x + i, n) + load(bias + i, n));
      if (is_gated) {
        const Floats change = grad * at.value;
        store(d_up + i, change, n);
        if (sums) store(up_sums + i, load(up_sums + i, n) + change, n);
        grad *= load(up + i, n) + load(up_bias + i, n);
      }
      grad *= at.slope;
      store(d_x + i, grad, n);
      if (sums) store(sums + i, load(sums + i, n) + grad, n);
    });
  }
};

}  // namespace

void bias_act(const BiasActInputs& inputs, const View& out, const Queue& queue) {
  with_types(common(inputs.x, inputs.up), out.type, [&](auto in, auto result) {
    const BiasAct<decltype(in), decltype(result)> op(inputs, out, View(), View(), queue);
    parallel(op.rows, op.row_stride, [&](int64_t first, int64_t end) {
      with_function(inputs.function, [&](auto function) {
        for (int64_t row = first; row < end; row++) op.template forward<function()>(row);
      });
    });
  });
}

void bias_act_backward(const BiasActInputs& inputs, const BiasActGradients& gradients, const Queue& queue) {
  const View &d_out = gradients.d_out, &sums = gradients.sums;
  const RowSums row_sums(d_out.sizes[0], sums ? sums.sizes[0] : 0, queue);
  with_types(inputs.x.type, d_out.type, [&](auto in, auto result) {
    const BiasAct<decltype(in), decltype(result)> op(inputs, d_out, gradients.d_x, gradients.d_up, queue);
    row_sums.run(op.row_stride, [&](int64_t first, int64_t end, float* of_chunk) {
      float* const there = sums ? of_chunk : nullptr;
      with_function(inputs.function, [&](auto function) {
        for (int64_t row = first; row < end; row++) {
          op.template backward<function()>(row, there ? there + op.sums : there, there ? there + op.up_sums : there);
        }
      });
    });
  });
  if (sums) row_sums.add_up(0, sums.sizes[0], writable<float>(sums));
}

}  // namespace fastvit::FASTVIT_ISA

FASTVIT_CHOOSE(bias_act, (const BiasActInputs& inputs, const View& out, const Queue& queue), (inputs, out, queue))
FASTVIT_CHOOSE(bias_act_backward,
               (const BiasActInputs& inputs, const BiasActGradients& gradients, const Queue& queue),
               (inputs, gradients, queue))
