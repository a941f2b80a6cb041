// The platform under the kernels: lanes, barriers, shared memory, a few instructions, launches. Only
// platform_cuda.h and platform_hip.h differ between CUDA and HIP; both define the same macros and functions.
// A build may name another header instead (bench/without_gpu/simt does).
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

namespace fsl::gpu {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;

struct alignas(16) Chunk {
  uint32_t word[4];
};

struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  int shared_bytes = 0;  // dynamic
  int cluster = 1;       // blocks that see each other's shared memory
};

// Throws if the device refused a launch, because the output would then hold garbage. `error` is null if the
// launch was accepted.
inline void check(const char* error, const char* kernel, const Grid& grid) {
  if (!error) return;
  throw std::runtime_error(std::string(kernel) + ": " + error + " (grid of " + std::to_string(grid.blocks) +
                           " blocks of " + std::to_string(grid.threads) + " threads, clusters of " +
                           std::to_string(grid.cluster) + ", " + std::to_string(grid.shared_bytes) +
                           " bytes of shared memory)");
}

// The addresses of a kernel's arguments, as the CUDA and HIP runtimes take them.
template <class... Params>
std::array<void*, sizeof...(Params)> addresses_of(std::tuple<Params...>& values) {
  return std::apply([](auto&... value) { return std::array<void*, sizeof...(Params)>{&value...}; }, values);
}

}  // namespace fsl::gpu

#if defined(FSL_PLATFORM_HEADER)
#include FSL_PLATFORM_HEADER
#elif defined(__HIP__)
#include "platform_hip.h"
#else
#include "platform_cuda.h"
#endif

namespace fsl::gpu {

FSL_DEVICE int lane_id() { return thread_id() % kWarp; }
FSL_DEVICE int warp_id() { return thread_id() / kWarp; }
FSL_DEVICE int block_warps() { return block_threads() / kWarp; }

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, void* stream, Args... args) {
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7fffffff)
    throw std::invalid_argument(std::string(name) + ": expected at most 2^31 - 1 blocks, got " +
                                std::to_string(grid.blocks));
  check(enqueue(name, kernel, grid, stream, args...), name, grid);
}

}  // namespace fsl::gpu
