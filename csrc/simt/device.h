// The primitives as PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SIMT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_BOTH __host__ __device__ __forceinline__  // also called by launchers
#define SIMT_UNROLL _Pragma("unroll")

namespace simt {

using half = __half;
using bfloat16 = __nv_bfloat16;

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

SIMT_DEVICE int thread_index() { return threadIdx.x; }
SIMT_DEVICE int block_x() { return blockIdx.x; }
SIMT_DEVICE int grid_x() { return gridDim.x; }
SIMT_DEVICE int block_y() { return blockIdx.y; }
SIMT_DEVICE shared_address shared_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)); }

SIMT_DEVICE void sync_threads() { __syncthreads(); }
SIMT_DEVICE void sync_warp() { __syncwarp(); }
SIMT_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

SIMT_DEVICE uint32_t bits(float value) { return __float_as_uint(value); }
SIMT_DEVICE float from_bits(uint32_t value) { return __uint_as_float(value); }

// To the upper 19 bits, nearest, ties away from zero.
SIMT_DEVICE uint32_t round_to_tf32(uint32_t word) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(from_bits(word)));
  return rounded;
}

SIMT_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// 16-bit numbers, rounded to nearest, ties to even

SIMT_DEVICE float to_float(float value) { return value; }
SIMT_DEVICE float to_float(half value) { return __half2float(value); }
SIMT_DEVICE float to_float(bfloat16 value) { return __bfloat162float(value); }

template <class T>
SIMT_DEVICE T round_to(float value) {
  if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// Two rounded values in one register, the first in its low half.
template <class T>
SIMT_DEVICE uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// The value in the low (0) or high (1) half of a register.
template <class T>
SIMT_DEVICE float half_of(uint32_t word, int which) {
  if constexpr (std::is_same_v<T, half>) {
    const __half2 pair = *reinterpret_cast<const __half2*>(&word);
    return which ? __high2float(pair) : __low2float(pair);
  } else {
    return from_bits(which ? word & 0xffff0000u : word << 16);
  }
}

// Global memory

template <int WORDS>
SIMT_DEVICE Vector<WORDS> load_global(const void* address) {
  Vector<WORDS> value;
  if constexpr (WORDS == 1) {
    value.word[0] = __ldg(static_cast<const unsigned int*>(address));
  } else if constexpr (WORDS == 2) {
    const uint2 pair = __ldg(static_cast<const uint2*>(address));
    value.word[0] = pair.x, value.word[1] = pair.y;
  } else {
    const uint4 quad = __ldg(static_cast<const uint4*>(address));
    value.word[0] = quad.x, value.word[1] = quad.y, value.word[2] = quad.z, value.word[3] = quad.w;
  }
  return value;
}

template <int WORDS>
SIMT_DEVICE void store_global(void* address, Vector<WORDS> value) {
  *static_cast<Vector<WORDS>*>(address) = value;
}

template <class T>
SIMT_DEVICE T load_element(const T* address) {
  return __ldg(address);
}

template <class T>
SIMT_DEVICE void store_element(T* address, T value) {
  *address = value;
}

// Shared memory

template <int WORDS>
SIMT_DEVICE Vector<WORDS> load_shared(shared_address address) {
  Vector<WORDS> value;
  if constexpr (WORDS == 1) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value.word[0]) : "r"(address) : "memory");
  } else if constexpr (WORDS == 2) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(value.word[0]), "=r"(value.word[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
                 : "r"(address)
                 : "memory");
  }
  return value;
}

template <int WORDS>
SIMT_DEVICE void store_shared(shared_address address, Vector<WORDS> value) {
  if constexpr (WORDS == 1) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value.word[0]) : "memory");
  } else if constexpr (WORDS == 2) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(value.word[0]), "r"(value.word[1]) : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.word[0]), "r"(value.word[1]),
                 "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
  }
}

// Asynchronous copies from global to shared memory. Where `valid` is false nothing is read and zeros arrive.

