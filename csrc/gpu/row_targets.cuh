// Target and weight of each row, from labels, mask, document boundaries and ignore_index. One launch, no
// atomics.
//
// Block 0 reads all rows, in a fixed order, for the count and the sum of the weights. Every other block
// writes the targets and weights of its rows. Labels and masks are a few bytes per row, so one block can
// afford to read them all again.
#pragma once

#include "block.cuh"

namespace fsl::gpu {

struct Scored {
  int64_t target;
  float weight;
};

// Whether positions p and p + 1 lie in one document [cu_seqlens[i], cu_seqlens[i + 1]). Binary search.
FSL_DEVICE bool same_document_next(const TargetsArgs& a, int64_t p) {
  int64_t low = 0, high = a.boundaries;
  while (low < high) {  // low becomes the number of boundaries <= p
    const int64_t middle = (low + high) / 2;
    if (a.cu_seqlens[middle] <= p) low = middle + 1;
    else high = middle;
  }
  return low > 0 && low < a.boundaries && a.cu_seqlens[low] > p + 1;
}

FSL_DEVICE Scored scored_on(const TargetsArgs& a, int64_t row) {
  const int64_t b = row / a.seq, s = row % a.seq + (a.shift ? 1 : 0);
  if (s >= a.seq || (a.shift && a.cu_seqlens && !same_document_next(a, row))) return {kNotScored, 0.0f};
  const int64_t label = a.labels[b * a.label_stride_b + s * a.label_stride_s];
  const float weight = a.mask ? a.mask[b * a.mask_stride_b + s * a.mask_stride_s] : 1.0f;
  if (label == a.ignore_index || weight == 0) return {kNotScored, 0.0f};
  return {label >= 0 && label < a.vocab_size ? label : kOutOfVocabulary, weight};
}

FSL_KERNEL(512, 4)
row_targets_kernel(TargetsArgs a) {
  FSL_SHARED(float, sums, kMaxWarps);
  FSL_SHARED(int, counts, kMaxWarps);
  const int64_t rows = a.batch * a.seq;
  if (block_id() > 0) {
    const int64_t row = int64_t{block_id() - 1} * block_threads() + thread_id();
    if (row >= rows) return;
    const Scored scored = scored_on(a, row);
    a.target[row] = scored.target;
    a.weight[row] = scored.weight;
    return;
  }
  float sum = 0;
  int count = 0;
  for (int64_t row = thread_id(); row < rows; row += block_threads()) {
    const Scored scored = scored_on(a, row);
    sum += scored.weight;
    count += scored.weight != 0 ? 1 : 0;
  }
  sum = block_reduce(sum, Add{}, sums);
  count = block_reduce(count, Add{}, counts);
  if (thread_id() != 0) return;
  *a.weight_sum = sum;
  *a.count = count;
}

}  // namespace fsl::gpu
