// The platform for AMD GPUs: HIP.
#pragma once

#include <hip/hip_runtime.h>

#define FSL_DEVICE __device__ __forceinline__
// At most `threads` per block. The compiler limits registers so that at least `waves` waves fit on a SIMD.
#define FSL_KERNEL(threads, waves) \
  __global__ void __launch_bounds__(threads) __attribute__((amdgpu_waves_per_eu(waves)))
// Selects a number by vendor: FSL_KERNEL(FSL_VENDOR(512, 1024), ...) allows larger blocks on AMD.
#define FSL_VENDOR(nvidia, amd) amd
#define FSL_SHARED(type, name, count) __shared__ type name[count]
#define FSL_UNROLL _Pragma("unroll")
#define FSL_PRAGMA(text) _Pragma(#text)
#define FSL_UNROLL_BY(count) FSL_PRAGMA(unroll count)  // 1: a loop

#include "round_bf16.h"

namespace fsl::gpu {

// Lanes per wave. Kernels must be correct for 32 and for 64.
#if defined(__GFX9__) || !defined(__HIP_DEVICE_COMPILE__)
constexpr int kWarp = 64;
#else
constexpr int kWarp = 32;
#endif

// Whether 16-byte loads and stores work at any address.
constexpr bool kUnalignedAccess = true;

FSL_DEVICE int thread_id() { return __builtin_amdgcn_workitem_id_x(); }
FSL_DEVICE int block_threads() { return __builtin_amdgcn_workgroup_size_x(); }
FSL_DEVICE uint32_t block_id() { return __builtin_amdgcn_workgroup_id_x(); }
FSL_DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// Scheduling barrier: the compiler moves no instruction across it. Without it the compiler hoists
// instructions and runs out of registers.
FSL_DEVICE void scheduling_barrier() { __builtin_amdgcn_sched_barrier(0); }
// Optimisation barrier: the compiler must compute the value here and knows nothing about it afterwards. So it
// recomputes what depends on the value instead of keeping it in a register.
FSL_DEVICE void optimisation_barrier(uint32_t& word) { asm volatile("" : "+v"(word)); }
FSL_DEVICE void optimisation_barrier(float& x) { asm volatile("" : "+v"(x)); }
// The same for a number that is equal in all lanes and lives in a scalar register.
FSL_DEVICE void optimisation_barrier_uniform(int& number) { asm volatile("" : "+s"(number)); }
// Moves a number that is equal in all lanes into a scalar register.
FSL_DEVICE float broadcast_first_lane(float x) {
  return __builtin_bit_cast(float, __builtin_amdgcn_readfirstlane(__builtin_bit_cast(int, x)));
}
template <class T>
FSL_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  const int lane = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
  return __builtin_bit_cast(T,
                            __builtin_amdgcn_ds_bpermute((lane ^ mask) * 4, __builtin_bit_cast(int, value)));
}
FSL_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FSL_DEVICE float max(float a, float b) { return __builtin_fmaxf(a, b); }
FSL_DEVICE float min(float a, float b) { return __builtin_fminf(a, b); }
// The bare instruction: results below 2^-126 become 0. Keeping them would take three more instructions.
FSL_DEVICE float exp2(float x) { return __builtin_amdgcn_exp2f(x); }
FSL_DEVICE float log(float x) { return __builtin_logf(x); }
FSL_DEVICE float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }
FSL_DEVICE uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
FSL_DEVICE float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }
FSL_DEVICE uint32_t funnel_right(uint32_t high, uint32_t low, int right) {
  return __builtin_amdgcn_alignbit(high, low, right);
}
FSL_DEVICE uint16_t bits16(_Float16 x) { return __builtin_bit_cast(uint16_t, x); }
FSL_DEVICE float widen_half(uint32_t half) {
  return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(half)));
}
FSL_DEVICE uint32_t pack_half(float low, float high) {
  return bits16(static_cast<_Float16>(low)) | static_cast<uint32_t>(bits16(static_cast<_Float16>(high)))
                                                  << 16;
}
FSL_DEVICE uint32_t pack_bf16(float low, float high) { return pack_bf16_bits(bits(low), bits(high)); }

// A type in global memory. The compiler treats a pointer inside a kernel argument as generic, and a generic
// access also counts as an LDS access.
template <class T>
using Global = __attribute__((address_space(1))) T;
typedef uint32_t Words __attribute__((ext_vector_type(4)));
typedef Words WordsAnywhere __attribute__((aligned(2)));
FSL_DEVICE Chunk chunk_of(Words words) { return {{words[0], words[1], words[2], words[3]}}; }
FSL_DEVICE Chunk load_chunk(const char* at) { return chunk_of(*(const Global<Words>*)at); }
FSL_DEVICE Chunk load_chunk_unaligned(const char* at) { return chunk_of(*(const Global<WordsAnywhere>*)at); }
FSL_DEVICE Chunk load_chunk_volatile(const char* at) { return load_chunk(at); }
template <class T>
FSL_DEVICE void store(char* at, T value) {
  *(Global<T>*)at = value;
}
FSL_DEVICE void store(char* at, const Chunk& c) {
  *(Global<Words>*)at = Words{c.word[0], c.word[1], c.word[2], c.word[3]};
}
FSL_DEVICE void store_chunk_unaligned(char* at, const Chunk& c) {
  *(Global<WordsAnywhere>*)at = Words{c.word[0], c.word[1], c.word[2], c.word[3]};
}

// Only templates that hold rows in shared memory call these. HIP never instantiates those templates, so there
// is no definition.
__device__ uint32_t ballot(bool value);
__device__ uint32_t count_bits(uint32_t x);
__device__ char* dynamic_shared();
__device__ void async_copy(char* shared, const char* global);
__device__ void async_wait();

// A cluster is one block.
FSL_DEVICE void cluster_barrier() {}
FSL_DEVICE float cluster_read(float* mine, int) { return *mine; }

// --- runtime ---------------------------------------------------------------------------------------------

// The shared memory that a block may have on the current device, static and dynamic together.
inline int most_shared_bytes() { return 64 << 10; }

// Launches a kernel. Returns null, or the error message.
template <class... Params, class... Args>
const char* enqueue(const char*, void (*kernel)(Params...), const Grid& grid, void* stream, Args... args) {
  std::tuple<Params...> values{static_cast<Params>(args)...};
  const hipError_t error = hipLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads),
      addresses_of(values).data(), grid.shared_bytes, static_cast<hipStream_t>(stream));
  return error ? hipGetErrorString(error) : nullptr;
}

}  // namespace fsl::gpu
