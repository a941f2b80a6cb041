// State of a launch. The threads of one cluster run at a time, all on the CPU thread that called launch().
#pragma once

#include <exception>
#include <string>
#include <vector>

#include "fibers.h"
#include "simt.h"

namespace simt {

struct Thread;
struct Block;

// A group of threads that wait for each other: a warp, a block or a cluster.
struct Meeting {
  const char* what = nullptr;
  Thread* first = nullptr;  // the threads are contiguous
  int count = 0;
  int arrived = 0, exited = 0;
  Site site = {};  // where the waiting threads are
  int mask = 0;
  unsigned turn = 0;  // completed meetings
  // Addresses for ThreadSanitizer, used in turn. With one address, a thread that is early for the next
  // meeting would be ordered before a thread that is late to leave this one.
  char order[2] = {};
};

struct Thread : Place {
  int index = 0;  // in the cluster; the first lane of a warp is at a multiple of the warp's size
  Block* home = nullptr;
  Meeting* warp = nullptr;
  Fiber* fiber = nullptr;  // null before the thread starts and after it exits
  Meeting* waits = nullptr;
  bool exited = false;
  std::vector<Copy> copies = {};  // in flight
  void* tsan = nullptr;
};

// A block's dynamic array and its static arrays, each allocated when a thread first asks for it.
class SharedMemory {
 public:
  static constexpr size_t kStatic = 48 << 10;

  void start(size_t dynamic_bytes, size_t limit);
  void* get(const Variable* variable, size_t bytes);
  void* dynamic() const;
  // Translates `at`, an address in `other`, to this memory; null if it is not in `other`.
  void* corresponding(const SharedMemory& other, void* at);
  void bury();  // poisons the memory when the block has exited
  void release();

 private:
  struct Array {
    const Variable* variable;  // null: the dynamic array
    char* memory;
    size_t bytes;
  };
  void* add(const Variable* variable, size_t bytes);

  std::vector<Array> arrays_;
  size_t static_bytes_ = 0, dynamic_bytes_ = 0, limit_ = 0;
};

struct Block {
  Meeting all;
  std::vector<Meeting> warps;
  SharedMemory shared;
  char end = 0;  // ThreadSanitizer orders the exits of the block's threads by this address
  bool exited() const { return all.exited == all.count; }
};

struct Engine {
  Grid grid;
  void (*body)(const void*);
  const void* context;

  std::vector<Thread> threads;  // of the cluster
  std::vector<Block> blocks;
  Meeting cluster;
  std::vector<uint32_t> offered[2];  // by shuffle_xor, two turns
  std::vector<Thread*> ready;        // the next thread to run is the last
  uint64_t seed = 0, random = 0;

  Thread* running = nullptr;
  Fiber* fiber = nullptr;  // of the running thread
  Fiber caller;            // of launch()
  void* caller_tsan = nullptr;
  char end = 0;             // ThreadSanitizer orders the exits of all threads by this address
  std::vector<void*> past;  // ThreadSanitizer's handles of threads that have exited

  std::string failure;
  std::exception_ptr thrown;
};
extern Engine engine;

// Random number below `end`, by xorshift64*.
uint32_t random_below(size_t end);

// Ends the launch with an error: `why`, and where every thread is.
[[noreturn]] void fail(const std::string& why);
std::string words(Site site);
std::string words(const Variable& variable);
std::string words(const Meeting& meeting, Site site, int mask);

// Returns to launch(). The fiber never resumes.
[[noreturn]] void leave();

}  // namespace simt
