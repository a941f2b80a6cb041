// Stacks to run GPU threads on, and jumps between them that AddressSanitizer and ThreadSanitizer can follow.
#pragma once

#include <boost/context/detail/fcontext.hpp>

#include <cstddef>
#include <vector>

// The sanitizers' runtimes, null in a program without: these files are compiled the same for every program,
// and never instrumented themselves.
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
  void* context = nullptr;  // where it goes on, while it does not run
  char* low = nullptr;      // of its stack, above the guard page; null: the stack of the caller of launch()
  size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

class FiberPool {
 public:
  // `work` is run on a fiber when it is first jumped to, and never returns.
  explicit FiberPool(void (*work)()) : work_(work) {}
  FiberPool(const FiberPool&) = delete;
  ~FiberPool();
  Fiber* take();
  void give_back(Fiber* fiber) { idle_.push_back(fiber); }
  void reclaim(Fiber* fiber);  // one that was left in the middle of something

 private:
  void (*work_)();
  std::vector<Fiber*> idle_, all_;
};

// The first thing after a jump: note where the one before goes on.
inline void land(const boost::context::detail::transfer_t& from, void* fake_stack) {
  Fiber& before = *static_cast<Fiber*>(from.data);
  before.context = from.fctx;
  if (!__sanitizer_finish_switch_fiber) return;
  const void* low;
  __sanitizer_finish_switch_fiber(fake_stack, &low, &before.size);
  before.low = static_cast<char*>(const_cast<void*>(low));
}

// `for_good`: nobody will jump back to `from`.
inline void jump(Fiber& from, Fiber& to, bool for_good = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.low, to.size);
  land(boost::context::detail::jump_fcontext(to.context, &from), from.fake_stack);
}

// AddressSanitizer: to touch it is an error from now on.
inline void hide(void* memory, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(memory, bytes);
}
inline void unhide(void* memory, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, bytes);
}

// A thread of control as ThreadSanitizer knows it. Nothing orders two of them but release() and acquire().
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

// What the shim allocates and clears meanwhile is no access of any thread's.
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
