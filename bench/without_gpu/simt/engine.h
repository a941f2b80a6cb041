// What runs: the threads of one cluster at a time, all on the CPU thread that called launch().
#pragma once

#include <exception>
#include <string>
#include <vector>

#include "fibers.h"
#include "simt.h"

namespace simt {

struct Thread;
struct Block;

// Threads that wait for each other: a warp, a block or a cluster.
struct Meeting {
  const char* what = nullptr;
  Thread* first = nullptr;  // its threads lie in a row
  int count = 0;
  int arrived = 0, exited = 0;
  Site site = {};  // of those who wait
  int mask = 0;
  unsigned turn = 0;  // how often they have met
  // ThreadSanitizer's, one after the other: who is early for the next turn must not be ordered before who is
  // late to leave this one.
  char order[2] = {};
};

struct Thread : Place {
  int index = 0;  // in the cluster; a warp begins at a multiple of its lanes
  Block* home = nullptr;
  Meeting* warp = nullptr;
  Fiber* fiber = nullptr;  // null before it has started and after it has exited
  Meeting* waits = nullptr;
  bool exited = false;
  std::vector<Copy> copies = {};  // under way
  void* tsan = nullptr;
};

// A block's static arrays, made when the first thread asks, and its dynamic array.
class SharedMemory {
 public:
  static constexpr size_t kStatic = 48 << 10;

  void start(size_t dynamic_bytes, size_t limit);
  void* get(const Variable* variable, size_t bytes);
  void* dynamic() const;
  // The place in this memory that corresponds to `at` in `other`; null if that is not in there.
  void* corresponding(const SharedMemory& other, void* at);
  void bury();  // its block has exited
  void release();

 private:
  struct Array {
    const Variable* variable;  // null: the dynamic one
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
  char end = 0;  // ThreadSanitizer's: its threads have exited
  bool exited() const { return all.exited == all.count; }
};

struct Engine {
  Grid grid;
  void (*body)(const void*);
  const void* context;

  std::vector<Thread> threads;  // of the cluster
  std::vector<Block> blocks;
  Meeting cluster;
  std::vector<uint32_t> offered[2];  // by shuffle_xor
  std::vector<Thread*> ready;        // the next to run is at the back
  uint64_t seed = 0, random = 0;

  Thread* running = nullptr;
  Fiber* fiber = nullptr;  // the one it runs on
  Fiber caller;            // of launch()
  void* caller_tsan = nullptr;
  char end = 0;             // ThreadSanitizer's: all threads have exited
  std::vector<void*> past;  // threads of blocks that have exited

  std::string failure;
  std::exception_ptr thrown;
};
extern Engine engine;

// Ends the launch with an error that says `why`, and where all threads are.
[[noreturn]] void fail(const std::string& why);
std::string words(Site site);
std::string words(const Variable& variable);
std::string words(const Meeting& meeting, Site site, int mask);

// Back to launch(), for good.
[[noreturn]] void leave();

}  // namespace simt
