// Arguments of ops that know a tensor [..., D] by its rows, and vectors as long as these.
#pragma once

#include "call.h"

namespace fastvit {

constexpr int64_t ROWS_LIMIT = int64_t{1} << 30;  // blocks count past the last in 32 bits

inline void check_size(const char* name, const View& rows, int64_t most_values) {
  require(rows.sizes[1] > 0 && rows.sizes[1] <= most_values, name, ": expected [..., D] with D from 1 to ", most_values,
          ", got rows ", rows);
  require(rows.sizes[0] < ROWS_LIMIT, name, ": ", rows.sizes[0], " rows; they must be < 2^30");
}

inline void check_rows(const char* name, const View& rows, const char* as_name, const View& as) {
  require(rows.sizes[0] == as.sizes[0] && rows.sizes[1] == as.sizes[1], name, ": expected rows ", as, " as ", as_name,
          ", got ", rows);
}

inline void check_same_type(const char* name, const View& view, const char* as_name, const View& as) {
  require(view.type == as.type, name, ": dtype ", torch::headeronly::toString(torch_type(view.type)), ", but ", as_name,
          " has ", torch::headeronly::toString(torch_type(as.type)), "; they must match");
}

inline View read_rows(Call& call, const char* name, const MaybeTensor& tensor, const char* as_name, const View& as) {
  if (!tensor) return {};
  const View rows = call.read_rows(name, *tensor, FLOATS);
  check_rows(name, rows, as_name, as);
  return rows;
}

inline View read_vector(Call& call, const char* name, const MaybeTensor& vector, int64_t width) {
  const View view = call.read_contiguous(name, vector, 1, "[D]", FLOATS);
  require(!view || view.sizes[0] == width, name, ": expected [", width, "], got ", view);
  // A parameter in a flat buffer may lie anywhere. It is small: copied, it leaves the rows their 16-byte loads.
  const bool is_aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  return is_aligned ? view : call.copy(name, *vector, view.type);
}

}  // namespace fastvit
