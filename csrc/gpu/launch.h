// Launches the kernels on a stream (a cudaStream_t or hipStream_t). csrc/args.h describes their arguments. No
// function here waits for the device.
#pragma once

#include "../args.h"

namespace fsl::gpu {

// Further results of merge, for token_metrics. If they are given, merge does not weight the loss. For a loss
// all are null.
struct Metrics {
  float* lse;        // [N]
  float* log_prob;   // [N]
  uint8_t* correct;  // [N]: the target is the argmax
  float* entropy;    // [N]
};

// The properties of a device that the launch table uses.
struct Chip {
  int generation;  // compute capability 80, 90, 100; gfx 0x90a, 0x942, 0x950
  int multiprocessors;
};

// fp32 numbers in `parts` of row_stats: [N, segments, want] if a row has more than one block, else 0.
int64_t row_stats_parts(const StatsArgs& args, const Chip& chip);
void row_stats(const StatsArgs& args, float* parts, const Chip& chip, void* stream);
void row_grad(const GradArgs& args, const Chip& chip, void* stream);
// Whether row_stats_grad is faster than row_stats, merge and row_grad. If not, it cannot be called.
bool one_read_gains(const RowMath& math);
void row_stats_grad(const StatsGradArgs& args, const Chip& chip, void* stream);
void row_rescale(const RescaleArgs& args, const Chip& chip, void* stream);
void row_targets(const TargetsArgs& args, void* stream);
void merge(const MergeArgs& args, const Metrics& metrics, void* stream);
void reduce(const ReduceArgs& args, void* stream);

// loss() launches row_targets, row_stats, merge and, if it reduces, reduce. Its scratch holds loss_scratch()
// fp32 numbers.
int64_t loss_scratch(const Rows& logits, const RowMath& math, const Chip& chip);
void loss(const LossArgs& args, float* scratch, const Chip& chip, void* stream);

}  // namespace fsl::gpu
