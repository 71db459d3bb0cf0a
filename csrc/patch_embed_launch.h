// The products by compute type. Each is compiled in a file of its own, side by side with the others; what else they
// depend on at run time is chosen there.
#pragma once

#include "numeric.h"
#include "parameters.h"
#include "simt/queue.h"

namespace fastvit {

using simt::Queue;

// Compute is half, bfloat16 or float; float is multiplied at TF32 precision where `tf32` is true.
template <class Compute>
void launch_forward(Type image, bool tf32, const PatchEmbed& p, const Queue& queue);

template <class Compute>
void launch_image_gradient(bool tf32, const ImageGradient& p, const Queue& queue);

template <class Compute>
void launch_weight_gradient(Type image, bool tf32, const WeightGradient& p, const Queue& queue);

// Rows that a split of the weight gradient is a multiple of: those of a step of its largest tile.
constexpr int WEIGHT_GRADIENT_STEP = 64;

// Whether the weight gradient is made of tiles of 128 by 128, which a GPU has enough of after splitting the rows.
inline bool is_large(const WeightGradient& p) { return p.width >= 128 && p.pixels.k_length >= 128; }

#if defined(FASTVIT_HAS_SM90A)
// By the warpgroups of sm_90a. False: the patches do not suit it, and nothing is launched.
template <class Compute>
bool launch_forward_sm90a(Type image, const PatchEmbed& p, const Queue& queue);
#endif

}  // namespace fastvit
