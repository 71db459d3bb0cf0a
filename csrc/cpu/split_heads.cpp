// split_heads, backward: the gradients of all heads' queries, keys and values to one packed gradient, and its sums.
#include "isa.h"
#include "rows.h"

namespace fastvit::FASTVIT_ISA {
namespace {

constexpr int64_t TOGETHER = 8;  // rows of a head, which are read one behind another
constexpr int VECTORS = 4, AT_ONCE = VECTORS * LANES;

template <class T>
struct SplitHeads {
  const View &d_q, &d_k, &d_v, &d_qkv;
  int64_t heads = d_q.sizes[1], tokens = d_q.sizes[2], head_width = d_q.sizes[3], width = heads * head_width;

  // `count` rows of a head, tokens of one image; adds to its sums, where there are some.
  void move(const View& from, int64_t image, int64_t token, int64_t head, int64_t count, T* to, float* sums) const {
    const T* values = elements<T>(from) + image * from.strides[0] + head * from.strides[1] + token * from.strides[2];
    const int64_t row_stride = from.strides[2], value_stride = from.strides[3];
    int64_t column = 0;
    if (sums && value_stride == 1) {
      for (; column + AT_ONCE <= head_width; column += AT_ONCE) {
        move_columns(values + column, row_stride, count, to + column, sums + column);
      }
    }
    for (int64_t row = 0; row < count; row++, values += row_stride, to += 3 * width) {
      if (value_stride == 1) std::memcpy(to + column, values + column, (head_width - column) * sizeof(T));
      for (int64_t i = column; i < head_width; i++) {
        if (value_stride != 1) to[i] = values[i * value_stride];
        if (sums) sums[i] += load_one(to + i);
      }
    }
  }

  // AT_ONCE columns, whose sums stay in registers.
  void move_columns(const T* from, int64_t row_stride, int64_t count, T* to, float* sums) const {
    Floats totals[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) totals[i] = load(sums + i * LANES);
    for (int64_t row = 0; row < count; row++, from += row_stride, to += 3 * width) {
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; i++) totals[i] += load(from + i * LANES);
      std::memcpy(to, from, AT_ONCE * sizeof(T));
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) store(sums + i * LANES, totals[i]);
  }

  // Rows of all images, one behind another.
  void run(int64_t first, int64_t end, float* sums) const {
    while (first < end) {
      const int64_t image = first / tokens, token = first - image * tokens;
      const int64_t count = least(least(tokens - token, end - first), TOGETHER);
      for (int which = 0; which < 3; which++) {
        const View& from = which == 0 ? d_q : which == 1 ? d_k : d_v;
        for (int64_t head = 0; head < heads; head++) {
          const int64_t column = which * width + head * head_width;
          T* to = writable<T>(d_qkv) + first * 3 * width + column;
          move(from, image, token, head, count, to, sums ? sums + column : sums);
        }
      }
      first += count;
    }
  }
};

}  // namespace

void split_heads_backward(const View& d_q, const View& d_k, const View& d_v, const View& d_qkv, const View& sums,
                          const Queue& queue) {
  const RowSums row_sums(d_q.sizes[0] * d_q.sizes[2], sums ? sums.sizes[0] : 0, queue);
  with_type(d_q.type, [&](auto type) {
    const SplitHeads<decltype(type)> op{d_q, d_k, d_v, d_qkv};
    row_sums.run(3 * op.width, [&](int64_t first, int64_t end, float* of_chunk) {
      op.run(first, end, sums ? of_chunk : nullptr);
    });
  });
  if (sums) row_sums.add_up(0, sums.sizes[0], writable<float>(sums));
}

}  // namespace fastvit::FASTVIT_ISA

FASTVIT_CHOOSE(split_heads_backward,
               (const View& d_q, const View& d_k, const View& d_v, const View& d_qkv, const View& sums,
                const Queue& queue),
               (d_q, d_k, d_v, d_qkv, sums, queue))
