// Folds each row's statistics over the shards, in rank order, and computes its loss, normalizer and metrics.
// One thread takes one row.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace fsl::gpu {

// The unweighted loss and the normalizer. All are NaN if the label is out of the vocabulary.
struct RowLoss {
  float loss;
  float top, total;  // the normalizer
};

FSL_DEVICE void store_normalizer(float* normalizers, int64_t n, float top, float total) {
  normalizers[n * kNormalizer + kRowMax] = top;
  normalizers[n * kNormalizer + kRowSum] = total;
}

FSL_DEVICE RowLoss row_loss(const Stats& all, float x_target, int64_t target, float unit,
                            const RowMath& math) {
  const float log_total = log(all.total), poison = target == kOutOfVocabulary ? nan() : 0.0f;
  // (maximum - x_y) first: both are logits, so the difference is exact if they are close.
  float loss = fma(all.top - x_target, unit, log_total);
  if (math.label_smoothing > 0) {
    const float smooth = fma(all.top - all.x_sum / static_cast<float>(math.vocab_size), unit, log_total);
    loss = fma(loss, 1.0f - math.label_smoothing, math.label_smoothing * smooth);
  }
  if (math.z_loss > 0) {
    const float lse = fma(all.top, unit, log_total);
    loss = fma(lse * lse, math.z_loss, loss);
  }
  return {loss + poison, all.top + poison, all.total + poison};
}

template <int kStatistics>
FSL_KERNEL(256, 4)
merge_kernel(MergeArgs a, Metrics metrics) {
  const int64_t n = int64_t{block_id()} * block_threads() + thread_id();
  if (n >= a.rows) return;
  const float weight = a.weight[n], unit_of_all = a.math.softcap > 0 ? 1.0f : a.math.logit_scale;
  const float unit = a.scale ? a.scale[n] : unit_of_all;
  const int64_t target = a.target[n];
  Stats all;
  float x_target = 0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const float* at = a.stats + rank * a.rank_stride + n * kStatistics;
    all = fold(all, load_stats<kStatistics>(at), unit);
    x_target += at[kTarget];
  }
  const bool scored = weight != 0;
  const RowLoss row = row_loss(all, x_target, target, unit, a.math);
  a.loss[n] = scored ? row.loss * (metrics.log_prob ? 1.0f : weight) : 0.0f;
  store_normalizer(a.normalizer, n, scored ? row.top : 0.0f, scored ? row.total : 0.0f);
  if (!metrics.log_prob) return;
  const float log_total = log(all.total), poison = target == kOutOfVocabulary ? nan() : 0.0f;
  metrics.lse[n] = scored ? fma(all.top, unit, log_total) + poison : 0.0f;
  metrics.log_prob[n] = scored ? fma(x_target - all.top, unit, -log_total) + poison : 0.0f;
  metrics.entropy[n] = scored ? log_total - all.moment / all.total + poison : 0.0f;
  metrics.correct[n] = scored && all.top_id == static_cast<float>(target);
}

}  // namespace fsl::gpu
