// The simulated GPU behind platform_simt.h. Every GPU thread is a fiber on one CPU thread. Behaviour that a
// device leaves undefined is an error: launch() throws std::runtime_error with the block, the threads and the
// lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace simt {

// Source line where threads wait for each other. Waiting at different lines is an error: divergence.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// A __shared__ array, identified by its address: each instantiation of a template has one.
struct Variable {
  const char* name;
  Site site;
};

struct Place {
  int thread, threads;
  uint32_t block, blocks;
  int rank, ranks;  // of the block, within its cluster
};
extern const Place* place;  // of the running thread

inline int thread_id() { return place->thread; }
inline int block_threads() { return place->threads; }
inline uint32_t block_id() { return place->block; }
inline int cluster_rank() { return place->rank; }
inline int cluster_size() { return place->ranks; }

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// --- synchronisation -------------------------------------------------------------------------------------

// Every thread of the block, or of the cluster, must reach this line; none may have exited.
void barrier(Site site = here());
void cluster_barrier(Site site = here());

// Every lane of the warp must reach this line with the same mask. Orders no memory accesses.
uint32_t exchange(uint32_t value, int mask, Site site);
template <class T>
T shuffle_xor(T value, int mask, Site site = here()) {
  return bit_cast<T>(exchange(bit_cast<uint32_t>(value), mask, site));
}

// --- shared memory ---------------------------------------------------------------------------------------
// Holds bytes of 0xff (NaN) when a block starts and after it has exited.

void* shared(const Variable* variable, size_t bytes);
template <class T>
T* shared(size_t count, const Variable* variable) {
  static_assert(alignof(T) <= 16);
  return static_cast<T*>(shared(variable, count * sizeof(T)));
}

// The launch's shared_bytes, aligned to 16; null if there are none.
void* dynamic_shared();

// An asynchronous copy of 16 aligned bytes into shared memory of this block. async_wait() makes the copy: a
// thread that does not wait reads 0xff. With a seed half of the copies are made at once. A thread may not
// exit with a copy in flight.
struct alignas(16) Sixteen {
  unsigned char bytes[16];
};
struct Copy {
  Sixteen* to;
  const Sixteen* from;
};
void async_copy(void* shared, const void* global, Site site = here());
bool next_copy(Copy* copy);
// Inlined into the kernel, so that sanitizers see its accesses.
inline void async_wait() {
  for (Copy copy; next_copy(&copy);) *copy.to = *copy.from;
}

// The same variable in another block of the cluster. An error if `local` is not in this block's shared
// memory, or if the other block has exited.
void* cluster_map(void* local, int rank, Site site);
template <class T>
T* cluster_map(T* local, int rank, Site site = here()) {
  return static_cast<T*>(cluster_map(static_cast<void*>(local), rank, site));
}

// --- launches --------------------------------------------------------------------------------------------

// 0: threads run in the order of their ids. Otherwise the seed picks the next thread whenever one waits or
// exits.
void set_seed(uint64_t seed);

struct Grid {
  const char* kernel;
  int64_t blocks;
  int threads, shared_bytes, cluster, warp;
};
int launch(const Grid& grid, void (*body)(const void*), const void* context);

// Nonzero if a device would refuse the launch.
template <class Body>
int launch(const char* kernel, int64_t blocks, int threads, int shared_bytes, int cluster, const Body& body) {
  return launch(
      Grid{kernel, blocks, threads, shared_bytes, cluster, FSL_SIMT},
      [](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
}

// --- 16-bit floats ---------------------------------------------------------------------------------------

inline float widen_half(uint32_t half) { return bit_cast<_Float16>(static_cast<uint16_t>(half)); }

inline uint32_t to_half(float x) { return bit_cast<uint16_t>(static_cast<_Float16>(x)); }

// Rounds to nearest even. A NaN becomes a quiet NaN.
inline uint32_t to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return (x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline uint32_t pack_half(float low, float high) { return to_half(low) | to_half(high) << 16; }
inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

}  // namespace simt
