// The system gives and clears each page of new memory when it is first written. For a new gradient these page
// faults take longer than the arithmetic. On Linux, claim_pages populates the pages beforehand: with all
// threads, in large pieces, and with huge pages if the system has them.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "parallel.h"

namespace fsl {

#if defined(__linux__)
// Smaller blocks are left alone: the C library may have placed them among other allocations.
constexpr int64_t kClaimed = int64_t{8} << 20;
constexpr uintptr_t kClaim = uintptr_t{8} << 20;  // bytes per madvise call: whole huge pages
#ifdef MADV_POPULATE_WRITE
constexpr int kPopulate = MADV_POPULATE_WRITE;
#else
constexpr int kPopulate = 23;  // Linux 5.14 and newer; the headers may be older than the kernel
#endif

// Populates the pages of [begin, begin + bytes), which the caller is about to write in full. The contents do
// not change. On a system without MADV_POPULATE_WRITE those calls fail without an effect.
inline void claim_pages(void* begin, int64_t bytes, int threads) {
  if (bytes < kClaimed) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  const uintptr_t whole = first / kClaim * kClaim;
  parallel_for(static_cast<int64_t>((end - whole + kClaim - 1) / kClaim), threads, [=](int64_t part) {
    const uintptr_t at = whole + static_cast<uintptr_t>(part) * kClaim;
    const uintptr_t from = std::max(at, first), to = std::min(at + kClaim, end);
    madvise(reinterpret_cast<void*>(from), to - from, kPopulate);
  });
}
#else
inline void claim_pages(void*, int64_t, int) {}
#endif

}  // namespace fsl
