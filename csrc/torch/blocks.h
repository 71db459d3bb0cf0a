// The functions of the blocks' ops, for what runs several in one call.
#pragma once

#include <optional>
#include <tuple>

#include "call.h"

namespace fastvit {

std::tuple<Tensor, Tensor, Tensor> add_norm_cuda(const Tensor& residual, const MaybeTensor& branch,
                                                 const MaybeTensor& bias, const MaybeTensor& scale,
                                                 const MaybeTensor& keep, const Tensor& weight,
                                                 const MaybeTensor& norm_bias, double eps, bool rms,
                                                 ScalarType sum_dtype, ScalarType dtype);

std::tuple<Tensor, Tensor, Tensor> add_norm_backward_cuda(
    const Tensor& total, const Tensor& d_normed, const MaybeTensor& d_total, const MaybeTensor& branch,
    const MaybeTensor& bias, const MaybeTensor& scale, const MaybeTensor& keep, const Tensor& weight,
    const MaybeTensor& norm_bias, const Tensor& statistics, bool rms, ScalarType residual_dtype);

Tensor bias_act_cuda(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& up, const MaybeTensor& up_bias,
                     int64_t function, double linear, double cubic, std::optional<bool> gate_last, ScalarType dtype);

std::tuple<Tensor, Tensor, Tensor> bias_act_backward_cuda(const Tensor& d_out, const Tensor& x, const MaybeTensor& bias,
                                                          const MaybeTensor& up, const MaybeTensor& up_bias,
                                                          int64_t function, double linear, double cubic,
                                                          std::optional<bool> gate_last);

std::tuple<Tensor, Tensor> split_heads_backward_cuda(const Tensor& d_q, const Tensor& d_k, const Tensor& d_v,
                                                     bool has_bias);

}  // namespace fastvit
