// The products of images of any sizes whose operands are float32.
#include "patch_embed_packed.h"

namespace fastvit {

template void launch_packed_forward<float>(Type, bool, const PatchEmbed&, const Queue&);
template void launch_packed_weight_gradient<float>(Type, bool, const WeightGradient&, const Queue&);

}  // namespace fastvit
