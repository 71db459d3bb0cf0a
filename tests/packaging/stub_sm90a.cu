// Compiles for sm_90a and for nothing else.
namespace fastvit {

__global__ void only_here() { asm volatile("wgmma.fence.sync.aligned;"); }

int in_the_other_file() { return 1; }

}  // namespace fastvit
