// The instantiations of add_position and of the sum over rows.
#include "add_position.h"

namespace fastvit {

#define INSTANTIATE(in, out) template void launch_add_position<in, out>(const AddPosition&, simt::Stream&);
INSTANTIATE(float, float)
INSTANTIATE(float, half)
INSTANTIATE(float, bfloat16)
INSTANTIATE(half, half)
INSTANTIATE(half, float)
INSTANTIATE(half, bfloat16)
INSTANTIATE(bfloat16, bfloat16)
INSTANTIATE(bfloat16, float)
INSTANTIATE(bfloat16, half)
#undef INSTANTIATE

template void launch_sum_rows<float>(const SumRows&, simt::Stream&);
template void launch_sum_rows<half>(const SumRows&, simt::Stream&);
template void launch_sum_rows<bfloat16>(const SumRows&, simt::Stream&);

}  // namespace fastvit
