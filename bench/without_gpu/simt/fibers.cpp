#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace simt {
namespace {

// Large, because a sanitizer writes its report on the stack of the thread at fault. Untouched pages cost
// nothing.
constexpr size_t kStack = (256 + 4) << 10;

// Stack tops start at different offsets within a page. At equal offsets they would compete for a few cache
// lines.
constexpr size_t kColors = 32, kColor = 128;

void (*entry)();

void* map(void* at, size_t size, int flags) {
  void* memory =
      mmap(at, size, PROT_READ | PROT_WRITE, flags | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

void start(boost::context::detail::transfer_t from) {
  land(from, nullptr);
  entry();
}

}  // namespace

FiberPool::~FiberPool() {
  const size_t guard = sysconf(_SC_PAGESIZE);
  for (Fiber* fiber : all_) {
    munmap(fiber->low - guard, fiber->size + guard);
    delete fiber;
  }
}

Fiber* FiberPool::take() {
  const tsan::Unseen unseen;
  entry = work_;
  if (idle_.empty()) {
    const size_t guard = sysconf(_SC_PAGESIZE);
    void* memory = map(nullptr, kStack, 0);
    if (mprotect(memory, guard, PROT_NONE)) throw std::bad_alloc();
    all_.push_back(new Fiber{nullptr, static_cast<char*>(memory) + guard, kStack - guard, nullptr});
    idle_.reserve(all_.size());
    idle_.push_back(all_.back());
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  // ThreadSanitizer would report a reused stack as a race between its old and new thread. Mapping it again
  // makes it new memory.
  if (tsan::runs()) map(fiber->low, fiber->size, MAP_FIXED);
  const size_t color = reinterpret_cast<uintptr_t>(fiber->low) / kStack % kColors * kColor;
  fiber->context =
      boost::context::detail::make_fcontext(fiber->low + fiber->size - color, fiber->size - color, start);
  return fiber;
}

void FiberPool::reclaim(Fiber* fiber) {
  unhide(fiber->low, fiber->size);  // its frames never return, so they never unpoison their redzones
  give_back(fiber);
}

}  // namespace simt
