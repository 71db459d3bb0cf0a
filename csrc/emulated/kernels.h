// The launchers for types that are known at run time. Apart from the binding, which takes longer to compile than all
// kernels: a changed kernel is built and linked to the same binding.
#pragma once

#include "../parameters.h"
#include "../simt/launch.h"

namespace fastvit {

void launch(const AddPosition& parameters, Type in, Type out, simt::Stream& stream);
void launch(const SumRows& parameters, Type type, simt::Stream& stream);
void launch(const WeightGradient& parameters, Type image, Type compute, simt::Stream& stream);
void launch(const PatchEmbed& parameters, Type image, Type compute, Type out, simt::Stream& stream);

}  // namespace fastvit
