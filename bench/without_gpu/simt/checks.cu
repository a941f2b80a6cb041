// Kernels for test_simt.py: some follow the rules of a GPU, each of the others breaks one. The program
// `checks NAME [KIND [SEED]]` prints what a kernel computed, or the error of its launch.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "platform.h"

namespace fsl::gpu {
namespace {

constexpr int kThreads = 4 * kWarp;
constexpr int most_shared() { return (kWarp == 64 ? 64 : 227) << 10; }

// --- correct kernels -----------------------------------------------------------------------------------

FSL_DEVICE int warp_sum(int value) {
  for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// For each block, the sum of block_id + i over i < kThreads. Without `wait` the sum races.
FSL_KERNEL(1024, 1) sums(int* out, bool wait) {
  FSL_SHARED(int, scratch, kMaxWarps);
  const int own = warp_sum(static_cast<int>(block_id()) + thread_id());
  if (lane_id() == 0) scratch[warp_id()] = own;
  if (wait) barrier();
  int sum = 0;
  for (int warp = 0; warp < block_warps(); ++warp) sum += scratch[warp];
  out[block_id() * block_threads() + thread_id()] = sum;
}

// Copies each thread's id through shared memory. Kinds: 1 reads before the wait, 2 exits with a copy in
// flight, 3 copies from an address that is not a multiple of 16, 4 copies to global instead of shared memory.
FSL_KERNEL(1024, 1) copies(int* out, int kind) {
  int* const source = out + 4 * thread_id();
  *source = thread_id();
  char* const mine = dynamic_shared() + 16 * thread_id();
  async_copy(kind == 4 ? reinterpret_cast<char*>(source) : mine,
             reinterpret_cast<const char*>(source) + (kind == 3 ? 4 : 0));
  if (kind == 0) async_wait();
  const int got = *reinterpret_cast<int*>(mine);
  if (kind == 1) async_wait();
  if (kind != 2) *source = got;
}

// Each instantiation of a template gets a separate array, and every block gets fresh memory.
template <int kValue>
FSL_DEVICE int* array_of() {
  FSL_SHARED(int, array, 4);
  return array;
}
FSL_KERNEL(1024, 1) fresh(int* out) {
  if (thread_id()) return;
  out[3 * block_id()] = *array_of<1>();
  out[3 * block_id() + 1] = static_cast<int*>(simt::dynamic_shared())[kWarp - 1];
  *array_of<1>() = static_cast<int*>(simt::dynamic_shared())[kWarp - 1] = 1;
  out[3 * block_id() + 2] = array_of<1>() != array_of<2>() && array_of<1>() == array_of<1>();
}

// All threads return at once, except those of block 1.
FSL_KERNEL(1024, 1) blocks_leave(int* out) {
  if (block_id() != 1) return;
  barrier();
  if (warp_id() == 1) return;
  out[thread_id()] = warp_sum(1);
}

// Each block reads the id of its neighbour in the cluster. `kind` 0 is correct.
FSL_KERNEL(1024, 1) neighbours(int* out, int kind) {
  FSL_SHARED(int, id, 1);
  const int next = (simt::cluster_rank() + 1) % simt::cluster_size();
  int* dynamic = static_cast<int*>(simt::dynamic_shared()) + thread_id();
  static int stranger;
  if (thread_id() == 0) *id = static_cast<int>(block_id());
  *dynamic = 100 * static_cast<int>(block_id()) + thread_id();
  const int* early = simt::cluster_map(dynamic, next);
  if (kind != 1) simt::cluster_barrier();
  if (kind == 2) simt::cluster_map(&stranger, next);
  out += 2 * (block_id() * block_threads() + thread_id());
  out[0] = kind == 3 ? *early : *simt::cluster_map(id, next);
  out[1] = *early;
  if (kind == 5 && block_id() == 1) return;
  if (kind < 3) simt::cluster_barrier();  // without it a block exits while others read its memory
}

// --- incorrect kernels: `kind` selects the error -------------------------------------------------------

FSL_KERNEL(1024, 1) diverge(int* out, int kind) {
  const bool low = thread_id() < kWarp / 2;
  if (kind == 0) {  // two different barriers
    if (low) barrier();
    else barrier();
  } else if (kind == 1) {  // a barrier and a shuffle
    if (low) barrier();
    else out[thread_id()] = shuffle_xor(1, 1);
  } else if (kind == 2) {  // two different shuffles
    int one = 1;
    if (low) one = shuffle_xor(one, 1);
    else one = shuffle_xor(one, 1);
    out[thread_id()] = one;
  } else if (kind == 3) {  // a shuffle by half the warp
    if (low) out[thread_id()] = shuffle_xor(1, 1);
  } else if (kind == 4) {  // exits before a barrier
    if (low) return;
    barrier();
  } else if (kind == 5) {  // exits while others wait at a barrier
    if (low) barrier();
  } else if (kind == 6) {  // two different masks
    out[thread_id()] = shuffle_xor(1, low ? 1 : 2);
  } else if (kind == 7) {
    out[thread_id()] = shuffle_xor(1, kWarp);
  } else if (kind == 8) {
    FSL_SHARED(int, half_a_block, 12288);
    FSL_SHARED(int, too_much, 1);
    half_a_block[0] = too_much[0] = 1;
  } else if (kind == 9) {
    launch("inner", diverge, {1, kThreads}, nullptr, out, 0);
  } else {
    throw std::out_of_range("the kernel's own");
  }
}

// Writes a word outside of an array: kind 0 the output, 1 a static array, 2 the dynamic array.
FSL_KERNEL(1024, 1) out_of_bounds(int* global, int kind, int offset) {
  FSL_SHARED(int, array, 4);
  FSL_SHARED(int, neighbour, 4);
  if (thread_id()) return;
  array[0] = neighbour[0] = 0;
  int* at = kind == 0 ? global : kind == 1 ? array : static_cast<int*>(simt::dynamic_shared());
  at[offset] = 1;
}

FSL_KERNEL(1024, 1) misaligned(int* global) {
  if (thread_id() == 0) reinterpret_cast<Chunk*>(global + 1)->word[0] = 1;
}

// Every block writes the same word.
FSL_KERNEL(1024, 1) collide(int* out) {
  barrier();
  if (thread_id() == 0) *out = static_cast<int>(block_id());
  barrier();
}

// --- program -------------------------------------------------------------------------------------------

template <class... Params, class... Args>
std::vector<int> run(const char* name, void (*kernel)(int*, Params...), Grid grid, int size, Args... args) {
  std::vector<int> out(size, -7);
  launch(name, kernel, grid, nullptr, out.data(), args...);
  return out;
}

std::vector<int> packed() {
  std::vector<int> out;
  for (const float x : {1.0f, -2.5f, 65504.0f, 65520.0f, 1e-7f, 1.00390625f, 1.01171875f, 3.4e38f,
                        __builtin_huge_valf(), __builtin_nanf("")})
    for (const uint32_t word : {pack_half(x, 0.0f), pack_bf16(0.0f, x)})
      out.push_back(static_cast<int>(word));
  return out;
}

// How many 16-bit patterns survive fp16 -> fp32 -> fp16.
std::vector<int> halves() {
  int same = 0;
  for (uint32_t half = 0; half < 0x10000; ++half) same += pack_half(0.0f, widen_half(half)) == half << 16;
  return {same};
}

// A launch on a second CPU thread, after a failed launch on the first.
std::vector<int> again() {
  std::vector<int> out;
  try {
    run("diverge", diverge, {1, kThreads}, kThreads, 0);
  } catch (const std::runtime_error&) {
    std::thread([&] { out = run("sums", sums, {3, kThreads}, 3 * kThreads, true); }).join();
  }
  return out;
}

std::vector<int> refused(int kind) {
  const int wide = kWarp == 64 ? 2 : 16;  // twice the largest cluster
  const Grid grids[] = {
      {1, 1024 + kWarp}, {1, kWarp - 1},       {1, 0},          {1, kWarp, most_shared() + 1},
      {1, kWarp, -1},    {16, kWarp, 0, wide}, {3, kWarp, 0, 2}};
  return run("refused", blocks_leave, grids[kind], 0);
}

std::vector<int> run_by_name(const std::string& name, int kind) {
  const Grid one{1, kThreads}, with_dynamic{1, kThreads, 4 * kWarp}, pairs{6, kWarp, 4 * kWarp, 2};
  if (name == "sums") return run("sums", sums, {3, kThreads}, 3 * kThreads, true);
  if (name == "racing_sums") return run("racing_sums", sums, one, kThreads, false);
  if (name == "copies") return run("copies", copies, {1, kWarp, 16 * kWarp}, 4 * kWarp, kind);
  if (name == "fresh") return run("fresh", fresh, {3, kWarp, 4 * kWarp}, 9);
  if (name == "largest") return run("largest", blocks_leave, {2, 1024, most_shared()}, 1024);
  if (name == "blocks_leave") return run("blocks_leave", blocks_leave, {3, kThreads}, kThreads);
  if (name == "neighbours") return run("neighbours", neighbours, pairs, 12 * kWarp, kind);
  if (name == "diverge") return run("diverge", diverge, kind == 1 ? Grid{1, kWarp} : one, kThreads, kind);
  if (name == "global") return run("out_of_bounds", out_of_bounds, with_dynamic, 4, 0, kind);
  if (name == "static") return run("out_of_bounds", out_of_bounds, with_dynamic, 4, 1, kind);
  if (name == "dynamic") return run("out_of_bounds", out_of_bounds, with_dynamic, 4, 2, kind);
  if (name == "misaligned") return run("misaligned", misaligned, one, 8);
  if (name == "collide") return run("collide", collide, {2, kWarp}, 1);
  if (name == "packed") return packed();
  if (name == "halves") return halves();
  if (name == "again") return again();
  if (name == "refused") return refused(kind);
  throw std::invalid_argument("no kernel " + name);
}

}  // namespace
}  // namespace fsl::gpu

int main(int count, char** words) {
  const auto number = [&](int i) { return count > i ? std::atoi(words[i]) : 0; };
  try {
    simt::set_seed(number(3));
    for (const int value : fsl::gpu::run_by_name(words[1], number(2))) std::printf("%d ", value);
  } catch (const std::exception& error) {
    std::printf("error: %s", error.what());
  }
}
