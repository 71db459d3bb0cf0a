// The products of images of any sizes whose operands are bfloat16.
#include "patch_embed_packed.h"

namespace fastvit {

template void launch_packed_forward<bfloat16>(Type, bool, const PatchEmbed&, const Queue&);
template void launch_packed_weight_gradient<bfloat16>(Type, bool, const WeightGradient&, const Queue&);

}  // namespace fastvit
