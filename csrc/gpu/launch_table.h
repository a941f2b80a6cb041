// The launch table: for a chip, a kernel and a row width, the threads per block and the segment in which
// blocks share a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace fsl::gpu {

enum class Kernel : unsigned { row_stats = 1, row_grad = 2, row_stats_grad = 4 };

// Groups of kernels that share a line. row_rescale takes the line of row_grad.
constexpr unsigned kTwoReads = 1 | 2, kOneRead = 4;

// Counted in threads, not warps: the 32 warps that fill an NVIDIA block would be 2048 threads on AMD, more
// than a block can have.
struct Line {
  int generation;    // for this generation and newer ones of the same vendor
  unsigned kernels;  // bits of Kernel
  int64_t columns;   // for V_local up to this
  int threads;
  int segment;  // columns, in whole tiles of 32 logits per thread; for row_stats_grad, columns per block
  int rounds;   // see clusters_for; 0: each row has its own blocks
  const char* why;
};

constexpr int64_t kAny = INT64_MAX;
constexpr int kWholeRow = 1 << 30;

// The first line that matches is used. Measured chip: one H100. For other chips the lines were chosen by
// registers and bytes in flight, as nvcc 13 and clang 19 compile the kernels;
// bench/without_gpu/codegen/budgets.py lists both, and tests compare them. A line serves all dtypes, because
// otherwise the last bits of a bf16 loss could differ from those of an fp32 loss of the same numbers.
constexpr Line kTable[] = {
    {80, kTwoReads, 4096, 64, 4096, 0, "two tiles at most, few columns idle"},
    {80, kTwoReads, kAny, 128, 16384, 0,
     "H100, measured: row_stats 91 to 95 % of a copy, other sizes within 3 %; row_grad 93 to 95 %, and with "
     "512 threads 97 from 50000 columns on, 80 at 16000, worse softcapped"},
    {80, kOneRead, 8192, 128, kWholeRow, 4, "two tiles at most, 16 KiB of bf16"},
    {120, kOneRead, kAny, 128, 16384, 4, "two blocks of bf16 fit an SM of 100 KiB: one loads, one computes"},
    {90, kOneRead, kAny, 128, 32768, 4,
     "H100, measured in 0 rounds: 80 to 93 % of a copy, 67 to 90 in fp32; with 256 threads 72 to 90 and 52 "
     "to 87"},
    {80, kOneRead, kAny, 512, kWholeRow, 4,
     "no clusters: 81920 logits of bf16 fit, the rest is left to the L2 cache"},
    {0x90a, kTwoReads, 4096, 128, 4096, 0, "a tile at most"},
    {0x90a, kTwoReads, kAny, 256, 32768, 0,
     "all 8 waves; 256 threads were measured best for a cross-entropy on MI308X (ROCm/aiter)"},
    {0x90a, kOneRead, 32768, 256, kWholeRow, 0, "64 registers of a lane hold logits: a row of bf16"},
    {0x90a, kOneRead, 65536, 512, kWholeRow, 0, "64 registers of a lane hold logits: a row of bf16"},
    {0x90a, kOneRead, kAny, 1024, kWholeRow, 0, "64 registers of a lane hold logits: 131072 of bf16"},
};

// Whether a line is for a generation and a kernel. The caller compares the width.
inline bool is_for(const Line& line, int generation, Kernel kernel) {
  const auto vendor = [](int any) { return any >= 0x900; };
  return (line.kernels & static_cast<unsigned>(kernel)) && vendor(line.generation) == vendor(generation) &&
         line.generation <= generation;
}

// Blocks per multiprocessor that `splits` aims for. It is about three times the number of resident blocks: if
// only one row in three is scored, every multiprocessor still has a full load.
constexpr int kBlocks = 32;

// A line to try in place of the table's, of any chip and width; its threads are 0 if there is none. Only
// try_line in bindings.cpp sets it, for `python -m bench launches`.
inline Line& tried_line(Kernel kernel) {
  static Line row_stats{}, row_grad{}, row_stats_grad{};
  return kernel == Kernel::row_stats ? row_stats : kernel == Kernel::row_grad ? row_grad : row_stats_grad;
}

inline const Line& line_for(const Chip& chip, Kernel kernel, int64_t columns) {
  if (tried_line(kernel).threads) return tried_line(kernel);
  for (const Line& line : kTable)
    if (is_for(line, chip.generation, kernel) && columns <= line.columns) return line;
  throw std::invalid_argument(
      "expected compute capability 8.0 or newer, or gfx90a or newer, got generation " +
      std::to_string(chip.generation));
}

// Blocks per row, so that few rows fill the chip too. The number of scored rows is unknown without a
// synchronisation, so kBlocks allows for masked rows. In row_stats each block of a masked row exits at once.
inline int splits(const Chip& chip, int64_t rows, int64_t segments) {
  const int64_t wanted = int64_t{chip.multiprocessors} * kBlocks,
                each = (wanted + rows - 1) / std::max<int64_t>(rows, 1);
  return static_cast<int>(std::max<int64_t>(1, std::min(segments, each)));
}

// The columns of each of the blocks that share a row's segments.
inline int columns_of_part(int64_t segments, int parts, const Line& line) {
  return static_cast<int>((segments + parts - 1) / parts * line.segment);
}

// How many clusters take the rows of row_stats_grad in turn: so many that each has kInTurn rows, in whole
// rounds of the resident clusters, so that all end together. In a single round, a launch would take twice as
// long if another kernel, of NCCL perhaps, held a few multiprocessors when it started.
constexpr int64_t kInTurn = 8;
inline uint32_t clusters_for(const Line& line, int64_t rows, int64_t resident) {
  if (line.rounds == 0) return static_cast<uint32_t>(rows);
  const int64_t rounds = std::max<int64_t>(1, std::min<int64_t>(line.rounds, rows / (resident * kInTurn)));
  return static_cast<uint32_t>(std::min(rows, resident * rounds));
}

}  // namespace fsl::gpu
