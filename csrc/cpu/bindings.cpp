// The Python module _cpu. fused_sft_loss/backends/cpu.py calls it with addresses and numbers.
#include <pybind11/stl.h>

#include "../bindings.h"
#include "backend.h"

namespace py = pybind11;
using namespace fsl;

namespace {

int at_least_one(int threads) { return threads < 1 ? 1 : threads; }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU row kernels of fused_sft_loss";
  using released = py::call_guard<py::gil_scoped_release>;
  m.def("row_targets", &cpu::row_targets,
        "Write target and weight of each row and their sums; return the faults of enum Fault.",
        py::arg("targets"));
  m.def(
      "row_stats",
      [](const Tensor3& logits, const RowMath& math, uintptr_t target, uintptr_t weight, int statistics,
         uintptr_t stats, uintptr_t scale, int threads) {
        cpu::row_stats(stats_args(logits, math, target, weight, statistics, stats, scale),
                       at_least_one(threads));
      },
      "Write the statistics of each row of this shard.", py::arg("logits"), py::arg("math"),
      py::arg("target"), py::arg("weight"), py::arg("statistics"), py::arg("stats"), py::arg("scale"),
      py::arg("threads"), released());
  m.def(
      "merge",
      [](const Gathered& gathered, const RowMath& math, uintptr_t target, uintptr_t weight, uintptr_t loss,
         uintptr_t normalizer, uintptr_t scale) {
        cpu::merge(merge_args(gathered, math, target, weight, loss, normalizer, scale));
      },
      "Write weighted loss and normalizer of each row, from the statistics of all shards.",
      py::arg("gathered"), py::arg("math"), py::arg("target"), py::arg("weight"), py::arg("loss"),
      py::arg("normalizer"), py::arg("scale"));
  m.def(
      "reduce",
      [](uintptr_t loss, int64_t rows, uintptr_t weight_sum, uintptr_t result) {
        cpu::reduce(reduce_args(loss, rows, weight_sum, result));
      },
      "Write the sum of the losses, or their mean.", py::arg("loss"), py::arg("rows"), py::arg("weight_sum"),
      py::arg("result"));
  m.def(
      "loss",
      [](const TargetsArgs& targets, const Tensor3& logits, const RowMath& math, uintptr_t normalizer,
         int reduction, uintptr_t result, int threads) {
        return cpu::loss(loss_args(targets, logits, math, normalizer, reduction, result),
                         at_least_one(threads));
      },
      "Run a whole forward pass of a vocabulary in one shard; return the faults of enum Fault.",
      py::arg("targets"), py::arg("logits"), py::arg("math"), py::arg("normalizer"), py::arg("reduction"),
      py::arg("result"), py::arg("threads"), released());
  m.def(
      "row_grad",
      [](const Tensor3& logits, const Tensor3& grad, const RowMath& math, uintptr_t target,
         uintptr_t normalizer, const RowFactor& factor, uintptr_t stored, uintptr_t scale,
         const EntropyGrad& entropy, int threads) {
        cpu::row_grad(grad_args(logits, grad, math, target, normalizer, factor, stored, scale, entropy),
                      at_least_one(threads));
      },
      "Write the gradient of each row; it may overwrite the logits.", py::arg("logits"), py::arg("grad"),
      py::arg("math"), py::arg("target"), py::arg("normalizer"), py::arg("factor"), py::arg("stored"),
      py::arg("scale"), py::arg("entropy"), py::arg("threads"), released());
  m.def(
      "row_stats_grad",
      [](const Tensor3& logits, const Tensor3& grad, const RowMath& math, uintptr_t target, uintptr_t weight,
         const RowFactor& factor, uintptr_t loss, uintptr_t normalizer, int threads) {
        const GradArgs args = grad_args(logits, grad, math, target, normalizer, factor, 0, 0, {});
        cpu::row_stats_grad(stats_grad_args(args, weight, loss), at_least_one(threads));
      },
      "Write loss and gradient of each row, from one read of it.", py::arg("logits"), py::arg("grad"),
      py::arg("math"), py::arg("target"), py::arg("weight"), py::arg("factor"), py::arg("loss"),
      py::arg("normalizer"), py::arg("threads"), released());
  m.def(
      "row_rescale",
      [](const Tensor3& grad, const RowMath& math, const RowFactor& factor, uintptr_t stored, int threads) {
        cpu::row_rescale(rescale_args(grad, math, factor, stored), at_least_one(threads));
      },
      "Correct the rows of a gradient that were stored for another upstream gradient.", py::arg("grad"),
      py::arg("math"), py::arg("factor"), py::arg("stored"), py::arg("threads"), released());
#if defined(FSL_TEST_HOOKS)  // of builds in a checkout; no wheel has them
  m.def(
      "exp",
      [](uintptr_t in, uintptr_t out, int64_t n, float unit_log2) {
        cpu::exp(pointer<float>(in), pointer<float>(out), n, unit_log2);
      },
      "Write 2^(unit_log2 * x) of n numbers x, as the kernels compute it: for tests.");
  m.def("use_isa", &cpu::use_isa, "Choose one of isas(): for tests and measurements.");
#endif
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FSL_VERSION;
        info["compiler"] = FSL_COMPILER;
        info["isas"] = cpu::isas();
        info["isa"] = cpu::isa();
        info["threading"] = cpu::threading();
        return info;
      },
      "Return the version, the compiler, the instruction sets (fastest first), the one in use and the "
      "threading.");
}