template <int BYTES>
SIMT_DEVICE void copy_async(shared_address target, const void* source, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  const int size = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source), "n"(BYTES), "r"(size)
                 : "memory");
  }
}

SIMT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's committed groups are in flight.
template <int PENDING>
SIMT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Tensor cores

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
SIMT_DEVICE void load_matrices(uint32_t (&out)[4], shared_address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

SIMT_DEVICE void load_matrices_transposed(uint32_t (&out)[4], shared_address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// sum += a [16, 16] x b [16, 8] in float32; fragments as PTX lays them out for mma.m16n8k16.
template <class T>
SIMT_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define SIMT_MMA(types)                                                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "   \
               "{%0, %1, %2, %3};"                                                                                    \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, half>) {
    SIMT_MMA("f16.f16");
  } else {
    static_assert(std::is_same_v<T, bfloat16>, "products of float16 and bfloat16");
    SIMT_MMA("bf16.bf16");
  }
#undef SIMT_MMA
}

// sum += a [16, 8] x b [8, 8] of float32 bits, the lower 13 of which are ignored; fragments as for mma.m16n8k8.
SIMT_DEVICE void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What sm_90a alone has; elsewhere it traps, so that one source compiles for all.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SIMT_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define SIMT_SM90A(...) __trap()
#endif

// The tensor cores of a warpgroup: four warps multiply operands that lie in shared memory, while their threads go on.

