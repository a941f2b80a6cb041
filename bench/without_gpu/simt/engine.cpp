// Scheduler of the GPU threads: start, wait, switch to the next ready thread, exit.
#include "engine.h"

#include <mutex>
#include <stdexcept>

namespace simt {
namespace {

void work();

FiberPool pool(work);

// The next thread to run; null when every remaining thread waits.
Thread* pick() {
  std::vector<Thread*>& ready = engine.ready;
  if (ready.empty()) return nullptr;
  if (engine.seed) std::swap(ready.back(), ready[random_below(ready.size())]);
  Thread* next = ready.back();
  ready.pop_back();
  return next;
}

// Make `thread` the running thread. The caller then jumps to its stack.
void become(Thread* thread, Fiber* fiber) {
  thread->fiber = fiber;
  engine.running = thread;
  engine.fiber = fiber;
  place = thread;
  tsan::switch_to(thread->tsan);
}

// Inlined: a jump between stacks makes the CPU mispredict every return up to the kernel.
__attribute__((always_inline)) inline void suspend() {
  Thread* next = pick();
  if (!next) fail("deadlock");
  Fiber* mine = engine.fiber;
  become(next, next->fiber ? next->fiber : pool.take());
  jump(*mine, *engine.fiber);
}

// A thread exits. It is an error if others wait for it at this meeting.
void exit_from(Meeting& meeting) {
  ++meeting.exited;
  if (meeting.arrived)
    fail("thread " + std::to_string(engine.running->thread) + " exits, and others wait for it");
}

void exit_thread() {
  Thread& me = *engine.running;
  Block& home = *me.home;
  if (!me.copies.empty()) fail("thread " + std::to_string(me.thread) + " exits before async_wait");
  me.exited = true;
  exit_from(*me.warp);
  exit_from(home.all);
  exit_from(engine.cluster);
  tsan::release(&engine.end);
  tsan::release(&home.end);
  if (!home.exited()) return;
  tsan::acquire(&home.end);
  home.shared.bury();
}

// Body of a fiber. Runs a thread, then the next one if it has not started. A thread that has started has a
// fiber: jump there.
void work() {
  for (;;) {
    try {
      engine.body(engine.context);
    } catch (...) {
      engine.thrown = std::current_exception();
    }
    if (engine.thrown) leave();
    exit_thread();
    Thread* next = pick();
    if (!next && engine.cluster.exited < engine.cluster.count) fail("deadlock");
    Fiber* mine = engine.fiber;
    if (tsan::runs()) {  // each thread keeps its stack until the cluster is torn down
      if (!next) leave();
      become(next, next->fiber ? next->fiber : pool.take());
    } else {
      engine.running->fiber = nullptr;
      if (next && !next->fiber) {
        become(next, mine);
        continue;
      }
      pool.give_back(mine);
      if (!next) leave();
      become(next, next->fiber);
    }
    jump(*mine, *engine.fiber, true);
  }
}

[[noreturn]] __attribute__((cold, noinline)) void diverge(const Meeting& meeting, Site site, int mask,
                                                          const char* but) {
  fail("thread " + std::to_string(engine.running->thread) + " comes to " + words(meeting, site, mask) + but);
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }

// Returns true for the last thread to arrive. That thread does not wait; it must wake the others.
bool arrive(Meeting& meeting, Site site, int mask = 0) {
  if (meeting.exited) diverge(meeting, site, mask, ", and others have exited");
  if (!meeting.arrived) {
    meeting.site = site;
    meeting.mask = mask;
  } else if (meeting.mask != mask || !same(meeting.site, site)) {
    diverge(meeting, site, mask, ", and others wait elsewhere");
  }
  return ++meeting.arrived == meeting.count;
}

__attribute__((always_inline)) inline void wait(Meeting& meeting) {
  Thread* me = engine.running;
  me->waits = &meeting;
  suspend();
  me->waits = nullptr;
}

void wake(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.turn;
  for (Thread* thread = meeting.first + meeting.count; thread-- != meeting.first;)
    if (thread != engine.running) engine.ready.push_back(thread);
}

void synchronize(Meeting& meeting, Site site) {
  const bool last = arrive(meeting, site);
  char* order = &meeting.order[meeting.turn % 2];
  tsan::release(order);
  if (last) wake(meeting);
  else wait(meeting);
  tsan::acquire(order);
}

void meet(Meeting& meeting, const char* what, Thread* first, int count) {
  meeting = Meeting();
  meeting.what = what;
  meeting.first = first;
  meeting.count = count;
}

void set_up_cluster(int64_t first_block) {
  Engine& e = engine;
  const Grid& grid = e.grid;
  const int count = grid.threads * grid.cluster;
  e.threads.resize(count);
  e.blocks.resize(grid.cluster);
  for (auto& offered : e.offered) offered.resize(count);
  meet(e.cluster, "cluster_barrier", e.threads.data(), count);
  for (int rank = 0; rank < grid.cluster; ++rank) {
    Block& block = e.blocks[rank];
    Thread* const first = &e.threads[rank * grid.threads];
    meet(block.all, "barrier", first, grid.threads);
    block.warps.resize(grid.threads / grid.warp);
    for (size_t i = 0; i < block.warps.size(); ++i)
      meet(block.warps[i], "shuffle_xor", first + i * grid.warp, grid.warp);
    block.shared.start(grid.shared_bytes, grid.warp == 64 ? 64 << 10 : 227 << 10);
    for (int i = 0; i < grid.threads; ++i) {
      first[i] = Thread();
      static_cast<Place&>(first[i]) = {
          i,    grid.threads, static_cast<uint32_t>(first_block + rank), static_cast<uint32_t>(grid.blocks),
          rank, grid.cluster};
      first[i].index = rank * grid.threads + i;
      first[i].home = &block;
      first[i].warp = &block.warps[i / grid.warp];
      first[i].tsan = tsan::create();
    }
  }
  e.ready.clear();
  for (int i = count; i-- > 0;) e.ready.push_back(&e.threads[i]);
}

// ThreadSanitizer reuses the number of a destroyed thread and confuses the two. So threads are destroyed when
// the launch ends, or when more than this many are kept: it has a limited count of numbers.
constexpr size_t kRemembered = 4096;
void forget() {
  for (void* thread : engine.past) __tsan_destroy_fiber(thread);
  engine.past.clear();
}

void tear_down_cluster() {
  for (Thread& thread : engine.threads) {
    if (thread.fiber) pool.reclaim(thread.fiber);
    if (!thread.exited) {
      tsan::switch_to(thread.tsan);
      tsan::release(&engine.end);
      tsan::switch_to(engine.caller_tsan);
    }
    if (thread.tsan) engine.past.push_back(thread.tsan);
  }
  if (engine.past.size() > kRemembered) forget();
  for (Block& block : engine.blocks) block.shared.release();
  // Freeing the memory makes ThreadSanitizer forget who met there, so it does not order the next blocks after
  // these.
  if (tsan::runs()) std::vector<Block>().swap(engine.blocks);
}

void run_cluster(int64_t first_block) {
  Thread* first;
  {
    tsan::Unseen unseen;
    set_up_cluster(first_block);
    first = pick();
  }
  Fiber* fiber = pool.take();
  become(first, fiber);
  jump(engine.caller, *fiber);
  engine.running = nullptr;
  place = nullptr;
  tsan::Unseen unseen;
  tear_down_cluster();
}

bool refused(const Grid& grid) {
  const int most_shared = grid.warp == 64 ? 64 << 10 : 227 << 10;
  const int most_cluster = grid.warp == 64 ? 1 : 8;  // AMD has no clusters
  return grid.blocks < 1 || grid.blocks > 0x7fffffff || grid.threads < 1 || grid.threads > 1024 ||
         grid.threads % grid.warp || grid.shared_bytes < 0 || grid.shared_bytes > most_shared ||
         grid.cluster < 1 || grid.cluster > most_cluster || grid.blocks % grid.cluster;
}

}  // namespace

Engine engine;
const Place* place = nullptr;

uint32_t random_below(size_t end) {
  uint64_t& x = engine.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return ((x * 0x2545f4914f6cdd1dull) >> 32) * end >> 32;
}

void leave() {
  tsan::release(&engine.end);
  tsan::switch_to(engine.caller_tsan);
  jump(*engine.fiber, engine.caller, true);
  __builtin_unreachable();
}

void barrier(Site site) { synchronize(engine.running->home->all, site); }
void cluster_barrier(Site site) { synchronize(engine.cluster, site); }

uint32_t exchange(uint32_t value, int mask, Site site) {
  Meeting& warp = *engine.running->warp;
  if (mask < 0 || mask >= warp.count) diverge(warp, site, mask, ", outside of a warp");
  // Two buffers in turn: a lane that is early for the next exchange must not overwrite values that slower
  // lanes still have to read.
  uint32_t* offered = engine.offered[warp.turn % 2].data();
  const int me = engine.running->index;
  offered[me] = value;
  if (arrive(warp, site, mask)) wake(warp);
  else wait(warp);
  return offered[me ^ mask];
}

void set_seed(uint64_t seed) { engine.seed = seed; }

int launch(const Grid& grid, void (*body)(const void*), const void* context) {
  static std::mutex one_at_a_time;
  static thread_local bool busy = false;
  if (busy) throw std::logic_error(std::string(grid.kernel) + ": launched from inside a kernel");
  if (refused(grid)) return 1;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  struct Busy {
    Busy() { busy = true; }
    ~Busy() { busy = false; }
  } const until_return;
  engine.grid = grid;
  engine.body = body;
  engine.context = context;
  engine.random = engine.seed * 0x9e3779b97f4a7c15ull + 1;
  engine.caller_tsan = tsan::current();
  engine.failure.clear();
  engine.thrown = nullptr;
  // With a seed, start at a random block: blocks may run in any order.
  const int64_t clusters = grid.blocks / grid.cluster, start = engine.seed ? random_below(clusters) : 0;
  for (int64_t i = 0; i < clusters && engine.failure.empty() && !engine.thrown; ++i)
    run_cluster((start + i) % clusters * grid.cluster);
  forget();
  tsan::acquire(&engine.end);
  if (engine.thrown) std::rethrow_exception(engine.thrown);
  if (!engine.failure.empty()) throw std::runtime_error(engine.failure);
  return 0;
}

}  // namespace simt
