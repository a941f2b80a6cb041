// The one file in which CUDA and HIP differ, and the stand-in for both that the tests run on a CPU: runtime
// calls, warps, barriers, shared memory and the few instructions that C++ has no name for.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(FSL_SIMT)
#include "simt.h"  // bench/without_gpu/simt
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

#if defined(FSL_SIMT)
#define FSL_DEVICE inline
#define FSL_KERNEL(threads, waves) void
#define FSL_SHARED(type, name, count)                                      \
  type* const name = simt::shared<type>(count, [] {                        \
    static constexpr simt::Variable variable{#name, {__FILE__, __LINE__}}; \
    return &variable;                                                      \
  }())
#define FSL_UNROLL
#define FSL_UNROLL_BY(count)
#else
#define FSL_DEVICE __device__ __forceinline__
// At most `threads` per block. `waves` per SIMD are what AMD's compiler must leave registers for.
#if defined(__HIP__)
#define FSL_KERNEL(threads, waves) \
  __global__ void __launch_bounds__(threads) __attribute__((amdgpu_waves_per_eu(waves)))
#else
// One block must fit; without the 1 ptxas would rather spill than take more than 64 registers.
#define FSL_KERNEL(threads, waves) __global__ void __launch_bounds__(threads, 1)
#endif
#define FSL_SHARED(type, name, count) __shared__ type name[count]
#define FSL_UNROLL _Pragma("unroll")
#define FSL_PRAGMA(text) _Pragma(#text)
#define FSL_UNROLL_BY(count) FSL_PRAGMA(unroll count)  // 1: a loop
#endif

namespace fsl::gpu {

// Lanes that run in step. A kernel must be right for 32 and for 64.
#if defined(FSL_SIMT)
constexpr int kWarp = FSL_SIMT;
#elif defined(__HIP__) && (defined(__GFX9__) || !defined(__HIP_DEVICE_COMPILE__))
constexpr int kWarp = 64;
#else
constexpr int kWarp = 32;
#endif
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;

// Whether 16 bytes may be loaded from, and stored to, any address. NVIDIA's must be aligned; AMD's need not
// be.
#if defined(__HIP__) || (defined(FSL_SIMT) && FSL_SIMT == 64)
constexpr bool kLoadsAnywhere = true;
#else
constexpr bool kLoadsAnywhere = false;
#endif

struct alignas(16) Chunk {
  uint32_t word[4];
};

// The bound of a kernel whose blocks are as large as a chip allows: FSL_KERNEL(FSL_VENDOR(NVIDIA's, AMD's),
// ...).
#if defined(__HIP__)
#define FSL_VENDOR(nvidia, amd) amd
#else
#define FSL_VENDOR(nvidia, amd) nvidia
#endif

// Two floats rounded to bf16, to nearest even, where there is no instruction for it. A NaN stays one only if
// its low half is clear, as it is in those that arithmetic makes of bf16 logits and of quiet row constants.
FSL_DEVICE uint32_t pack_bf16_bits(float low, float high);

// --- what a thread knows and how threads meet -----------------------------------------------------------

#if defined(FSL_SIMT)

FSL_DEVICE int thread_id() { return simt::thread_id(); }
FSL_DEVICE int block_threads() { return simt::block_threads(); }
FSL_DEVICE uint32_t block_id() { return simt::block_id(); }
FSL_DEVICE uint32_t grid_blocks() { return simt::grid_blocks(); }
FSL_DEVICE void barrier(simt::Site site = simt::here()) { simt::barrier(site); }
FSL_DEVICE void keep_order() {}
FSL_DEVICE void forget(uint32_t&) {}
FSL_DEVICE void forget_common(int&) {}
FSL_DEVICE void settle(float&) {}
FSL_DEVICE float common(float x) { return x; }
template <class T>
FSL_DEVICE T lane_xor(T value, int mask, simt::Site site = simt::here()) {
  return simt::lane_xor(value, mask, site);
}
FSL_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FSL_DEVICE float max(float a, float b) { return __builtin_fmaxf(a, b); }  // of a NaN and a number, the number
FSL_DEVICE float exp2(float x) { return __builtin_exp2f(x); }
FSL_DEVICE float log(float x) { return __builtin_logf(x); }
FSL_DEVICE float reciprocal(float x) { return 1.0f / x; }
FSL_DEVICE uint32_t bits(float x) { return simt::bit_cast<uint32_t>(x); }
FSL_DEVICE float from_bits(uint32_t x) { return simt::bit_cast<float>(x); }
FSL_DEVICE uint32_t funnel_right(uint32_t high, uint32_t low, int right) {
  return right ? high << (32 - right) | low >> right : low;
}
FSL_DEVICE float widen_half(uint32_t half) { return simt::widen_half(half); }
FSL_DEVICE uint32_t pack_half(float low, float high) { return simt::pack_half(low, high); }
FSL_DEVICE uint32_t pack_bf16(float low, float high) {
  return FSL_SIMT == 64 ? pack_bf16_bits(low, high) : simt::pack_bf16(low, high);
}

FSL_DEVICE Chunk load_chunk(const char* at) { return *reinterpret_cast<const Chunk*>(at); }
FSL_DEVICE Chunk load_chunk_anywhere(const char* at) {
  Chunk chunk;
  __builtin_memcpy(&chunk, at, sizeof chunk);
  return chunk;
}
FSL_DEVICE Chunk load_chunk_whole(const char* at) { return load_chunk(at); }
template <class T>
FSL_DEVICE void store(char* at, const T& value) {
  *reinterpret_cast<T*>(at) = value;
}
FSL_DEVICE void store_chunk_anywhere(char* at, const Chunk& chunk) {
  __builtin_memcpy(at, &chunk, sizeof chunk);
}
FSL_DEVICE char* dynamic_shared() { return static_cast<char*>(simt::dynamic_shared()); }
FSL_DEVICE void copy_chunk(char* shared, const char* global) { simt::copy_later(shared, global); }
FSL_DEVICE void copies_done() { simt::copies_done(); }
FSL_DEVICE void cluster_barrier(simt::Site site = simt::here()) { simt::cluster_barrier(site); }
FSL_DEVICE float cluster_read(float* mine, int rank, simt::Site site = simt::here()) {
  return *simt::cluster_map(mine, rank, site);
}

#elif defined(__HIP__)

FSL_DEVICE int thread_id() { return __builtin_amdgcn_workitem_id_x(); }
FSL_DEVICE int block_threads() { return __builtin_amdgcn_workgroup_size_x(); }
FSL_DEVICE uint32_t block_id() { return __builtin_amdgcn_workgroup_id_x(); }
FSL_DEVICE uint32_t grid_blocks() {
  return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x();
}
FSL_DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// Nothing is moved across: the compiler would trade registers for more instructions in flight than it needs.
FSL_DEVICE void keep_order() { __builtin_amdgcn_sched_barrier(0); }
// What was computed from the word is computed again: it would rather be kept, in registers there are not.
FSL_DEVICE void forget(uint32_t& word) { asm volatile("" : "+v"(word)); }
FSL_DEVICE void forget_common(int& number) { asm volatile("" : "+s"(number)); }  // the same in all lanes
// What the sum is made of is computed here, not later, when all of it would have to be kept.
FSL_DEVICE void settle(float& sum) { asm volatile("" : "+v"(sum)); }
// A number that is the same in all lanes, in a register of the wave.
FSL_DEVICE float common(float x) {
  return __builtin_bit_cast(float, __builtin_amdgcn_readfirstlane(__builtin_bit_cast(int, x)));
}
template <class T>
FSL_DEVICE T lane_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  const int lane = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
  return __builtin_bit_cast(T,
                            __builtin_amdgcn_ds_bpermute((lane ^ mask) * 4, __builtin_bit_cast(int, value)));
}
FSL_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FSL_DEVICE float max(float a, float b) { return __builtin_fmaxf(a, b); }
// The bare instruction: results under 2^-126 are 0, without three instructions more to rescue them.
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
FSL_DEVICE uint32_t pack_bf16(float low, float high) { return pack_bf16_bits(low, high); }

// Global memory, said aloud: of a pointer inside a kernel's argument the compiler only assumes that it is
// generic, and a generic access counts as one of LDS too.
template <class T>
using Global = __attribute__((address_space(1))) T;
typedef uint32_t Words __attribute__((ext_vector_type(4)));
typedef Words WordsAnywhere __attribute__((aligned(2)));
FSL_DEVICE Chunk chunk_of(Words words) { return {{words[0], words[1], words[2], words[3]}}; }
FSL_DEVICE Chunk load_chunk(const char* at) { return chunk_of(*(const Global<Words>*)at); }
FSL_DEVICE Chunk load_chunk_anywhere(const char* at) { return chunk_of(*(const Global<WordsAnywhere>*)at); }
FSL_DEVICE Chunk load_chunk_whole(const char* at) { return load_chunk(at); }
template <class T>
FSL_DEVICE void store(char* at, T value) {
  *(Global<T>*)at = value;
}
FSL_DEVICE void store(char* at, const Chunk& c) {
  *(Global<Words>*)at = Words{c.word[0], c.word[1], c.word[2], c.word[3]};
}
FSL_DEVICE void store_chunk_anywhere(char* at, const Chunk& c) {
  *(Global<WordsAnywhere>*)at = Words{c.word[0], c.word[1], c.word[2], c.word[3]};
}
// Never called: rows are held in registers, by one block each.
FSL_DEVICE char* dynamic_shared() { return nullptr; }
FSL_DEVICE void copy_chunk(char*, const char*) {}
FSL_DEVICE void copies_done() {}
FSL_DEVICE void cluster_barrier() {}
FSL_DEVICE float cluster_read(float* mine, int) { return *mine; }

#else

FSL_DEVICE int thread_id() { return threadIdx.x; }
FSL_DEVICE int block_threads() { return blockDim.x; }
FSL_DEVICE uint32_t block_id() { return blockIdx.x; }
FSL_DEVICE uint32_t grid_blocks() { return gridDim.x; }
FSL_DEVICE void barrier() { __syncthreads(); }
FSL_DEVICE void keep_order() {}
FSL_DEVICE void forget(uint32_t&) {}
FSL_DEVICE void forget_common(int&) {}
FSL_DEVICE void settle(float&) {}
FSL_DEVICE float common(float x) { return x; }
template <class T>
FSL_DEVICE T lane_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
FSL_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
FSL_DEVICE float max(float a, float b) { return fmaxf(a, b); }
FSL_DEVICE float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
FSL_DEVICE float log(float x) { return logf(x); }
FSL_DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
FSL_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
FSL_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }
FSL_DEVICE uint32_t funnel_right(uint32_t high, uint32_t low, int right) {
  return __funnelshift_r(low, high, right);
}
FSL_DEVICE float widen_half(uint32_t half) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(static_cast<uint16_t>(half)));
  return result;
}
FSL_DEVICE uint32_t pack_half(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
FSL_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

FSL_DEVICE Chunk load_chunk(const char* at) { return *reinterpret_cast<const Chunk*>(at); }
// Never called: see kLoadsAnywhere.
FSL_DEVICE Chunk load_chunk_anywhere(const char* at) { return load_chunk(at); }
// A load that stays one: of a choice between loaded words the compiler would make loads from chosen
// addresses.
FSL_DEVICE Chunk load_chunk_whole(const char* at) {
  Chunk c;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
               : "l"(__cvta_generic_to_global(at)));
  return c;
}
template <class T>
FSL_DEVICE void store(char* at, const T& value) {
  *reinterpret_cast<T*>(at) = value;
}
FSL_DEVICE void store_chunk_anywhere(char* at, const Chunk& chunk) { store(at, chunk); }  // never called

