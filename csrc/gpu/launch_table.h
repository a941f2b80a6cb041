// Launch policy as data: for a chip, a kernel and a width, how many threads take a row and in which units it
// is shared out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace fsl::gpu {

enum class Kernel : unsigned { row_stats = 1, row_grad = 2, row_stats_grad = 4 };

// Kernels that share a line. row_rescale is launched as row_grad.
constexpr unsigned kTwoReads = 1 | 2, kOneRead = 4;

// Threads, not warps: the 32 warps that fill an NVIDIA block would be 2048 threads on AMD, which no launch
// can have.
struct Line {
  int generation;    // this one and newer ones of its vendor
  unsigned kernels;  // bits of Kernel
  int64_t columns;   // for V_local up to this
  int threads;
  int segment;  // columns; whole tiles of 32 logits a thread. Of row_stats_grad those that a block takes
  const char* why;
};

constexpr int64_t kAny = INT64_MAX;
constexpr int kWholeRow = 1 << 30;

// The first line that serves is taken. An H100 alone was timed. For other chips the choices rest on registers
// and bytes in flight, as nvcc 13 and clang 19 compile the kernels: bench/without_gpu/codegen/budgets.py
// lists them, and tests compare. Lines serve all dtypes alike, or a bf16 loss would differ in its last bits
// from that of the same numbers in fp32.
constexpr Line kTable[] = {
    {80, kTwoReads, 4096, 64, 4096, "two tiles at most, few columns idle"},
    {80, kTwoReads, kAny, 128, 16384,
     "H100, measured: row_stats 91 to 95 % of a copy, other sizes within 3 %; row_grad 93 to 95 %, and with "
     "512 threads 97 from 50000 columns on, 80 at 16000, worse softcapped"},
    {80, kOneRead, 8192, 128, kWholeRow, "two tiles at most, 16 KiB of bf16"},
    {90, kOneRead, kAny, 128, 32768,
     "H100, measured: 80 to 93 % of a copy, 67 to 90 in fp32; with 256 threads 72 to 90 and 52 to 87"},
    {80, kOneRead, kAny, 512, kWholeRow,
     "no clusters: 81920 logits of bf16 fit, the rest is left to the L2 cache"},
    {0x90a, kTwoReads, 4096, 128, 4096, "a tile at most"},
    {0x90a, kTwoReads, kAny, 256, 32768,
     "all 8 waves; 256 threads were measured best for a cross-entropy on MI308X (ROCm/aiter)"},
    {0x90a, kOneRead, 32768, 256, kWholeRow, "64 registers of a lane hold logits: a row of bf16"},
    {0x90a, kOneRead, 65536, 512, kWholeRow, "64 registers of a lane hold logits: a row of bf16"},
    {0x90a, kOneRead, kAny, 1024, kWholeRow, "64 registers of a lane hold logits: 131072 of bf16"},
};

// Whether a line is for a generation and a kernel; its width is another question.
inline bool is_for(const Line& line, int generation, Kernel kernel) {
  const auto vendor = [](int any) { return any >= 0x900; };
  return (line.kernels & static_cast<unsigned>(kernel)) && vendor(line.generation) == vendor(generation) &&
         line.generation <= generation;
}

// Blocks per multiprocessor that `splits` asks for, about three times what is resident: with one row in three
// scored every multiprocessor still has its full load.
constexpr int kBlocks = 32;

inline const Line& line_for(const Chip& chip, Kernel kernel, int64_t columns) {
  for (const Line& line : kTable)
    if (is_for(line, chip.generation, kernel) && columns <= line.columns) return line;
  throw std::invalid_argument(
      "expected compute capability 8.0 or newer, or gfx90a or newer, got generation " +
      std::to_string(chip.generation));
}

// Blocks per row, so that even few rows fill the chip. How many rows are scored is not known without a
// synchronisation, hence kBlocks; the blocks of a masked row cost an exit each.
inline int splits(const Chip& chip, int64_t rows, int64_t segments) {
  const int64_t wanted = int64_t{chip.multiprocessors} * kBlocks,
                each = (wanted + rows - 1) / std::max<int64_t>(rows, 1);
  return static_cast<int>(std::max<int64_t>(1, std::min(segments, each)));
}

}  // namespace fsl::gpu
