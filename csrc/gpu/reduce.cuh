// The sum or the mean of the losses of all rows.
#pragma once

#include "block.cuh"

namespace fsl::gpu {

// One block adds all rows in a fixed order.
FSL_KERNEL(512, 4)
reduce_kernel(ReduceArgs a) {
  FSL_SHARED(float, sums, kMaxWarps);
  float sum = 0;
  for (int64_t row = thread_id(); row < a.rows; row += block_threads()) sum += a.loss[row];
  sum = block_reduce(sum, Add{}, sums);
  if (thread_id() != 0) return;
  *a.result = a.weight_sum && *a.weight_sum > 0 ? sum / *a.weight_sum : sum;
}

}  // namespace fsl::gpu
