// The Python modules _cuda and _hip. fused_sft_loss/backends/gpu.py calls them with addresses, numbers and a
// stream, after it has made the right device the current one.
#include "../bindings.h"
#include "launch.h"
#include "launch_table.h"

namespace py = pybind11;
using namespace fsl;

namespace pybind11::detail {

template <>
struct type_caster<fsl::gpu::Chip> : fsl::TupleCaster<fsl::gpu::Chip> {};

}  // namespace pybind11::detail

#if defined(FSL_TEST_HOOKS)
static gpu::Kernel kernel_named(const std::string& name) {
  for (const auto& [known, kernel] : {std::pair{"row_stats", gpu::Kernel::row_stats},
                                      {"row_grad", gpu::Kernel::row_grad},
                                      {"row_stats_grad", gpu::Kernel::row_stats_grad}})
    if (name == known) return kernel;
  throw std::invalid_argument("expected row_stats, row_grad or row_stats_grad, got " + name);
}
#endif

PYBIND11_MODULE(FSL_MODULE, m) {
  m.doc() = "GPU row kernels of fused_sft_loss";
  m.def(
      "row_targets",
      [](const TargetsArgs& targets, uintptr_t stream) { gpu::row_targets(targets, pointer<void>(stream)); },
      "Write target and weight of each row, the number of scored rows and the sum of weights.",
      py::arg("targets"), py::arg("stream"));
  m.def(
      "row_stats_parts",
      [](const Tensor3& logits, const RowMath& math, int statistics, const gpu::Chip& chip) -> int64_t {
        return gpu::row_stats_parts(stats_args(logits, math, 0, 0, statistics, 0, 0), chip);
      },
      "Return how many fp32 numbers of scratch row_stats needs.", py::arg("logits"), py::arg("math"),
      py::arg("statistics"), py::arg("chip"));
  m.def(
      "row_stats",
      [](const Tensor3& logits, const RowMath& math, uintptr_t target, uintptr_t weight, int statistics,
         uintptr_t stats, uintptr_t parts, uintptr_t scale, const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_stats(stats_args(logits, math, target, weight, statistics, stats, scale),
                       pointer<float>(parts), chip, pointer<void>(stream));
      },
      "Write the statistics of each row of this shard.", py::arg("logits"), py::arg("math"),
      py::arg("target"), py::arg("weight"), py::arg("statistics"), py::arg("stats"), py::arg("parts"),
      py::arg("scale"), py::arg("chip"), py::arg("stream"));
  m.def(
      "merge",
      [](const Gathered& gathered, const RowMath& math, uintptr_t target, uintptr_t weight, uintptr_t loss,
         uintptr_t normalizer, uintptr_t lse, uintptr_t log_prob, uintptr_t correct, uintptr_t entropy,
         uintptr_t scale, uintptr_t stream) {
        gpu::merge(merge_args(gathered, math, target, weight, loss, normalizer, scale),
                   {pointer<float>(lse), pointer<float>(log_prob), pointer<uint8_t>(correct),
                    pointer<float>(entropy)},
                   pointer<void>(stream));
      },
      "Write weighted loss and normalizer of each row; or, if lse, log_prob, correct and entropy are not 0, "
      "its "
      "unweighted loss, normalizer and metrics.",
      py::arg("gathered"), py::arg("math"), py::arg("target"), py::arg("weight"), py::arg("loss"),
      py::arg("normalizer"), py::arg("lse"), py::arg("log_prob"), py::arg("correct"), py::arg("entropy"),
      py::arg("scale"), py::arg("stream"));
  m.def(
      "reduce",
      [](uintptr_t loss, int64_t rows, uintptr_t weight_sum, uintptr_t result, uintptr_t stream) {
        gpu::reduce(reduce_args(loss, rows, weight_sum, result), pointer<void>(stream));
      },
      "Write the sum of the losses, or their mean.", py::arg("loss"), py::arg("rows"), py::arg("weight_sum"),
      py::arg("result"), py::arg("stream"));
  m.def(
      "loss_scratch",
      [](const Tensor3& logits, const RowMath& math, const gpu::Chip& chip) -> int64_t {
        return gpu::loss_scratch(logits.rows(math), math, chip);
      },
      "Return how many fp32 numbers of scratch loss needs.", py::arg("logits"), py::arg("math"),
      py::arg("chip"));
  m.def(
      "loss",
      [](const TargetsArgs& targets, const Tensor3& logits, const RowMath& math, uintptr_t normalizer,
         int reduction, uintptr_t result, uintptr_t scratch, const gpu::Chip& chip, uintptr_t stream) {
        gpu::loss(loss_args(targets, logits, math, normalizer, reduction, result), pointer<float>(scratch),
                  chip, pointer<void>(stream));
      },
      "Run a whole forward pass of a vocabulary in one shard.", py::arg("targets"), py::arg("logits"),
      py::arg("math"), py::arg("normalizer"), py::arg("reduction"), py::arg("result"), py::arg("scratch"),
      py::arg("chip"), py::arg("stream"));
  m.def(
      "row_grad",
      [](const Tensor3& logits, const Tensor3& grad, const RowMath& math, uintptr_t target,
         uintptr_t normalizer, const RowFactor& factor, uintptr_t stored, uintptr_t scale,
         const EntropyGrad& entropy, const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_grad(grad_args(logits, grad, math, target, normalizer, factor, stored, scale, entropy), chip,
                      pointer<void>(stream));
      },
      "Write the gradient of each row; it may overwrite the logits.", py::arg("logits"), py::arg("grad"),
      py::arg("math"), py::arg("target"), py::arg("normalizer"), py::arg("factor"), py::arg("stored"),
      py::arg("scale"), py::arg("entropy"), py::arg("chip"), py::arg("stream"));
  m.def(
      "one_read_gains", [](const RowMath& math) { return gpu::one_read_gains(math); },
      "Return whether row_stats_grad is faster than row_stats, merge and row_grad; if not, it raises an "
      "error.",
      py::arg("math"));
  m.def(
      "row_stats_grad",
      [](const Tensor3& logits, const Tensor3& grad, const RowMath& math, uintptr_t target, uintptr_t weight,
         const RowFactor& factor, uintptr_t loss, uintptr_t normalizer, const gpu::Chip& chip,
         uintptr_t stream) {
        const GradArgs args = grad_args(logits, grad, math, target, normalizer, factor, 0, 0, {});
        gpu::row_stats_grad(stats_grad_args(args, weight, loss), chip, pointer<void>(stream));
      },
      "Write loss and gradient of each row, from one read of it.", py::arg("logits"), py::arg("grad"),
      py::arg("math"), py::arg("target"), py::arg("weight"), py::arg("factor"), py::arg("loss"),
      py::arg("normalizer"), py::arg("chip"), py::arg("stream"));
  m.def(
      "row_rescale",
      [](const Tensor3& grad, const RowMath& math, const RowFactor& factor, uintptr_t stored,
         const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_rescale(rescale_args(grad, math, factor, stored), chip, pointer<void>(stream));
      },
      "Correct the rows of a gradient that were stored for another upstream gradient.", py::arg("grad"),
      py::arg("math"), py::arg("factor"), py::arg("stored"), py::arg("chip"), py::arg("stream"));
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FSL_VERSION;
        info["toolkit"] = FSL_TOOLKIT;
        info["targets"] = FSL_TARGETS;
        return info;
      },
      "Return the version, the toolkit and the targets that it was compiled for.");
#if defined(FSL_TEST_HOOKS)  // of builds in a checkout; no wheel has them
  m.def(
      "launch_line",
      [](const std::string& kernel, int64_t columns, const gpu::Chip& chip) {
        const gpu::Line& line = gpu::line_for(chip, kernel_named(kernel), columns);
        return std::make_tuple(line.threads, line.segment, line.rounds);
      },
      "Return threads per block, segment and rounds of the launch table's line.", py::arg("kernel"),
      py::arg("columns"), py::arg("chip"));
  m.def(
      "try_line",
      [](const std::string& kernel, int threads, int segment, int rounds) {
        if (threads % 64 || threads > 1024 || (threads && segment % (32 * threads)))
          throw std::invalid_argument(
              "expected 64 to 1024 threads in whole waves and a segment of whole tiles of " +
              std::to_string(32 * threads) + " columns, got " + std::to_string(threads) + " threads and " +
              std::to_string(segment));
        gpu::tried_line(kernel_named(kernel)) = {0, 0, 0, threads, segment, rounds, "tried"};
      },
      "Launch a kernel with this line in place of the launch table's; 0 threads: with the table's again.",
      py::arg("kernel"), py::arg("threads"), py::arg("segment"), py::arg("rounds"));
#endif
}
