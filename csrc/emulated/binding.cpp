// The kernels compiled for the host, for Python: raw pointers in, a check of every access on the way.
//
// Knows nothing of torch: fastvit/emulated/ allocates, and describes each buffer by name, address, size and whether the
// kernel is to write it. A fault of a kernel becomes a RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace fastvit {
namespace {

using Address = uintptr_t;
using Buffer = std::tuple<std::string, Address, std::size_t, bool>;  // name, address, bytes, is an output

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Runs launches with exactly these buffers in reach, each byte of the outputs written once.
template <class Launch>
void checked(const std::vector<Buffer>& buffers, uint64_t seed, Launch launch) {
  simt::host::GlobalMemory& memory = simt::host::global_memory();
  memory.clear();
  for (const auto& [name, address, bytes, is_output] : buffers) {
    if (is_output) {
      memory.add_output(name.c_str(), at(address), bytes);
    } else {
      memory.add_input(name.c_str(), at(address), bytes);
    }
  }
  simt::Stream stream{seed};
  launch(stream);
  memory.check_all_written();
}

void run_add_position(const std::vector<Buffer>& buffers, uint64_t seed, Type in, Type out, Address tokens,
                  Address positions, Type positions_type, int position_rows, Address prefix, Type prefix_type,
                  int prefix_rows, Address result, std::tuple<int, int, int> shape,
                  std::tuple<int64_t, int64_t, int64_t> strides) {
  AddPosition p{};
  p.tokens = at(tokens), p.positions = at(positions), p.prefix = at(prefix), p.out = at(result);
  std::tie(p.batch, p.patches, p.width) = shape;
  std::tie(p.batch_stride, p.token_stride, p.width_stride) = strides;
  p.prefix_rows = prefix_rows, p.position_rows = position_rows;
  p.positions_type = positions_type, p.prefix_type = prefix_type;
  checked(buffers, seed, [&](simt::Stream& stream) { launch(p, in, out, stream); });
}

void run_sum_rows(const std::vector<Buffer>& buffers, uint64_t seed, Type type, Address matrix, Address sums, int rows,
              int64_t columns, int rows_per_split) {
  const SumRows p{at(matrix), at<float>(sums), columns, rows, rows_per_split};
  checked(buffers, seed, [&](simt::Stream& stream) { launch(p, type, stream); });
}

}  // namespace
}  // namespace fastvit

PYBIND11_MODULE(fastvit_emulated, m) {
  using namespace fastvit;
  m.doc() = "FastViT's CUDA kernels, emulated on the host";
  py::enum_<Type>(m, "Type", py::module_local())
      .value("float32", Type::FLOAT32)
      .value("float16", Type::FLOAT16)
      .value("bfloat16", Type::BFLOAT16)
      .value("uint8", Type::UINT8);
  py::register_local_exception<simt::host::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("add_position", &run_add_position);
  m.def("sum_rows", &run_sum_rows);
}
