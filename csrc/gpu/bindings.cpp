// _cuda and _hip: addresses, numbers and a stream in, exceptions out. Who owns the memory, that it is large
// enough, and which device is current, is the caller's affair (fused_sft_loss/backends/gpu.py, its only
// caller).
#include "../bindings.h"
#include "launch.h"

namespace py = pybind11;
using namespace fsl;

PYBIND11_MODULE(FSL_MODULE, m) {
  m.doc() = "GPU row kernels of fused_sft_loss";
  bind_args(m);
  py::class_<gpu::Chip>(m, "Chip", py::module_local())
      .def(py::init([](int generation, int multiprocessors) -> gpu::Chip {
             return {generation, multiprocessors};
           }),
           py::kw_only(), py::arg("generation"), py::arg("multiprocessors"));
  m.def(
      "row_stats_parts",
      [](const StatsArgs& args, const gpu::Chip& chip) -> int64_t {
        const gpu::Shares shares = gpu::row_stats_shares(args, chip);
        return shares.splits > 1 ? args.logits.count() * shares.segments * static_cast<int>(args.want) : 0;
      },
      "fp32 numbers of scratch that row_stats needs.", py::arg("args"), py::kw_only(), py::arg("chip"));
  m.def(
      "row_stats",
      [](const StatsArgs& args, uintptr_t parts, const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_stats(args, pointer<float>(parts), chip, pointer<void>(stream));
      },
      py::arg("args"), py::kw_only(), py::arg("parts"), py::arg("chip"), py::arg("stream"));
  m.def(
      "row_grad",
      [](const GradArgs& args, const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_grad(args, chip, pointer<void>(stream));
      },
      py::arg("args"), py::kw_only(), py::arg("chip"), py::arg("stream"));
  m.def(
      "row_stats_grad",
      [](const StatsGradArgs& args, const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_stats_grad(args, chip, pointer<void>(stream));
      },
      py::arg("args"), py::kw_only(), py::arg("chip"), py::arg("stream"));
  m.def(
      "row_rescale",
      [](const RescaleArgs& args, const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_rescale(args, chip, pointer<void>(stream));
      },
      py::arg("args"), py::kw_only(), py::arg("chip"), py::arg("stream"));
  m.def(
      "row_targets",
      [](const TargetsArgs& args, uintptr_t stream) { gpu::row_targets(args, pointer<void>(stream)); },
      py::arg("args"), py::kw_only(), py::arg("stream"));
  m.def(
      "merge",
      [](const MergeArgs& args, uintptr_t lse, uintptr_t log_prob, uintptr_t correct, uintptr_t entropy,
         uintptr_t stream) {
        gpu::merge(args,
                   {pointer<float>(lse), pointer<float>(log_prob), pointer<uint8_t>(correct),
                    pointer<float>(entropy)},
                   pointer<void>(stream));
      },
      "Metrics of each row when lse, log_prob, correct and entropy are given, else (0) its weighted loss.",
      py::arg("args"), py::kw_only(), py::arg("lse"), py::arg("log_prob"), py::arg("correct"),
      py::arg("entropy"), py::arg("stream"));
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FSL_VERSION;
    info["toolkit"] = FSL_TOOLKIT;
    info["targets"] = FSL_TARGETS;
    return info;
  });
}