// The launch's shared_bytes, from a multiple of 16 on.
FSL_DEVICE char* dynamic_shared() {
  extern __shared__ Chunk dynamic[];
  return reinterpret_cast<char*>(dynamic);
}
// 16 aligned bytes, past registers and the L1 cache. They are there after copies_done, for this thread.
FSL_DEVICE void copy_chunk(char* shared, const char* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global))
               : "memory");
}
FSL_DEVICE void copies_done() { asm volatile("cp.async.wait_all;" : : : "memory"); }
// Before compute capability 9.0 a cluster is one block, which calls neither.
FSL_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
               :
               :
               : "memory");
#endif
}
FSL_DEVICE float cluster_read(float* mine, int rank) {
  float value = *mine;
#if __CUDA_ARCH__ >= 900
  uint32_t there = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
  return value;
}

#endif

FSL_DEVICE uint32_t upper_half_rounded(uint32_t bits) { return bits + 0x7fffu + (bits >> 16 & 1u); }
FSL_DEVICE uint32_t pack_bf16_bits(float low, float high) {
  return upper_half_rounded(bits(low)) >> 16 | (upper_half_rounded(bits(high)) & 0xffff0000u);
}

FSL_DEVICE int lane_id() { return thread_id() % kWarp; }
FSL_DEVICE int warp_id() { return thread_id() / kWarp; }
FSL_DEVICE int block_warps() { return block_threads() / kWarp; }