// What this thread has written to shared memory becomes visible to products behind the next barrier. wgmma reads by the
// asynchronous proxy, threads and cp.async write by the generic one, and PTX orders the two by this fence alone; every
// spelling of it waits for the thread's own writes (MEMBAR.CTA), so that a product had better be under way meanwhile.
SIMT_DEVICE void publish_shared() { SIMT_SM90A("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and before the next one whenever the thread has had its sums.
SIMT_DEVICE void warpgroup_arrive() { SIMT_SM90A("wgmma.fence.sync.aligned;" ::: "memory"); }

// Of a matrix of 16-bit values in rows of 128 bytes, eight of which take 1024 aligned bytes, from an address in the
// first row. Bits 4 to 6 of every value's address are changed by bits 7 to 9: the 128-byte swizzle. Where rows are the
// reduction, they hold 64 columns, and the next 64 lie panel_bytes on.
SIMT_DEVICE uint64_t matrix_descriptor(shared_address address, int panel_bytes = 16) {
  constexpr uint64_t ROWS = uint64_t{1024 >> 4} << 32, SWIZZLE = uint64_t{1} << 62;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(panel_bytes >> 4) << 16 | ROWS | SWIZZLE;
}

// sums += a [64, 16] x b [192, 16] transposed; where TRANSPOSED the reduction is the rows of both. The sums may not be
// touched until the wait. In warp w of the four, with g = lane / 4 and t = 2 (lane % 4), sums[j][i] is that of row
// 16 w + g + 8 (i / 2) and column 8 j + t + i % 2.
template <class T, bool TRANSPOSED = false>
SIMT_DEVICE void warpgroup_multiply_add(WarpgroupSums& sums, uint64_t a, uint64_t b) {
#define SIMT_FOUR(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define SIMT_TWELVE(j) SIMT_FOUR(j), SIMT_FOUR(j + 1), SIMT_FOUR(j + 2)
#define SIMT_WGMMA(types)                                                                                             \
  SIMT_SM90A("wgmma.mma_async.sync.aligned.m64n192k16.f32." types " "                                             \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                   \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                   \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "                  \
                 "%96, %97, 1, 1, 1, %98, %98;"                                                                       \
                 : SIMT_TWELVE(0), SIMT_TWELVE(3), SIMT_TWELVE(6), SIMT_TWELVE(9), SIMT_TWELVE(12), SIMT_TWELVE(15),  \
                   SIMT_TWELVE(18), SIMT_TWELVE(21)                                                                   \
                 : "l"(a), "l"(b), "n"(static_cast<int>(TRANSPOSED)))
  if constexpr (std::is_same_v<T, half>) {
    SIMT_WGMMA("f16.f16");
  } else {
    static_assert(std::is_same_v<T, bfloat16>, "products of float16 and bfloat16");
    SIMT_WGMMA("bf16.bf16");
  }
#undef SIMT_WGMMA
#undef SIMT_TWELVE
#undef SIMT_FOUR
}

SIMT_DEVICE void warpgroup_commit() { SIMT_SM90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the committed groups of products are in flight. The instruction names no registers:
// that the sums are not read before it must be said to the compiler.
template <int PENDING>
SIMT_DEVICE void warpgroup_wait(WarpgroupSums& sums) {
  SIMT_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  SIMT_UNROLL for (auto& four : sums) {
    asm volatile("" : "+f"(four[0]), "+f"(four[1]), "+f"(four[2]), "+f"(four[3])::"memory");
  }
}

// Clusters of blocks, which reach into one another's shared memory, where the same address has its place in each.

SIMT_DEVICE int cluster_rank() {
  int rank = 0;
  SIMT_SM90A("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster.
SIMT_DEVICE void sync_cluster() {
  SIMT_SM90A("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// An mbarrier, in 8 bytes of shared memory: a phase ends when as many have arrived, and the bytes expected have come.
// Arrivals and waits are of the block's scope, as nothing that threads write passes between blocks: at the cluster's an
// arrival would wait for all writes to global memory, and a wait empty the first-level cache.
SIMT_DEVICE void mbarrier_init(shared_address mbarrier, int arrivals) {
  SIMT_SM90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}

// Those that this thread has initialised become visible to the cluster and to bulk copies, behind the next barrier.
SIMT_DEVICE void mbarrier_publish() { SIMT_SM90A("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// At the block's own.
SIMT_DEVICE void mbarrier_arrive(shared_address mbarrier) {
  SIMT_SM90A("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}

// At the mbarrier of a block of the cluster.
SIMT_DEVICE void mbarrier_arrive(shared_address mbarrier, int rank) {
  SIMT_SM90A("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
             "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(mbarrier),
             "r"(rank)
             : "memory");
}

// Arrives, and lets the phase wait for bytes of bulk copies besides.
SIMT_DEVICE void mbarrier_expect(shared_address mbarrier, int bytes) {
  SIMT_SM90A("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended: the first one's is 0.
SIMT_DEVICE void mbarrier_wait(shared_address mbarrier, int parity) {
  int has_ended = 0;
  do {
    SIMT_SM90A("{\n\t.reg .pred ended;\n\t"
               "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n\t"
               "selp.s32 %0, 1, 0, ended;\n\t}"
               : "=r"(has_ended)
               : "r"(mbarrier), "r"(parity)
               : "memory");
  } while (!has_ended);
}

// From global memory to the same place in each block whose bit is set in `ranks`, by one read. It arrives by the
// asynchronous proxy, and its bytes at the mbarrier of each. Addresses and sizes are multiples of 16.
SIMT_DEVICE void copy_bulk(shared_address target, const void* source, int bytes, shared_address mbarrier, int ranks) {
  SIMT_SM90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
             "[%0], [%1], %2, [%3], %4;" ::"r"(target),
             "l"(source), "r"(bytes), "r"(mbarrier), "h"(static_cast<uint16_t>(ranks))
             : "memory");
}

// A launch shares registers out evenly. A warpgroup whose threads do with fewer gives the others to the block's pool; one
// that needs more waits until the pool has them. nvcc compiles what follows for as many, and says so where it ignores
// the instruction instead.
template <int COUNT>
SIMT_DEVICE void release_registers() {
  static_assert(IS_REGISTER_COUNT<COUNT>, "a multiple of 8 from 24 to 256");
  SIMT_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
SIMT_DEVICE void request_registers() {
  static_assert(IS_REGISTER_COUNT<COUNT>, "a multiple of 8 from 24 to 256");
  SIMT_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#undef SIMT_SM90A

}  // namespace simt
