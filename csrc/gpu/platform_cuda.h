// The platform for NVIDIA GPUs: CUDA.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#define FSL_DEVICE __device__ __forceinline__
// At most `threads` per block; at least one block must fit on a multiprocessor. Without the 1, ptxas spills
// rather than use more than 64 registers. Only platform_hip.h uses `waves`.
#define FSL_KERNEL(threads, waves) __global__ void __launch_bounds__(threads, 1)
// Selects a number by vendor: FSL_KERNEL(FSL_VENDOR(512, 1024), ...) allows larger blocks on AMD.
#define FSL_VENDOR(nvidia, amd) nvidia
#define FSL_SHARED(type, name, count) __shared__ type name[count]
#define FSL_UNROLL _Pragma("unroll")
#define FSL_PRAGMA(text) _Pragma(#text)
#define FSL_UNROLL_BY(count) FSL_PRAGMA(unroll count)  // 1: a loop

namespace fsl::gpu {

constexpr int kWarp = 32;

// Whether 16-byte loads and stores work at any address.
constexpr bool kUnalignedAccess = false;

FSL_DEVICE int thread_id() { return threadIdx.x; }
FSL_DEVICE int block_threads() { return blockDim.x; }
FSL_DEVICE uint32_t block_id() { return blockIdx.x; }
FSL_DEVICE void barrier() { __syncthreads(); }
// nvcc needs none of the next five; see platform_hip.h.
FSL_DEVICE void scheduling_barrier() {}
FSL_DEVICE void optimisation_barrier(uint32_t&) {}
FSL_DEVICE void optimisation_barrier(float&) {}
FSL_DEVICE void optimisation_barrier_uniform(int&) {}
FSL_DEVICE float broadcast_first_lane(float x) { return x; }
template <class T>
FSL_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
// Bit l of the result: the value of lane l.
FSL_DEVICE uint32_t ballot(bool value) { return __ballot_sync(~0u, value); }
FSL_DEVICE uint32_t count_bits(uint32_t x) { return __popc(x); }
FSL_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
FSL_DEVICE float max(float a, float b) { return fmaxf(a, b); }
FSL_DEVICE float min(float a, float b) { return fminf(a, b); }
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
// Volatile, because the compiler would otherwise turn a select between loaded words into a load from a
// selected address.
FSL_DEVICE Chunk load_chunk_volatile(const char* at) {
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
// Only templates for kUnalignedAccess name these. CUDA never instantiates those templates, so there is no
// definition.
__device__ Chunk load_chunk_unaligned(const char* at);
__device__ void store_chunk_unaligned(char* at, const Chunk& chunk);

// The launch's dynamic shared memory (Grid::shared_bytes), aligned to 16 bytes.
FSL_DEVICE char* dynamic_shared() {
  extern __shared__ Chunk dynamic[];
  return reinterpret_cast<char*>(dynamic);
}
// Asynchronous copy of 16 aligned bytes that bypasses the registers and the L1 cache. This thread may read
// them after async_wait.
FSL_DEVICE void async_copy(char* shared, const char* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global))
               : "memory");
}
FSL_DEVICE void async_wait() { asm volatile("cp.async.wait_all;" : : : "memory"); }
// Before compute capability 9.0 a cluster is one block, and the kernels call neither of these.
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

// --- runtime ---------------------------------------------------------------------------------------------

// Null, or the error message.
inline const char* error_of(cudaError_t error) { return error ? cudaGetErrorString(error) : nullptr; }

// The shared memory that a block may have on the current device, static and dynamic together.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  check(error_of(cudaGetDevice(&device)), "cudaGetDevice", {});
  check(error_of(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        "cudaDeviceGetAttribute", {});
  return bytes;
}

// Calls fn(cudaLaunchConfig_t) for a kernel, and returns its result.
template <class Fn>
cudaError_t with_config(const void* kernel, const Grid& grid, void* stream, const Fn& fn) {
  if (grid.shared_bytes > 48 << 10) {  // more is opt-in
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (refused) return refused;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  return fn(cudaLaunchConfig_t{dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads),
                               static_cast<size_t>(grid.shared_bytes), static_cast<cudaStream_t>(stream),
                               &cluster, grid.cluster > 1 ? 1u : 0u});
}

// How many clusters of a launch an idle device runs at a time.
template <class... Params>
int resident_clusters(void (*kernel)(Params...), const Grid& grid, int multiprocessors) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int resident = 0;
  const auto query = [&](const cudaLaunchConfig_t& config) {
    if (grid.cluster > 1) return cudaOccupancyMaxActiveClusters(&resident, function, &config);
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, grid.threads,
                                                         grid.shared_bytes);
  };
  check(error_of(with_config(function, grid, nullptr, query)), "occupancy", grid);
  return std::max(1, grid.cluster > 1 ? resident : resident * multiprocessors);
}

// Launches a kernel. Returns null, or the error message.
template <class... Params, class... Args>
const char* enqueue(const char*, void (*kernel)(Params...), const Grid& grid, void* stream, Args... args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  std::tuple<Params...> values{static_cast<Params>(args)...};
  return error_of(with_config(function, grid, stream, [&](const cudaLaunchConfig_t& config) {
    return cudaLaunchKernelExC(&config, function, addresses_of(values).data());
  }));
}

}  // namespace fsl::gpu
