// The products of images of any sizes whose operands are float16.
#if !defined(FASTVIT_FEW_TYPES)
#include "patch_embed_packed.h"

namespace fastvit {

template void launch_packed_forward<half>(Type, bool, const PatchEmbed&, const Queue&);
template void launch_packed_weight_gradient<half>(Type, bool, const WeightGradient&, const Queue&);

}  // namespace fastvit
#endif
