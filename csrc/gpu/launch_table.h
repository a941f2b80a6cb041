// Launch policy as data: for a chip, a kernel and a width, how many threads take a row and in which units it
// is shared out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace fsl::gpu {

enum class Kernel { row_stats, row_grad, row_stats_grad };

// Threads, not warps: the 32 warps that fill an NVIDIA block would be 2048 threads on AMD, which no launch
// can have.
struct Line {
  int generation;
  Kernel kernel;
  int64_t columns;  // for V_local up to this
  int threads;
  int segment;  // columns; whole tiles of 32 logits a thread. Of row_stats_grad those that a block takes
  const char* why;
};

constexpr int64_t kAny = INT64_MAX;
constexpr int kWholeRow = 1 << 30;

// Registers are those of the plain kernel for bf16 (fp32), as nvcc 13 and clang 19 compile it; in flight is
// what the resident threads of a multiprocessor load at once. Bandwidth times 800 ns asks for 15 KiB (A100),
// 20 (H100), 42 (B200), 12 (MI250X die), 14 (MI300X), 24 (MI355X). Timed on a GPU were the lines of sm_90, on
// an H100; all others follow from counts. Lines serve all dtypes alike, or a bf16 loss would differ in its
// last bits from that of the same numbers in fp32.
constexpr Line kTable[] = {
    {80, Kernel::row_stats, 4096, 64, 4096, "two tiles at most, few columns idle"},
    {80, Kernel::row_stats, kAny, 128, 16384, "59 (64) registers: 1024 threads, 64 KiB in flight"},
    {80, Kernel::row_grad, 4096, 64, 4096, "two tiles at most, few columns idle"},
    {80, Kernel::row_grad, kAny, 128, 16384, "56 (75) registers: 1152 threads, 72 KiB in flight"},
    {90, Kernel::row_stats, 4096, 64, 4096, "two tiles at most, few columns idle"},
    {90, Kernel::row_stats, kAny, 128, 16384, "measured: 91 to 95 % of a copy; other sizes within 3 %"},
    {90, Kernel::row_grad, 4096, 64, 4096, "two tiles at most, few columns idle"},
    {90, Kernel::row_grad, kAny, 128, 16384,
     "measured: 93 to 95 % of a copy; 512 threads: 97 from 50000 columns on, 80 at 16000, worse softcapped"},
    {100, Kernel::row_stats, 4096, 64, 4096, "two tiles at most, few columns idle"},
    {100, Kernel::row_stats, kAny, 128, 16384, "71 (80) registers: 896 threads, 56 KiB in flight"},
    {100, Kernel::row_grad, 4096, 64, 4096, "two tiles at most, few columns idle"},
    {100, Kernel::row_grad, kAny, 128, 16384, "63 (75) registers: 1024 threads, 64 KiB in flight"},
    {80, Kernel::row_stats_grad, 8192, 128, kWholeRow, "two tiles at most, 16 KiB of bf16"},
    {80, Kernel::row_stats_grad, kAny, 512, kWholeRow,
     "83 (80) registers; no clusters: 81920 logits of bf16 fit, the rest is left to the L2 cache"},
    {90, Kernel::row_stats_grad, 8192, 128, kWholeRow, "two tiles at most, 16 KiB of bf16"},
    {90, Kernel::row_stats_grad, kAny, 128, 32768,
     "measured: 80 to 93 % of a copy, 67 to 90 in fp32; with 256 threads 72 to 90 and 52 to 87"},
    {100, Kernel::row_stats_grad, 8192, 128, kWholeRow, "two tiles at most, 16 KiB of bf16"},
    {100, Kernel::row_stats_grad, kAny, 128, 32768, "as sm_90, whose shared memory it has"},
    {0x90a, Kernel::row_stats, 4096, 128, 4096, "a tile at most"},
    {0x90a, Kernel::row_stats, kAny, 256, 32768, "58 (52) registers: all 8 waves, 128 KiB in flight"},
    {0x90a, Kernel::row_grad, 4096, 128, 4096, "a tile at most"},
    {0x90a, Kernel::row_grad, kAny, 256, 32768, "47 (64) registers: all 8 waves, 128 KiB in flight"},
    {0x90a, Kernel::row_stats_grad, 32768, 256, kWholeRow,
     "108 (126) registers, 64 of them with logits: a row of bf16"},
    {0x90a, Kernel::row_stats_grad, 65536, 512, kWholeRow,
     "108 (126) registers, 64 of them with logits: a row of bf16"},
    {0x90a, Kernel::row_stats_grad, kAny, 1024, kWholeRow,
     "108 (126) registers, 64 of them with logits: 131072 of bf16 in 1024 lanes"},
    // 256 threads were measured best for a cross-entropy on MI308X (ROCm/aiter).
    {0x942, Kernel::row_stats, 4096, 128, 4096, "a tile at most"},
    {0x942, Kernel::row_stats, kAny, 256, 32768, "60 (54) registers: all 8 waves, 128 KiB in flight"},
    {0x942, Kernel::row_grad, 4096, 128, 4096, "a tile at most"},
    {0x942, Kernel::row_grad, kAny, 256, 32768, "47 (64) registers: all 8 waves, 128 KiB in flight"},
    {0x942, Kernel::row_stats_grad, 32768, 256, kWholeRow,
     "110 (126) registers, 64 of them with logits: a row of bf16"},
    {0x942, Kernel::row_stats_grad, 65536, 512, kWholeRow,
     "110 (126) registers, 64 of them with logits: a row of bf16"},
    {0x942, Kernel::row_stats_grad, kAny, 1024, kWholeRow,
     "110 (126) registers, 64 of them with logits: 131072 of bf16 in 1024 lanes"},
    {0x950, Kernel::row_stats, 4096, 128, 4096, "a tile at most"},
    {0x950, Kernel::row_stats, kAny, 256, 32768, "as gfx942: clang 19 does not know gfx950"},
    {0x950, Kernel::row_grad, 4096, 128, 4096, "a tile at most"},
    {0x950, Kernel::row_grad, kAny, 256, 32768, "as gfx942: clang 19 does not know gfx950"},
    {0x950, Kernel::row_stats_grad, 32768, 256, kWholeRow, "as gfx942: clang 19 does not know gfx950"},
    {0x950, Kernel::row_stats_grad, 65536, 512, kWholeRow, "as gfx942: clang 19 does not know gfx950"},
    {0x950, Kernel::row_stats_grad, kAny, 1024, kWholeRow, "as gfx942: clang 19 does not know gfx950"},
};

