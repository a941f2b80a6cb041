// The kernels over vectors of N rows: how they are launched.
#include "dispatch.h"
#include "merge.cuh"
#include "row_targets.cuh"

namespace fsl::gpu {

void row_targets(const TargetsArgs& a, void* stream) {
  const int threads = 512;  // many: one block reads all rows, and what bounds it is loads in flight
  launch("row_targets", row_targets_kernel, {1 + (a.batch * a.seq + threads - 1) / threads, threads}, stream,
         a);
}

void merge(const MergeArgs& a, const Metrics& metrics, void* stream) {
  const int threads = 256;
  with_columns(static_cast<Want>(a.columns), [&](auto columns) {
    launch("merge", merge_kernel<columns()>, {(a.rows + threads - 1) / threads, threads}, stream, a, metrics);
  });
}

}  // namespace fsl::gpu
