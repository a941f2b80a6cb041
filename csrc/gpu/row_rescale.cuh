// Multiplies the rows of a stored gradient whose factor has changed by new factor / old factor. Backward
// needs it with grad_in_forward in place, because the gradient has overwritten the logits.
#pragma once

#include "row_grad.cuh"

namespace fsl::gpu {

template <class T>
FSL_KERNEL(512, 8)
row_rescale_kernel(RescaleArgs a, Divisor by_parts, int each) {
  const Divided block = divide(block_id(), by_parts);
  const uint32_t n = block.quotient, part = block.rest;
  const float factor = factor_of(a.factor, n), stored = a.stored[n];
  if (factor == stored) return;
  const int valid = static_cast<int>(a.grad.valid);
  const Row row = row_at<T>(a.grad, n);
  const int head = part == 0 ? 0 : aligned_column<T>(row, 0), begin = head + part * each;
  const int next = aligned_column<T>(row, 0) + (part + 1) * each, end = next < valid ? next : valid;
  if (factor == 0) return GradWriter<T, false, false>::zero_columns(row, begin, end);
  const float ratio = quiet(factor / stored);
  const auto one = [&](int column) {
    T::put(row.start + int64_t{column} * T::kBytes, load_one<T>(row, column) * ratio);
  };
  const int first = aligned_column<T>(row, begin), odd = begin + thread_id();
  if (odd < first && odd < end) one(odd);
  int column = first + 8 * thread_id();
  for (; column + 8 <= end; column += 8 * block_threads()) {
    char* at = row.start + int64_t{column} * T::kBytes;
    uint32_t words[T::kWords];
    float x[8];
    load_eight<T, false>(words, at, 0);
    FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] = T::element(words, i) * ratio;
    T::put(words, x);
    store_eight<T>(at, words);
  }
  FSL_UNROLL_BY(1) for (; column < end; ++column) one(column);
}

}  // namespace fsl::gpu
