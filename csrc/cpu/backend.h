// The CPU backend. Threads share the rows, and the vocabulary too when there are few rows.
#pragma once

#include <string>
#include <vector>

#include "../args.h"

namespace fsl::cpu {

// The numbers of one row, given the logit_scale of each row, or null.
inline RowMath of_row(RowMath math, const float* scale, int64_t row) {
  if (scale) math.logit_scale = scale[row];
  return math;
}

void row_stats(const StatsArgs& args, int threads);
void row_grad(const GradArgs& args, int threads);
void row_stats_grad(const StatsGradArgs& args, int threads);
void row_rescale(const RescaleArgs& args, int threads);

// Invalid input values. Python finds the value and raises.
enum Fault : int {
  kWeight = 1,
  kLabel = 2
};  // a weight below 0 or not finite; a label outside the vocabulary

int row_targets(const TargetsArgs& args);  // returns a sum of Faults
void merge(const MergeArgs& args);
void reduce(const ReduceArgs& args);
int loss(const LossArgs& args, int threads);  // returns a sum of Faults
void merge_row(const MergeArgs& args, int64_t row);
void exp(const float* in, float* out, int64_t n, float unit_log2);

std::vector<std::string> isas();       // those that this processor runs, fastest first
void use_isa(const std::string& isa);  // throws std::invalid_argument; for tests and measurements
std::string isa();
std::string threading();

}  // namespace fsl::cpu