// --- runtime ---------------------------------------------------------------------------------------------

struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  int shared_bytes = 0;  // dynamic
  int cluster = 1;       // blocks that see each other's shared memory
};

#if defined(FSL_SIMT)
using Error = int;
inline const char* words(Error) { return "refused by the SIMT shim"; }
#elif defined(__HIP__)
using Stream = hipStream_t;
using Error = hipError_t;
inline const char* words(Error error) { return hipGetErrorString(error); }
#else
using Stream = cudaStream_t;
using Error = cudaError_t;
inline const char* words(Error error) { return cudaGetErrorString(error); }
#endif

// A launch the device refuses must never pass for a result.
inline void check(Error error, const char* kernel, const Grid& grid) {
  if (!error) return;
  throw std::runtime_error(std::string(kernel) + ": " + words(error) + " (grid of " +
                           std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) +
                           " threads, clusters of " + std::to_string(grid.cluster) + ", " +
                           std::to_string(grid.shared_bytes) + " bytes of shared memory)");
}

// What a block may have, static and dynamic together, on the current device.
inline int most_shared_bytes() {
#if defined(FSL_SIMT)
  return FSL_SIMT == 64 ? 64 << 10 : 227 << 10;
#elif defined(__HIP__)
  return 64 << 10;
#else
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice", {});
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute", {});
  return bytes;
#endif
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, void* on, Args... args) {
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7fffffff)
    throw std::invalid_argument(std::string(name) + ": expected at most 2^31 - 1 blocks, got " +
                                std::to_string(grid.blocks));
#if defined(FSL_SIMT)
  (void)on;
  const Error error = simt::launch(name, grid.blocks, grid.threads, grid.shared_bytes, grid.cluster,
                                   [=] { kernel(static_cast<Params>(args)...); });
#else
  const Stream stream = static_cast<Stream>(on);
  std::tuple<Params...> values{static_cast<Params>(args)...};
  void* pointers[sizeof...(Params)];
  std::apply(
      [&](auto&... value) {
        size_t i = 0;
        ((pointers[i++] = &value), ...);
      },
      values);
  const dim3 blocks(static_cast<unsigned>(grid.blocks)), threads(grid.threads);
  const void* function = reinterpret_cast<const void*>(kernel);
#if defined(__HIP__)
  const Error error = hipLaunchKernel(function, blocks, threads, pointers, grid.shared_bytes, stream);
#else
  if (grid.shared_bytes > 48 << 10)  // more must be asked for
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
          name, grid);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{blocks, threads,  static_cast<size_t>(grid.shared_bytes),
                            stream, &cluster, grid.cluster > 1 ? 1u : 0u};
  const Error error = cudaLaunchKernelExC(&config, function, pointers);
#endif
#endif
  check(error, name, grid);
}

}  // namespace fsl::gpu
