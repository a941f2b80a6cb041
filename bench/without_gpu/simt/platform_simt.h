// The SIMT shim's platform. Replaces platform_cuda.h (FSL_SIMT=32, the lanes of a warp) or platform_hip.h
// (64).
#pragma once

#include "simt.h"

#define FSL_DEVICE inline
#define FSL_KERNEL(threads, waves) void
#define FSL_SHARED(type, name, count)                                      \
  type* const name = simt::shared<type>(count, [] {                        \
    static constexpr simt::Variable variable{#name, {__FILE__, __LINE__}}; \
    return &variable;                                                      \
  }())
#define FSL_UNROLL
#define FSL_UNROLL_BY(count)

#include "round_bf16.h"

namespace fsl::gpu {

constexpr int kWarp = FSL_SIMT;
constexpr bool kUnalignedAccess = FSL_SIMT == 64;

FSL_DEVICE int thread_id() { return simt::thread_id(); }
FSL_DEVICE int block_threads() { return simt::block_threads(); }
FSL_DEVICE uint32_t block_id() { return simt::block_id(); }
FSL_DEVICE void barrier(simt::Site site = simt::here()) { simt::barrier(site); }
FSL_DEVICE void scheduling_barrier() {}
FSL_DEVICE void optimisation_barrier(uint32_t&) {}
FSL_DEVICE void optimisation_barrier(float&) {}
FSL_DEVICE void optimisation_barrier_uniform(int&) {}
FSL_DEVICE float broadcast_first_lane(float x) { return x; }
template <class T>
FSL_DEVICE T shuffle_xor(T value, int mask, simt::Site site = simt::here()) {
  return simt::shuffle_xor(value, mask, site);
}
FSL_DEVICE uint32_t ballot(bool value, simt::Site site = simt::here()) {
  uint32_t all = value ? 1u << thread_id() % kWarp : 0;
  for (int mask = kWarp / 2; mask; mask /= 2) all |= simt::shuffle_xor(all, mask, site);
  return all;
}
FSL_DEVICE uint32_t count_bits(uint32_t x) { return __builtin_popcount(x); }
FSL_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FSL_DEVICE float max(float a, float b) { return __builtin_fmaxf(a, b); }  // ignores a NaN, like the GPU
FSL_DEVICE float min(float a, float b) { return __builtin_fminf(a, b); }
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
  return FSL_SIMT == 64 ? pack_bf16_bits(bits(low), bits(high)) : simt::pack_bf16(low, high);
}

FSL_DEVICE Chunk load_chunk(const char* at) { return *reinterpret_cast<const Chunk*>(at); }
FSL_DEVICE Chunk load_chunk_unaligned(const char* at) {
  Chunk chunk;
  __builtin_memcpy(&chunk, at, sizeof chunk);
  return chunk;
}
FSL_DEVICE Chunk load_chunk_volatile(const char* at) { return load_chunk(at); }
template <class T>
FSL_DEVICE void store(char* at, const T& value) {
  *reinterpret_cast<T*>(at) = value;
}
FSL_DEVICE void store_chunk_unaligned(char* at, const Chunk& chunk) {
  __builtin_memcpy(at, &chunk, sizeof chunk);
}
FSL_DEVICE char* dynamic_shared() { return static_cast<char*>(simt::dynamic_shared()); }
FSL_DEVICE void async_copy(char* shared, const char* global) { simt::async_copy(shared, global); }
FSL_DEVICE void async_wait() { simt::async_wait(); }
FSL_DEVICE void cluster_barrier(simt::Site site = simt::here()) { simt::cluster_barrier(site); }
FSL_DEVICE float cluster_read(float* mine, int rank, simt::Site site = simt::here()) {
  return *simt::cluster_map(mine, rank, site);
}

// --- runtime ---------------------------------------------------------------------------------------------

inline int most_shared_bytes() { return FSL_SIMT == 64 ? 64 << 10 : 227 << 10; }

// Few, so that clusters take several rows.
template <class... Params>
int resident_clusters(void (*)(Params...), const Grid&, int) {
  return 2;
}

template <class... Params, class... Args>
const char* enqueue(const char* name, void (*kernel)(Params...), const Grid& grid, void*, Args... args) {
  const bool refused = simt::launch(name, grid.blocks, grid.threads, grid.shared_bytes, grid.cluster,
                                    [=] { kernel(static_cast<Params>(args)...); });
  return refused ? "refused by the SIMT shim" : nullptr;
}

}  // namespace fsl::gpu
