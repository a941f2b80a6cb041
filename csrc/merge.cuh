// Loss, or metrics, of each row from the statistics of all shards, folded in rank order; a row a thread.
#pragma once

#include "gpu_block.cuh"
#include "gpu_launch.h"

namespace fsl::gpu {

template <int kColumns>
FSL_KERNEL(256, 4)
merge_kernel(MergeArgs a, Metrics metrics) {
  const int64_t n = int64_t{block_id()} * block_threads() + thread_id();
  if (n >= a.rows) return;
  const float weight = a.weight[n];
  const int64_t target = a.target[n];
  Stats all;
  float z_target = 0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const float* at = a.stats + rank * a.rank_stride + n * kColumns;
    all = fold(all, load_stats<kColumns>(at));
    z_target += at[kTarget];
  }
  const bool scored = weight != 0;
  const float log_total = log(all.total), poison = target == kOutOfVocabulary ? nan() : 0.0f;
  const float lse = all.top + log_total;
  // (maximum - z_y) first: both are logits, so their difference is exact when it matters.
  float loss = (all.top - z_target) + log_total;
  if (a.label_smoothing > 0) {
    const float smooth = (all.top - all.z_sum / static_cast<float>(a.vocab_size)) + log_total;
    loss = fma(loss, 1.0f - a.label_smoothing, a.label_smoothing * smooth);
  }
  if (a.z_loss > 0) loss = fma(lse * lse, a.z_loss, loss);
  if (!metrics.log_prob) loss *= weight;
  a.loss[n] = scored ? loss + poison : 0.0f;
  a.lse[n] = scored ? lse + poison : 0.0f;
  if (!metrics.log_prob) return;
  metrics.log_prob[n] = scored ? (z_target - all.top) - log_total + poison : 0.0f;
  metrics.entropy[n] = scored ? log_total - all.moment / all.total + poison : 0.0f;
  metrics.correct[n] = scored && all.top_id == static_cast<float>(target);
}

}  // namespace fsl::gpu
