// _cpu: addresses and numbers in, exceptions out. Who owns the memory, and that it is large enough, is the
// caller's affair (fused_sft_loss/backends/native.py, its only caller).
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu.h"

namespace py = pybind11;
using fsl::pointer;

namespace {

int at_least_one(int threads) { return threads < 1 ? 1 : threads; }

void row_stats(const fsl::Rows& logits, float logit_scale, float softcap, uintptr_t target, uintptr_t weight,
               int64_t vocab_start, int columns, uintptr_t stats, int threads) {
  const fsl::StatsArgs args{
      logits,      {logit_scale, softcap}, pointer<int64_t>(target), pointer<float>(weight),
      vocab_start, fsl::want(columns),     pointer<float>(stats)};
  py::gil_scoped_release unlocked;
  fsl::cpu::row_stats(args, at_least_one(threads));
}

void row_grad(const fsl::Rows& logits, const fsl::Rows& grad, float logit_scale, float softcap,
              uintptr_t target, uintptr_t lse, uintptr_t scale, int64_t vocab_start, float label_smoothing,
              float z_loss, int64_t vocab_size, int threads) {
  const fsl::GradArgs args{logits,
                           grad,
                           {logit_scale, softcap},
                           pointer<int64_t>(target),
                           pointer<float>(lse),
                           pointer<float>(scale),
                           vocab_start,
                           label_smoothing,
                           z_loss,
                           vocab_size};
  py::gil_scoped_release unlocked;
  fsl::cpu::row_grad(args, at_least_one(threads));
}

void row_targets(uintptr_t labels, uintptr_t mask, uintptr_t cu_seqlens, int64_t batch, int64_t seq,
                 int64_t boundaries, int64_t label_stride_b, int64_t label_stride_s, int64_t mask_stride_b,
                 int64_t mask_stride_s, bool shift, int64_t ignore_index, int64_t vocab_size,
                 uintptr_t target, uintptr_t weight, uintptr_t count, uintptr_t weight_sum) {
  fsl::cpu::row_targets({pointer<int64_t>(labels), pointer<float>(mask), pointer<int64_t>(cu_seqlens), batch,
                         seq, boundaries, label_stride_b, label_stride_s, mask_stride_b, mask_stride_s, shift,
                         ignore_index, vocab_size, pointer<int64_t>(target), pointer<float>(weight),
                         pointer<int32_t>(count), pointer<float>(weight_sum)});
}

void merge(uintptr_t stats, int64_t ranks, int64_t rows, int64_t columns, int64_t rank_stride,
           uintptr_t target, uintptr_t weight, float label_smoothing, float z_loss, int64_t vocab_size,
           uintptr_t loss, uintptr_t lse) {
  fsl::cpu::merge({pointer<float>(stats), ranks, rows, columns, rank_stride, pointer<int64_t>(target),
                   pointer<float>(weight), label_smoothing, z_loss, vocab_size, pointer<float>(loss),
                   pointer<float>(lse)});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU row kernels of fused_sft_loss";
  fsl::bind_rows(m);
  m.def("row_stats", &row_stats, py::kw_only(), py::arg("logits"), py::arg("logit_scale"), py::arg("softcap"),
        py::arg("target"), py::arg("weight"), py::arg("vocab_start"), py::arg("columns"), py::arg("stats"),
        py::arg("threads"));
  m.def("row_grad", &row_grad, py::kw_only(), py::arg("logits"), py::arg("grad"), py::arg("logit_scale"),
        py::arg("softcap"), py::arg("target"), py::arg("lse"), py::arg("scale"), py::arg("vocab_start"),
        py::arg("label_smoothing"), py::arg("z_loss"), py::arg("vocab_size"), py::arg("threads"));
  m.def("row_targets", &row_targets, py::kw_only(), py::arg("labels"), py::arg("mask"), py::arg("cu_seqlens"),
        py::arg("batch"), py::arg("seq"), py::arg("boundaries"), py::arg("label_stride_b"),
        py::arg("label_stride_s"), py::arg("mask_stride_b"), py::arg("mask_stride_s"), py::arg("shift"),
        py::arg("ignore_index"), py::arg("vocab_size"), py::arg("target"), py::arg("weight"),
        py::arg("count"), py::arg("weight_sum"));
  m.def("merge", &merge, py::kw_only(), py::arg("stats"), py::arg("ranks"), py::arg("rows"),
        py::arg("columns"), py::arg("rank_stride"), py::arg("target"), py::arg("weight"),
        py::arg("label_smoothing"), py::arg("z_loss"), py::arg("vocab_size"), py::arg("loss"),
        py::arg("lse"));
  m.def("exp", [](uintptr_t in, uintptr_t out, int64_t n) {
    fsl::cpu::exp(pointer<float>(in), pointer<float>(out), n);
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
