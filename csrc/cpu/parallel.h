// parallel_for runs fn(item) for every item of [0, items) on at most `threads` threads, in any order.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fsl {

// GOMP_parallel of the OpenMP runtime that torch has already loaded, or null. The runtimes of GNU, LLVM and
// Intel all export it. Using torch's threads matters: they spin for milliseconds after each torch operator,
// and threads of our own would compete with them for the cores. Without OpenMP, each call starts
// std::threads.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel loaded_openmp();

template <class Fn>
void parallel_for(int64_t items, int threads, const Fn& fn) {
  struct WorkQueue {
    const Fn& fn;
    int64_t items;
    std::atomic<int64_t> next{0};
    void drain() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) fn(i);
    }
  } queue{fn, items};
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1) return queue.drain();
  if (GompParallel gomp = loaded_openmp()) {
    gomp([](void* q) { static_cast<WorkQueue*>(q)->drain(); }, &queue, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back([&queue] { queue.drain(); });
  queue.drain();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace fsl
