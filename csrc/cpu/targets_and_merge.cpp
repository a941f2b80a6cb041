// The work per row, not per logit. Each function replaces several torch operators: two dozen of them on
// vectors of N rows take a millisecond when the logits have just swept the caches.
#include <algorithm>
#include <cmath>
#include <limits>

#include "backend.h"

namespace fsl::cpu {
namespace {

// Whether positions p and p + 1 lie in one document [cu_seqlens[i], cu_seqlens[i + 1]).
bool same_document_next(const TargetsArgs& a, int64_t p) {
  if (!a.cu_seqlens) return true;
  const int64_t* end = a.cu_seqlens + a.boundaries;
  const int64_t* next = std::upper_bound(a.cu_seqlens, end, p);
  return next != a.cu_seqlens && next != end && p + 1 < *next;
}

// exp(unit * (part - maximum)), and 0 if part is -inf, because -inf - -inf is NaN.
float shrink(float part, float maximum, float unit) {
  return part == -std::numeric_limits<float>::infinity() ? 0.0f : std::exp((part - maximum) * unit);
}

bool is_weight(float x) { return x >= 0 && x < std::numeric_limits<float>::infinity(); }

float max_or_nan(float a, float b) { return a > b || std::isnan(a) ? a : b; }

}  // namespace

int row_targets(const TargetsArgs& a) {
  int32_t count = 0;
  bool weights_right = true, labels_right = true;
  double weight_sum = 0;
  for (int64_t row = 0; row < a.batch * a.seq; ++row) {
    const int64_t b = row / a.seq, here = row % a.seq, s = here + a.shift;
    if (a.mask) weights_right &= is_weight(a.mask[b * a.mask_stride_b + here * a.mask_stride_s]);
    a.target[row] = kNotScored;
    a.weight[row] = 0;
    if (s == a.seq || (a.shift && !same_document_next(a, row))) continue;
    const int64_t label = a.labels[b * a.label_stride_b + s * a.label_stride_s];
    const float weight = a.mask ? a.mask[b * a.mask_stride_b + s * a.mask_stride_s] : 1.0f;
    if (label == a.ignore_index || weight == 0) continue;
    const bool known = label >= 0 && label < a.vocab_size;
    labels_right &= known;
    a.target[row] = known ? label : kOutOfVocabulary;
    a.weight[row] = weight;
    weight_sum += weight;
    ++count;
  }
  *a.count = count;
  *a.weight_sum = static_cast<float>(weight_sum);
  return (weights_right ? 0 : kWeight) + (labels_right ? 0 : kLabel);
}

// The same arithmetic as fused_sft_loss.shards.merge; see there. Shards are added in rank order, so that
// every rank gets the same bits.
void merge_row(const MergeArgs& a, int64_t row) {
  const RowMath math = of_row(a.math, a.scale, row);
  const float eps = math.label_smoothing, unit = math.unit();
  float* normalizer = a.normalizer + row * kNormalizer;
  a.loss[row] = normalizer[kRowMax] = normalizer[kRowSum] = 0;
  if (a.weight[row] == 0) return;
  const float* first = a.stats + row * a.statistics;
  float maximum = first[kMaximum], sum_exp = 0, target = 0, sum = 0;
  for (int64_t r = 1; r < a.ranks; ++r) maximum = max_or_nan(maximum, first[r * a.rank_stride + kMaximum]);
  for (int64_t r = 0; r < a.ranks; ++r) {
    const float* part = first + r * a.rank_stride;
    sum_exp += part[kSumExp] * shrink(part[kMaximum], maximum, unit);
    target += part[kTarget];
    if (a.statistics > kSum) sum += part[kSum];
  }
  const float log_sum = std::log(sum_exp);
  float loss = (maximum - target) * unit + log_sum;
  if (eps != 0) {
    const float mean = sum / static_cast<float>(math.vocab_size);
    loss = (1 - eps) * loss + eps * ((maximum - mean) * unit + log_sum);
  }
  if (math.z_loss != 0) {
    const float lse = maximum * unit + log_sum;
    loss += math.z_loss * lse * lse;
  }
  const bool poisoned = a.target[row] == kOutOfVocabulary;
  a.loss[row] = poisoned ? std::nanf("") : a.weight[row] * loss;
  normalizer[kRowMax] = poisoned ? std::nanf("") : maximum;
  normalizer[kRowSum] = poisoned ? std::nanf("") : sum_exp;
}

void merge(const MergeArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) merge_row(a, row);
}

void reduce(const ReduceArgs& a) {
  double sum = 0;
  for (int64_t row = 0; row < a.rows; ++row) sum += a.loss[row];
  const float total = static_cast<float>(sum);
  *a.result = a.weight_sum && *a.weight_sum > 0 ? total / *a.weight_sum : total;
}

}  // namespace fsl::cpu