// Blocks per multiprocessor that `splits` asks for, about three times what is resident: with one row in three
// scored every multiprocessor still has its full load.
constexpr int kBlocks = 32;

// The first line that serves: of the chip's generation, or of the nearest older one of its vendor.
inline const Line& line_for(const Chip& chip, Kernel kernel, int64_t columns) {
  const auto vendor = [](int generation) { return generation >= 0x900; };
  const Line* best = nullptr;
  for (const Line& line : kTable) {
    const bool serves = line.kernel == kernel && columns <= line.columns &&
                        vendor(line.generation) == vendor(chip.generation) &&
                        line.generation <= chip.generation;
    if (serves && (!best || line.generation > best->generation)) best = &line;
  }
  if (!best)
    throw std::invalid_argument(
        "expected compute capability 8.0 or newer, or gfx90a or newer, got generation " +
        std::to_string(chip.generation));
  return *best;
}

// Blocks per row, so that even few rows fill the chip. How many rows are scored is not known without a
// synchronisation, hence kBlocks; the blocks of a masked row cost an exit each.
inline int splits(const Chip& chip, int64_t rows, int64_t segments) {
  const int64_t wanted = int64_t{chip.multiprocessors} * kBlocks,
                each = (wanted + rows - 1) / std::max<int64_t>(rows, 1);
  return static_cast<int>(std::max<int64_t>(1, std::min(segments, each)));
}

}  // namespace fsl::gpu
