// Stacks for GPU threads and jumps between them, visible to AddressSanitizer and ThreadSanitizer.
#pragma once

#include <boost/context/detail/fcontext.hpp>

#include <cstddef>
#include <vector>

// The sanitizers' runtime functions. They are weak, so null in a program without a sanitizer: these files are
// compiled once for all programs and are never instrumented.
#define FSL_WEAK __attribute__((weak))
extern "C" {
FSL_WEAK void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
FSL_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old,
                                              size_t* size_old);
FSL_WEAK void __asan_poison_memory_region(const volatile void* at, size_t size);
FSL_WEAK void __asan_unpoison_memory_region(const volatile void* at, size_t size);
FSL_WEAK void* __tsan_get_current_fiber();
FSL_WEAK void* __tsan_create_fiber(unsigned flags);
FSL_WEAK void __tsan_destroy_fiber(void* fiber);
FSL_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
FSL_WEAK void __tsan_acquire(void* at);
FSL_WEAK void __tsan_release(void* at);
FSL_WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
FSL_WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
FSL_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
FSL_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace simt {

struct Fiber {
  void* context = nullptr;  // where it resumes, while suspended
  char* low = nullptr;      // lowest stack byte, above the guard page; null: the stack of launch()'s caller
  size_t size = 0;
  void* fake_stack = nullptr;  // saved by AddressSanitizer
};

class FiberPool {
 public:
  // A fiber runs `work` when it is first jumped to. `work` must not return.
  explicit FiberPool(void (*work)()) : work_(work) {}
  FiberPool(const FiberPool&) = delete;
  ~FiberPool();
  Fiber* take();
  void give_back(Fiber* fiber) { idle_.push_back(fiber); }
  void reclaim(Fiber* fiber);  // for a fiber suspended in the middle of a thread

 private:
  void (*work_)();
  std::vector<Fiber*> idle_, all_;
};

// Must run first after a jump: saves where the previous fiber resumes.
inline void land(const boost::context::detail::transfer_t& from, void* fake_stack) {
  Fiber& before = *static_cast<Fiber*>(from.data);
  before.context = from.fctx;
  if (!__sanitizer_finish_switch_fiber) return;
  const void* low;
  __sanitizer_finish_switch_fiber(fake_stack, &low, &before.size);
  before.low = static_cast<char*>(const_cast<void*>(low));
}

// `for_good`: nothing will jump back to `from`.
inline void jump(Fiber& from, Fiber& to, bool for_good = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.low, to.size);
  land(boost::context::detail::jump_fcontext(to.context, &from), from.fake_stack);
}

// AddressSanitizer reports every access to hidden memory.
inline void hide(void* memory, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(memory, bytes);
}
inline void unhide(void* memory, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, bytes);
}

// ThreadSanitizer's handles for GPU threads. Only release() and acquire() order two threads.
namespace tsan {
constexpr unsigned kWithoutOrder = 1;  // __tsan_switch_to_fiber_no_sync

inline bool runs() { return __tsan_create_fiber; }
inline void* create() { return runs() ? __tsan_create_fiber(0) : nullptr; }
inline void* current() { return runs() ? __tsan_get_current_fiber() : nullptr; }
inline void switch_to(void* fiber) {
  if (fiber) __tsan_switch_to_fiber(fiber, kWithoutOrder);
}
inline void release(void* at) {
  if (runs()) __tsan_release(at);
}
inline void acquire(void* at) {
  if (runs()) __tsan_acquire(at);
}

// In its scope ThreadSanitizer ignores accesses: the shim's allocations belong to no GPU thread.
struct Unseen {
  Unseen() {
    if (!runs()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (!runs()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
}  // namespace tsan

}  // namespace simt
