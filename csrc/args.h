// What every row kernel is told: pointers, strides and numbers. No torch, no ownership, no masks' meaning.
#pragma once

#include <cstdint>

namespace fsl {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// Row n = batch * seq + s starts at data + batch * stride_b + s * stride_s (strides in elements, int64:
// N * V passes 2^31 long before a cluster notices). Columns within a row are contiguous.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t batch, seq;  // N = batch * seq
  int64_t columns;     // V_local: columns that exist
  int64_t valid;       // columns that are vocabulary; [valid, columns) is padding
  int64_t stride_b, stride_s;

  int64_t count() const { return batch * seq; }
};

// The numbers that define a loss: the fields, and their order, of RowMath in fused_sft_loss/rowmath.py.
//
// z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap) when softcap > 0. -inf stays -inf: a
// masked-out column is masked out on either side of the cap.
struct RowMath {
  float label_smoothing, z_loss;
  float softcap;  // 0: none
  float logit_scale;
  int64_t vocab_start;  // global id of this shard's column 0
  int64_t vocab_size;   // global, without padding

  // z = unit * x, x being the capped logit under a softcap and the raw one otherwise. Statistics are in units
  // of this x: a difference of neighbouring x is exact, and one of rounded products unit * x is not.
  float unit() const { return softcap > 0 ? 1.0f : logit_scale; }

  // How many of a shard's columns are vocabulary and not padding.
  int64_t valid_columns(int64_t columns) const {
    const int64_t left = vocab_size - vocab_start;
    return left < 0 ? 0 : left < columns ? left : columns;
  }
};

// Targets that are no vocabulary id: of a row that is not scored, and of one whose label is out of range (its
// loss is NaN).
constexpr int64_t kNotScored = -1, kOutOfVocabulary = -2;

// Columns of the statistics row that row_stats writes, in this order. The first three are always there:
// max x, sum of exp(unit * (x - max)), x of the target; then the sum of x, the id of the maximum, and the sum
// of u * exp(u) with u = unit * (x - max).
enum Stat : int { kMax = 0, kDenominator = 1, kTarget = 2, kSum = 3, kArgmax = 4, kWeighted = 5 };
enum class Want : int { loss = 3, smoothing = 4, metrics = 6 };  // the value is how many of them

inline Want wanted_by(const RowMath& math) { return math.label_smoothing > 0 ? Want::smoothing : Want::loss; }

struct StatsArgs {
  Rows logits;
  RowMath math;
  const int64_t* target;  // [N] global vocabulary id, < 0: none
  const float* weight;    // [N] 0: the row is not read and its statistics are zeros
  Want want;
  float* stats;  // [N, want]
};

// The two numbers per row that the gradient needs of the whole vocabulary: max x (see RowMath::unit) and
// the sum of exp(unit * (x - max)). Their log-sum-exp as one fp32 number would be off by half a unit in its
// last place, and every probability by that factor: all of it from |z| = 1e8 on.
enum Normalizer : int { kRowMax = 0, kRowSum = 1, kNormalizer = 2 };

// What a row's gradient is multiplied by: weight * (upstream gradient / weight_sum). 0 where the weight is 0,
// whatever the upstream gradient.
struct RowScale {
  const float* grad;        // of row n's loss at n * stride
  int64_t stride;           // 0: one number for all rows
  const float* weight;      // [N], or null: 1
  const float* weight_sum;  // [1] of a mean, where 0 counts as 1; or null: 1
};

struct GradArgs {
  Rows logits;
  Rows grad;  // may be the same memory as logits
  RowMath math;
  const int64_t* target;    // [N]
  const float* normalizer;  // [N, kNormalizer]
  RowScale scale;           // 0: the row gets stored zeros and is not read
  // [N] or null. The gradient of a row whose scale is this one's, bit for bit, is in `grad` already: the row
  // is neither read nor written.
  const float* stored;
};

// Loss and gradient of each row from one read of it, where all of the vocabulary is here.
struct StatsGradArgs {
  GradArgs grad;        // its normalizer is the one below, which is written before it is read
  const float* weight;  // [N] 0: the row is not read, its gradient is zeros
  float* loss;          // [N]: weight * loss
  float* normalizer;    // [N, kNormalizer]
};

// Rows of a gradient that was stored for another scale than the real one, multiplied by their ratio.
struct RescaleArgs {
  Rows grad;
  RowScale scale;       // the real one; 0: stored zeros, whatever is there. Padding keeps its zeros
  const float* stored;  // [N] where it is the same bits the row is neither read nor written
};

struct TargetsArgs {
  const int64_t* labels;      // [batch, seq], any strides (in elements)
  const float* mask;          // [batch, seq], any strides; null: every label counts
  const int64_t* cu_seqlens;  // [boundaries] increasing; null: no documents
  int64_t batch, seq, boundaries;
  int64_t label_stride_b, label_stride_s, mask_stride_b, mask_stride_s;
  bool shift;  // row t is scored on position t + 1
  int64_t ignore_index, vocab_size;
  int64_t* target;    // [N]: label, kNotScored or kOutOfVocabulary
  float* weight;      // [N]
  int32_t* count;     // [1]: rows with weight != 0
  float* weight_sum;  // [1]
};

struct MergeArgs {
  const float* stats;  // [ranks, N, statistics], a rank stride of its own
  int64_t ranks, rows, statistics, rank_stride;
  const int64_t* target;  // [N]
  const float* weight;    // [N]
  RowMath math;
  float* loss;        // [N]: weight * loss
  float* normalizer;  // [N, kNormalizer]; 0 where weight is 0, NaN where the label is out of range
};

// The sum of N losses, or their mean.
struct ReduceArgs {
  const float* loss;  // [N]
  int64_t rows;
  const float* weight_sum;  // [1] to divide by, where 0 counts as 1; null: not
  float* result;            // [1]
};

// A whole forward pass where all of the vocabulary is here.
struct LossArgs {
  TargetsArgs targets;
  Rows logits;
  RowMath math;
  float* loss;        // [N], see MergeArgs
  float* normalizer;  // [N, kNormalizer]
  bool mean;          // what `result` is; see ReduceArgs
  float* result;      // [1], or null: not wanted
};

}  // namespace fsl
