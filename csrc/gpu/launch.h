// The GPU backends: what csrc/args.h describes, launched on a stream (a cudaStream_t or hipStream_t). Nothing
// here waits for the device.
#pragma once

#include "../args.h"

namespace fsl::gpu {

// What token_metrics gets beside the loss, which is then not weighted; all null in a loss's merge.
struct Metrics {
  float* lse;        // [N]
  float* log_prob;   // [N]
  uint8_t* correct;  // [N]: the target is the argmax
  float* entropy;    // [N]
};

// What launch policy knows of a device.
struct Chip {
  int generation;  // compute capability 80, 90, 100; gfx 0x90a, 0x942, 0x950
  int multiprocessors;
};

// Into how many segments a row is cut, and how many blocks share them: launch policy, for the caller who
// provides the memory between them.
struct SegmentPlan {
  int64_t segments;
  int blocks;
};
SegmentPlan plan_segments(const StatsArgs& args, const Chip& chip);

// `parts`: [N, segments, want] fp32, when there is more than one split; null otherwise.
void row_stats(const StatsArgs& args, float* parts, const Chip& chip, void* stream);
void row_grad(const GradArgs& args, const Chip& chip, void* stream);
void row_stats_grad(const StatsGradArgs& args, const Chip& chip, void* stream);
void row_rescale(const RescaleArgs& args, const Chip& chip, void* stream);
void row_targets(const TargetsArgs& args, void* stream);
void merge(const MergeArgs& args, const Metrics& metrics, void* stream);
void reduce(const ReduceArgs& args, void* stream);

// row_targets, row_stats, merge and reduce, with so many fp32 numbers of scratch.
int64_t loss_scratch(const Rows& logits, const RowMath& math, const Chip& chip);
void loss(const LossArgs& args, float* scratch, const Chip& chip, void* stream);

}  // namespace fsl::gpu
