// Memory that is fresh from the system has no pages yet: each is given, and cleared, when it is first
// written. For a new gradient that takes longer than its arithmetic. On Linux they can be had in one go, in
// huge pages where there are some, and by all threads together.
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
// Less may lie in memory that the C library keeps, among what others have allocated.
constexpr int64_t kClaimed = int64_t{8} << 20;
constexpr uintptr_t kClaim = uintptr_t{8} << 20;  // that one thread asks for at a time: whole huge pages
#ifdef MADV_POPULATE_WRITE
constexpr int kPopulate = MADV_POPULATE_WRITE;
#else
constexpr int kPopulate = 23;  // Linux 5.14 and later; the headers may be older
#endif

// Give [begin, begin + bytes), all of which the caller is about to write, its pages. Nothing else changes,
// and where the system does not know how, nothing does.
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
