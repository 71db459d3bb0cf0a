// The kernels compiled for the host, for Python: raw pointers in, a check of every access on the way.
//
// Knows nothing of torch: fastvit/emulated/ allocates, and describes each buffer by name, address, size and whether the
// kernel is to write it. A fault of a kernel becomes a RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
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
  simt::host::bank_conflicts() = 0;
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

using Addresses = std::map<std::string, Address>;
using Sizes = std::map<std::string, int64_t>;

PatchEmbed patch_embed_of(const Addresses& addresses, const Sizes& sizes, float scale) {
  const auto pointer = [&](const char* name) { return addresses.count(name) ? addresses.at(name) : 0; };
  const auto size = [&](const char* name) { return static_cast<int>(sizes.at(name)); };
  PatchEmbed p{};
  p.images = at(pointer("images")), p.weight = at(pointer("weight")), p.tokens = at(pointer("tokens"));
  p.table = at<float>(pointer("table")), p.normaliser = at<float>(pointer("normaliser"));
  p.keep = at<int64_t>(pointer("keep"));
  p.batch_stride = sizes.at("batch_stride"), p.plane_stride = sizes.at("plane_stride");
  p.row_stride = sizes.at("row_stride");
  p.batch = size("batch"), p.grid_width = size("grid_width"), p.patches = size("patches"), p.kept = size("kept");
  p.prefix_rows = size("prefix_rows"), p.width = size("width"), p.stretch = size("stretch");
  p.patch_height = size("patch_height"), p.k_length = size("k_length"), p.k_padded = size("k_padded");
  p.scale = scale;
  return p;
}

void run_patch_embed(const std::vector<Buffer>& buffers, uint64_t seed, Type image, Type compute, Type out,
                     const Addresses& addresses, const Sizes& sizes, float scale) {
  const PatchEmbed p = patch_embed_of(addresses, sizes, scale);
  checked(buffers, seed, [&](simt::Stream& stream) { launch(p, image, compute, out, stream); });
}

void run_weight_gradient(const std::vector<Buffer>& buffers, uint64_t seed, Type image, Type compute,
                         const Addresses& addresses, const Sizes& sizes, int rows_per_split) {
  const WeightGradient p{patch_embed_of(addresses, sizes, 1.0f), at(addresses.at("grad")),
                         at<float>(addresses.at("parts")), rows_per_split};
  checked(buffers, seed, [&](simt::Stream& stream) { launch(p, image, compute, stream); });
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
  m.def("patch_embed", &run_patch_embed);
  m.def("weight_gradient", &run_weight_gradient);
  m.def("bank_conflicts", [] { return simt::host::bank_conflicts(); });
}
