// The products whose operands are float32.
#include "patch_embed_instances.h"

namespace fastvit {

template void launch_forward<float>(Type, bool, const PatchEmbed&, const Queue&);
template void launch_image_gradient<float>(bool, const ImageGradient&, const Queue&);
template void launch_weight_gradient<float>(Type, bool, const WeightGradient&, const Queue&);

}  // namespace fastvit
