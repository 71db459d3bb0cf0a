// The ops, as both bindings call them: torch/ for tensors of PyTorch, emulated/ for tests on a machine without a GPU. They
// are there for a GPU, in the files beside this one, and for a processor, in cpu/.
//
// Callers have checked shapes and types, as fastvit/checks.py does, and have made every tensor contiguous but images
// and d_images, which may have any strides that `can_read` accepts, and those that are said to have any. Outputs are
// allocated by the caller; memory that is needed for the length of a call comes from the queue.
#pragma once

#include <optional>

#include "simt/queue.h"
#include "views.h"

namespace fastvit {

using simt::Queue;

struct PatchEmbedInputs {
  View images;     // [B, C, H, W] uint8 or a float type
  View weight;     // [D, C, P_h, P_w]
  View bias;       // [D], or none
  View positions;  // [N, D] or [R+N, D], or none
  View prefix;     // [R, D], or none
  View keep;       // [B, kept] int64, or none
  View constants;  // [4, C] float32: the rows of fastvit/kernels/normalisation.py
  Type compute;    // the type that is multiplied: float32, float16 or bfloat16
  bool tf32;       // whether float32 may be multiplied at TF32 precision
  bool has_mean;   // whether a mean is subtracted: without one the sums for it are left out
};

// Whether the strides of [B, C, H, W] images, or d_images, can be read in place: NCHW or NHWC, any distance apart.
bool can_read(const View& images);

// tokens: [B, R+N, D], or [B, R+kept, D] with keep. A place of keep that is out of range becomes a row of NaN.
void patch_embed(const PatchEmbedInputs& inputs, const View& tokens, const Queue& queue);

struct PatchEmbedGradients {
  View grad;          // [B, R+N, D]: the gradient of the tokens, which bias and table rows are summed from
  View product_grad;  // the same in the compute type, for the two products
  View constants_of_images;  // [4, C] float32: the constants of the image gradient; needed with d_images
  View d_images;      // as the images, or none; written everywhere, zero where a patch was not kept
  View d_weight;      // as the weight, or none
  View d_bias;        // [D] float32, or none
  View d_rows;        // [R+N, D] float32, or none: the gradient of every row of the table
};

// Of the inputs, bias, positions and prefix are not read; prefix_rows is R.
void patch_embed_backward(const PatchEmbedInputs& inputs, int prefix_rows, const PatchEmbedGradients& gradients,
                          const Queue& queue);

// Images of any sizes, one behind the other; in PatchEmbedInputs there are no images and no `keep` then.
struct PackedImages {
  const View* images;     // [1, C, H_i, W_i] each, of one type
  const int64_t* starts;  // of each the row of the table that is its first patch's position
  int64_t count;          // at least 1
  int64_t places;         // rows of the table, or as many as there are positions
  int64_t patches;        // of all images
  bool channels_last;     // how all of them lie
  View table;             // [8, count] int64, for a GPU: the table of fastvit/kernels/packed_images.py
};

// tokens: [Σ R+N_i, D].
void patch_embed_packed(const PatchEmbedInputs& inputs, const PackedImages& images, const View& tokens,
                        const Queue& queue);

// grad is [Σ R+N_i, D], d_rows [R+places, D]; no d_images, and none of what goes with it.
void patch_embed_packed_backward(const PatchEmbedInputs& inputs, const PackedImages& images, int prefix_rows,
                                 const PatchEmbedGradients& gradients, const Queue& queue);

// tokens: [B, N, D], any strides; positions: [N, D] or [R+N, D]; prefix: [R, D] or none; out: [B, R+N, D].
void add_position(const View& tokens, const View& positions, const View& prefix, const View& out, const Queue& queue);

// grad: [B, T, D] → d_rows: [T, D] float32, the sum over the batch.
void add_position_backward(const View& grad, const View& d_rows, const Queue& queue);

struct AddNormInputs {
  View residual;     // [rows, D], D at most 8192; to the backward the sum, with or without a branch
  View branch;       // [rows, D], or none; the backward reads it with a scale alone
  View bias, scale;  // [D], or none
  View keep;         // [B] float32, or none; rows is a multiple of B
  View weight;       // [D]
  View norm_bias;    // [D], or none
  bool rms;          // whether no mean is subtracted
};

// sum: [rows, D], not written without a branch; normed: [rows, D]; statistics: [2, rows] float32, mean (of an RMS norm
// zero) and 1/deviation of every row.
void add_norm(const AddNormInputs& inputs, float eps, const View& sum, const View& normed, const View& statistics,
              const Queue& queue);

struct AddNormGradients {
  View d_normed;    // [rows, D]
  View d_sum;       // [rows, D], or none
  View statistics;  // [2, rows]: the forward's
  View d_residual;  // [rows, D]
  View d_branch;    // [rows, D], or none
  View d_vectors;   // [vectors, D] float32: of weight, norm_bias, bias, scale, those that are there
};

void add_norm_backward(const AddNormInputs& inputs, const AddNormGradients& gradients, const Queue& queue);

struct BiasActInputs {
  View x, bias;                   // [rows, F] and [F], or no bias; packed, both twice as wide
  View up, up_bias;               // the same, or none; none where x is packed
  int function;                   // with the next two as BiasAct (parameters.h) says
  float linear, cubic;
  std::optional<bool> gate_last;  // which half of a packed x goes through the function; none: it is not packed
};

// out: [rows, F].
void bias_act(const BiasActInputs& inputs, const View& out, const Queue& queue);

struct BiasActGradients {
  View d_out;      // [rows, F]
  View d_x, d_up;  // as x and up
  View sums;       // float32: of the rows of d_x, and behind them of d_up; or none
};

void bias_act_backward(const BiasActInputs& inputs, const BiasActGradients& gradients, const Queue& queue);

// d_q, d_k, d_v: [B, H, T, D/H], any strides → d_qkv: [B, T, 3D]; sums: [3D] float32, its sums over B and T, or none.
void split_heads_backward(const View& d_q, const View& d_k, const View& d_v, const View& d_qkv, const View& sums,
                          const Queue& queue);

// On a processor alone; a GPU has it from PyTorch. qkv: [B, T, 3D], queries, keys and values of all heads →
// out: [B, T, D]; logsums: [B, H, T] float32, the logarithms of the sums of exponentials.
void attention(const View& qkv, int64_t heads, float scale, const View& out, const View& logsums, const Queue& queue);

// grad: [B, T, D] → d_qkv: as qkv; sums: [3D] float32, its sums over B and T, or none.
void attention_backward(const View& qkv, int64_t heads, float scale, const View& grad, const View& logsums,
                        const View& d_qkv, const View& sums, const Queue& queue);

}  // namespace fastvit
