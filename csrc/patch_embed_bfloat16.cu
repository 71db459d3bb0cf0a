// The products whose operands are bfloat16.
#include "patch_embed_instances.h"

namespace fastvit {

template void launch_forward<bfloat16>(Type, bool, const PatchEmbed&, const Queue&);
template void launch_image_gradient<bfloat16>(bool, const ImageGradient&, const Queue&);
template void launch_weight_gradient<bfloat16>(Type, bool, const WeightGradient&, const Queue&);

}  // namespace fastvit
