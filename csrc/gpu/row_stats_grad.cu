// Selects and launches row_stats_grad and row_rescale kernels.
#include "row_stats_grad.cuh"

#include "dispatch.h"
#include "launch_table.h"
#include "row_rescale.cuh"

namespace fsl::gpu {
namespace {

// The cluster size that every device allows; larger clusters are opt-in.
constexpr int kMostBlocks = 8;

// The number of blocks, up to kMostBlocks, with which each block takes at most one segment of the row.
int cluster_of(int64_t columns, int64_t segment) {
  int cluster = 1;
  while (cluster < kMostBlocks && columns > cluster * segment) cluster *= 2;
  return cluster;
}

// Shared memory besides the row: statistics that warps and blocks exchange, and a chunk read past the row's
// end.
constexpr int kStaticBytes = 1024, kSpare = 16;

// How many columns of a block's part fit into shared memory, and the bytes of dynamic shared memory.
struct Room {
  int columns, bytes;
};
Room room_for(int64_t columns, int element_bytes, int threads) {
  const int64_t tile = 8 * kRuns * threads, bytes = most_shared_bytes() - kStaticBytes - kSpare;
  const int64_t most = bytes / element_bytes / tile * tile, held = std::min(columns, most);
  return {static_cast<int>(held), static_cast<int>(held * element_bytes + kSpare)};
}

// Calls fn(std::integral_constant) with the Cap of `math`. No kernel is made for what one_read_gains refuses.
template <class Fn>
void with_cap_of_one_read(const RowMath& math, const Fn& fn) {
  if constexpr (!kUnalignedAccess) with_cap(math, fn);
  else if (cap_of(math) == kNoCap) fn(std::integral_constant<int, kNoCap>{});
  else throw std::invalid_argument("expected no softcap, with which one read does not gain");
}

}  // namespace

// With kUnalignedAccess rows stay in registers, which leaves few for a softcap's arithmetic, done three times
// for each logit. Predicted for MI300X and bf16: two reads take 0.88 of the time of one.
bool one_read_gains(const RowMath& math) { return !kUnalignedAccess || cap_of(math) == kNoCap; }

void row_stats_grad(const StatsGradArgs& a, const Chip& chip, void* stream) {
  const Rows& logits = a.grad.logits;
  check_rows(logits);
  const Line& line = line_for(chip, Kernel::row_stats_grad, logits.columns);
  const int cluster = cluster_of(logits.valid, line.segment);
  const int each = static_cast<int>(((logits.valid + 7) / 8 + cluster - 1) / cluster * 8);
  const bool shifted = common_skew(logits) != 0 || common_skew(a.grad.grad) != 0;
  Grid grid{logits.count() * cluster, line.threads, 0, cluster};
  with_dtype(logits.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    Holding holding{Divisor(cluster), each, 0, 0};
    if (!kUnalignedAccess) {
      const Room room = room_for(each, T::kBytes, line.threads);
      holding.columns = room.columns;
      grid.shared_bytes = room.bytes;
    }
    with_cap_of_one_read(a.grad.math, [&](auto softcap) {
      with_bool(shifted, [&](auto moved) {
        constexpr bool kShifted = decltype(moved)::value && !kUnalignedAccess;
        const auto kernel = row_stats_grad_kernel<T, softcap(), kShifted>;
        if constexpr (kTakesRowsInTurn<kShifted>) {
          holding.clusters =
              clusters_for(line, logits.count(), resident_clusters(kernel, grid, chip.multiprocessors));
          grid.blocks = int64_t{holding.clusters} * cluster;
        }
        launch("row_stats_grad", kernel, grid, stream, a, units_of(a.grad.math), holding);
      });
    });
  });
}

void row_rescale(const RescaleArgs& a, const Chip& chip, void* stream) {
  check_rows(a.grad);
  const Line& line = line_for(chip, Kernel::row_grad, a.grad.columns);
  const int64_t segments = (a.grad.columns + line.segment - 1) / line.segment;
  const int parts = splits(chip, a.grad.count(), segments);
  with_dtype(a.grad.dtype, [&](auto dtype) {
    launch("row_rescale", row_rescale_kernel<decltype(dtype)>, {a.grad.count() * parts, line.threads}, stream,
           a, Divisor(parts), columns_of_part(segments, parts, line));
  });
}

}  // namespace fsl::gpu
