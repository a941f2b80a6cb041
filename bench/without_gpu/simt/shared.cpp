// Shared memory. Each array is a separate allocation, so that AddressSanitizer knows its bounds.
#include "engine.h"

#include <cstdlib>

namespace simt {

void SharedMemory::start(size_t dynamic_bytes, size_t limit) {
  static_bytes_ = dynamic_bytes_ = 0;
  limit_ = limit;
  if (dynamic_bytes) add(nullptr, dynamic_bytes);
  dynamic_bytes_ = dynamic_bytes;
}

void* SharedMemory::add(const Variable* variable, size_t bytes) {
  const tsan::Unseen unseen;
  char* memory = static_cast<char*>(std::malloc(bytes));
  std::memset(memory, 0xff, bytes);
  arrays_.push_back({variable, memory, bytes});
  return memory;
}

void* SharedMemory::dynamic() const { return dynamic_bytes_ ? arrays_[0].memory : nullptr; }

void* SharedMemory::get(const Variable* variable, size_t bytes) {
  for (const Array& array : arrays_)
    if (array.variable == variable) {
      if (array.bytes != bytes) fail("shared memory of two sizes: " + words(*variable));
      return array.memory;
    }
  static_bytes_ += bytes;
  if (static_bytes_ > kStatic || static_bytes_ + dynamic_bytes_ > limit_)
    fail("too much shared memory: " + std::to_string(static_bytes_) + " bytes with " + words(*variable) +
         ", and " + std::to_string(dynamic_bytes_) + " dynamic");
  return add(variable, bytes);
}

void* SharedMemory::corresponding(const SharedMemory& other, void* at) {
  for (const Array& array : other.arrays_) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(array.memory);
    if (offset >= array.bytes) continue;
    char* mine = static_cast<char*>(array.variable ? get(array.variable, array.bytes) : dynamic());
    return mine + offset;
  }
  return nullptr;
}

// ThreadSanitizer sees this write. It reports a race with any later or unordered access by another block.
void SharedMemory::bury() {
  for (const Array& array : arrays_) {
    std::memset(array.memory, 0xff, array.bytes);
    hide(array.memory, array.bytes);
  }
}

void SharedMemory::release() {
  for (const Array& array : arrays_) {
    unhide(array.memory, array.bytes);
    std::free(array.memory);
  }
  arrays_.clear();
}

void* shared(const Variable* variable, size_t bytes) {
  return engine.running->home->shared.get(variable, bytes);
}

void* dynamic_shared() { return engine.running->home->shared.dynamic(); }

void async_copy(void* shared, const void* global, Site site) {
  const tsan::Unseen unseen;
  SharedMemory& mine = engine.running->home->shared;
  if (!mine.corresponding(mine, shared))
    fail("async_copy: no shared memory of this block, at " + words(site));
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("async_copy: an address that is no multiple of 16, at " + words(site));
  const Copy copy{static_cast<Sixteen*>(shared), static_cast<const Sixteen*>(global)};
  if (engine.seed && random_below(2)) *copy.to = *copy.from;
  else engine.running->copies.push_back(copy);
}

bool next_copy(Copy* copy) {
  const tsan::Unseen unseen;
  std::vector<Copy>& copies = engine.running->copies;
  if (copies.empty()) return false;
  *copy = copies.back();
  copies.pop_back();
  return true;
}

void* cluster_map(void* local, int rank, Site site) {
  SharedMemory& mine = engine.running->home->shared;
  if (rank < 0 || rank >= engine.grid.cluster)
    fail("cluster_map: no block " + std::to_string(rank) + " in the cluster, at " + words(site));
  Block& target = engine.blocks[rank];
  if (target.exited())
    fail("cluster_map: block " + std::to_string(rank) + " of the cluster has exited, at " + words(site));
  void* mapped = target.shared.corresponding(mine, local);
  if (!mapped) fail("cluster_map: no shared memory of this block, at " + words(site));
  return mapped;
}

}  // namespace simt
