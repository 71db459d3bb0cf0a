// The products whose operands are float16.
#if !defined(FASTVIT_FEW_TYPES)
#include "patch_embed_instances.h"

namespace fastvit {

template void launch_forward<half>(Type, bool, const PatchEmbed&, const Queue&);
template void launch_image_gradient<half>(bool, const ImageGradient&, const Queue&);
template void launch_weight_gradient<half>(Type, bool, const WeightGradient&, const Queue&);

}  // namespace fastvit
#endif
