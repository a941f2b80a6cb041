// Argument structs of the row kernels: pointers, strides and numbers. They own no memory and use no torch.
#pragma once

#include <cstdint>

namespace fsl {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// Divides numbers n < 2^31: n / value is (2 * n * multiplier) >> 32 >> shift. GPUs have no integer division;
// a compiler's own, by a number that it does not know, goes through an approximate reciprocal. Granlund and
// Montgomery, "Division by Invariant Integers using Multiplication", 1994, theorem 4.2 with 31 bits.
struct Divisor {
  uint32_t value, multiplier, shift;

  // From 2^31 on every quotient is 0, as it is for 2^31. 0 counts as 1.
  explicit Divisor(int64_t divisor) : value(1), multiplier(0), shift(0) {
    constexpr int64_t kMost = int64_t{1} << 31;
    value = static_cast<uint32_t>(divisor < 1 ? 1 : divisor < kMost ? divisor : kMost);
    while (uint64_t{1} << shift < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + value - 1) / value);
  }
};

// Row b * seq + s starts at data + b * stride_b + s * stride_s. Strides count elements. They are int64,
// because N * V can exceed 2^31 (16384 rows of 131072 columns reach it). The columns of a row are contiguous.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t batch, seq;  // N = batch * seq
  int64_t columns;     // V_local, with padding
  int64_t valid;       // columns of the vocabulary; [valid, columns) is padding
  int64_t stride_b, stride_s;
  Divisor by_seq = Divisor(seq);

  int64_t count() const { return batch * seq; }
};

// The numbers that define a loss. RowMath in fused_sft_loss/rowmath.py has the same fields in the same order.
//
// z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap) when softcap > 0. The cap leaves -inf as
// it is, so a masked-out column stays masked out.
struct RowMath {
  int64_t vocab_start;  // global id of this shard's column 0
  int64_t vocab_size;   // global, without padding
  float label_smoothing = 0, z_loss = 0;
  float softcap = 0;  // none
  float logit_scale = 1;

  // z = unit * x, where x is the capped logit if there is a softcap, else the raw logit. Statistics are in
  // units of x: the difference of two close x is exact, that of two rounded products unit * x is not.
  float unit() const { return softcap > 0 ? 1.0f : logit_scale; }

  // The number of a shard's columns that are vocabulary, not padding.
  int64_t valid_columns(int64_t columns) const {
    const int64_t left = vocab_size - vocab_start;
    return left < 0 ? 0 : left < columns ? left : columns;
  }
};

// Targets that are not vocabulary ids. kNotScored: the row is not scored. kOutOfVocabulary: the label is out
// of range, so the row's loss is NaN.
constexpr int64_t kNotScored = -1, kOutOfVocabulary = -2;

// The statistics of a row, in the order in which row_stats writes them. With u = unit * (x - max):
// max x, sum of exp(u), x of the target (0 on shards that do not hold it); with smoothing also the sum of x;
// for metrics also the global id of the maximum and the sum of u * exp(u).
enum Stat : int { kMaximum = 0, kSumExp = 1, kTarget = 2, kSum = 3, kArgmax = 4, kMoment = 5 };
enum class Want : int { loss = 3, smoothing = 4, metrics = 6 };  // the number of statistics

inline Want wanted_by(const RowMath& math) { return math.label_smoothing > 0 ? Want::smoothing : Want::loss; }

struct StatsArgs {
  Rows logits;
  RowMath math;
  const int64_t* target;  // [N] global vocabulary id; < 0: none
  const float* weight;    // [N] 0: the row is not read and its statistics are zeros
  Want want;
  float* stats;  // [N, want]
  const float* scale =
      nullptr;  // [N] or null: the logit_scale of each row, without a softcap. Needs Want::metrics
};

// The two numbers per row that the gradient needs: max x over the whole vocabulary (see RowMath::unit) and
// the sum of exp(unit * (x - max)). One fp32 log-sum-exp would round off the sum when |z| is large, and leave
// no correct digit in the probabilities from |z| = 1e8 on (docs/design.md, The gradient).
enum Normalizer : int { kRowMax = 0, kRowSum = 1, kNormalizer = 2 };

// A row's gradient is multiplied by weight * (upstream gradient / weight_sum). The product is 0 where the
// weight is 0, even if the upstream gradient is not finite.
struct RowFactor {
  const float* grad;        // upstream gradient; that of row n is at n * stride
  int64_t stride;           // 0: one number for all rows
  const float* weight;      // [N]; null: 1
  const float* weight_sum;  // [1] divisor of a mean, where 0 counts as 1; null: 1
};

// The upstream gradient of each row's entropy, and the entropy itself. The gradient of the entropy is added
// to that of the loss (docs/design.md, The entropy). It is 0 where RowFactor::weight is 0.
struct EntropyGrad {
  const float* grad;  // null: no gradient of an entropy; that of row n is at n * stride
  int64_t stride;
  const float* entropy;  // [N]
};

struct GradArgs {
  Rows logits;
  Rows grad;  // may be the same memory as logits
  RowMath math;
  const int64_t* target;    // [N]
  const float* normalizer;  // [N, kNormalizer]
  RowFactor factor;         // 0: the row gets stored zeros and is not read
  // [N] or null. Where it equals the row's factor, `grad` already holds the gradient: the row is neither read
  // nor written.
  const float* stored;
  const float* scale = nullptr;  // [N] or null: the logit_scale of each row
  EntropyGrad entropy = {};      // neither this nor a scale goes with a softcap, smoothing or z-loss
};

// Loss and gradient of each row from one read of it. Needs the whole vocabulary on this device.
struct StatsGradArgs {
  GradArgs grad;        // grad.normalizer is the normalizer below; it is written before it is read
  const float* weight;  // [N] 0: the row is not read, its gradient is zeros
  float* loss;          // [N]: weight * loss
  float* normalizer;    // [N, kNormalizer]
};

// Multiplies each row of a stored gradient by factor / stored.
struct RescaleArgs {
  Rows grad;
  RowFactor factor;     // the real factor; 0: the row gets stored zeros. Padding keeps its zeros
  const float* stored;  // [N] the factor that the gradient has; where it equals the real one, nothing is done
};

struct TargetsArgs {
  const int64_t* labels;      // [batch, seq], any strides (in elements)
  const float* mask;          // [batch, seq], any strides; null: all ones
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
  const float* stats;  // [ranks, N, statistics]; consecutive ranks are rank_stride apart
  int64_t ranks, rows, statistics, rank_stride;
  const int64_t* target;  // [N]
  const float* weight;    // [N]
  RowMath math;
  float* loss;        // [N]: weight * loss
  float* normalizer;  // [N, kNormalizer]; 0 where the weight is 0, NaN where the label is out of range
  const float* scale = nullptr;  // [N] or null: the logit_scale of each row
};

// The sum of N losses, or their mean.
struct ReduceArgs {
  const float* loss;  // [N]
  int64_t rows;
  const float* weight_sum;  // [1] divisor of the mean, where 0 counts as 1; null: the sum
  float* result;            // [1]
};

// The order of REDUCTIONS in fused_sft_loss/backends/contract.py.
enum class Reduction : int { mean = 0, sum = 1, none = 2 };

// A whole forward pass. Needs the whole vocabulary on this device.
struct LossArgs {
  TargetsArgs targets;
  Rows logits;
  RowMath math;
  float* normalizer;  // [N, kNormalizer]
  Reduction reduction;
  float* result;  // [1]; without a reduction [N], the losses of MergeArgs
};

}  // namespace fsl
