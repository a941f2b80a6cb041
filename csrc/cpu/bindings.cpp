// _cpu: addresses and numbers in, exceptions out. Who owns the memory, and that it is large enough, is the
// caller's affair (fused_sft_loss/backends/native.py, its only caller).
#include <pybind11/stl.h>

#include "../bindings.h"
#include "backend.h"

namespace py = pybind11;
using fsl::pointer;

namespace {

int at_least_one(int threads) { return threads < 1 ? 1 : threads; }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU row kernels of fused_sft_loss";
  fsl::bind_args(m);
  using released = py::call_guard<py::gil_scoped_release>;
  m.def(
      "row_stats",
      [](const fsl::StatsArgs& args, int threads) { fsl::cpu::row_stats(args, at_least_one(threads)); },
      py::arg("args"), py::kw_only(), py::arg("threads"), released());
  m.def(
      "row_grad",
      [](const fsl::GradArgs& args, int threads) { fsl::cpu::row_grad(args, at_least_one(threads)); },
      py::arg("args"), py::kw_only(), py::arg("threads"), released());
  m.def(
      "row_stats_grad",
      [](const fsl::StatsGradArgs& args, int threads) {
        fsl::cpu::row_stats_grad(args, at_least_one(threads));
      },
      py::arg("args"), py::kw_only(), py::arg("threads"), released());
  m.def(
      "row_rescale",
      [](const fsl::RescaleArgs& args, int threads) { fsl::cpu::row_rescale(args, at_least_one(threads)); },
      py::arg("args"), py::kw_only(), py::arg("threads"), released());
  m.def("row_targets", &fsl::cpu::row_targets, py::arg("args"));
  m.def("merge", &fsl::cpu::merge, py::arg("args"));
  m.def("exp", [](uintptr_t in, uintptr_t out, int64_t n, float scale2) {
    fsl::cpu::exp(pointer<float>(in), pointer<float>(out), n, scale2);
  });
  m.def("isas", &fsl::cpu::isas, "Instruction sets this processor runs, fastest first.");
  m.def("isa", &fsl::cpu::isa, "The instruction set in use.");
  m.def("use_isa", &fsl::cpu::use_isa, "Choose one of isas(): for tests and measurements.");
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FSL_VERSION;
    info["compiler"] = FSL_COMPILER;
    info["isas"] = fsl::cpu::isas();
    info["isa"] = fsl::cpu::isa();
    info["threading"] = fsl::cpu::threading();
    return info;
  });
}
