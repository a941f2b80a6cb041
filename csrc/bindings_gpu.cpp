// _cuda and _hip: addresses, numbers and a stream in, exceptions out. Who owns the memory, that it is large
// enough, and which device is current, is the caller's affair (fused_sft_loss/backends/gpu.py, its only
// caller).
#include "bindings.h"
#include "gpu_launch.h"

namespace py = pybind11;
using namespace fsl;

namespace {

gpu::Chip chip(int generation, int multiprocessors) { return {generation, multiprocessors}; }

StatsArgs stats_args(const Rows& logits, float logit_scale, float softcap, uintptr_t target, uintptr_t weight,
                     int64_t vocab_start, int columns, uintptr_t stats) {
  return {logits,      {logit_scale, softcap}, pointer<int64_t>(target), pointer<float>(weight),
          vocab_start, want(columns),          pointer<float>(stats)};
}

}  // namespace

PYBIND11_MODULE(FSL_MODULE, m) {
  m.doc() = "GPU row kernels of fused_sft_loss";
  bind_rows(m);
  py::class_<gpu::Chip>(m, "Chip", py::module_local())
      .def(py::init(&chip), py::kw_only(), py::arg("generation"), py::arg("multiprocessors"));
  m.def(
      "row_stats_parts",
      [](const Rows& logits, int columns, const gpu::Chip& chip) -> int64_t {
        StatsArgs args{};
        args.logits = logits;
        const gpu::Shares shares = gpu::row_stats_shares(args, chip);
        return shares.splits > 1 ? logits.count() * shares.segments * columns : 0;
      },
      "fp32 numbers of scratch that row_stats needs.", py::kw_only(), py::arg("logits"), py::arg("columns"),
      py::arg("chip"));
  m.def(
      "row_stats",
      [](const Rows& logits, float logit_scale, float softcap, uintptr_t target, uintptr_t weight,
         int64_t vocab_start, int columns, uintptr_t stats, uintptr_t parts, const gpu::Chip& chip,
         uintptr_t stream) {
        gpu::row_stats(stats_args(logits, logit_scale, softcap, target, weight, vocab_start, columns, stats),
                       pointer<float>(parts), chip, pointer<void>(stream));
      },
      py::kw_only(), py::arg("logits"), py::arg("logit_scale"), py::arg("softcap"), py::arg("target"),
      py::arg("weight"), py::arg("vocab_start"), py::arg("columns"), py::arg("stats"), py::arg("parts"),
      py::arg("chip"), py::arg("stream"));
  m.def(
      "row_grad",
      [](const Rows& logits, const Rows& grad, float logit_scale, float softcap, uintptr_t target,
         uintptr_t lse, uintptr_t scale, int64_t vocab_start, float label_smoothing, float z_loss,
         int64_t vocab_size, const gpu::Chip& chip, uintptr_t stream) {
        gpu::row_grad({logits,
                       grad,
                       {logit_scale, softcap},
                       pointer<int64_t>(target),
                       pointer<float>(lse),
                       pointer<float>(scale),
                       vocab_start,
                       label_smoothing,
                       z_loss,
                       vocab_size},
                      chip, pointer<void>(stream));
      },
      py::kw_only(), py::arg("logits"), py::arg("grad"), py::arg("logit_scale"), py::arg("softcap"),
      py::arg("target"), py::arg("lse"), py::arg("scale"), py::arg("vocab_start"), py::arg("label_smoothing"),
      py::arg("z_loss"), py::arg("vocab_size"), py::arg("chip"), py::arg("stream"));
  m.def(
      "row_targets",
      [](uintptr_t labels, uintptr_t mask, uintptr_t cu_seqlens, int64_t batch, int64_t seq,
         int64_t boundaries, int64_t label_stride_b, int64_t label_stride_s, int64_t mask_stride_b,
         int64_t mask_stride_s, bool shift, int64_t ignore_index, int64_t vocab_size, uintptr_t target,
         uintptr_t weight, uintptr_t count, uintptr_t weight_sum, uintptr_t stream) {
        gpu::row_targets({pointer<int64_t>(labels), pointer<float>(mask), pointer<int64_t>(cu_seqlens), batch,
                          seq, boundaries, label_stride_b, label_stride_s, mask_stride_b, mask_stride_s,
                          shift, ignore_index, vocab_size, pointer<int64_t>(target), pointer<float>(weight),
                          pointer<int32_t>(count), pointer<float>(weight_sum)},
                         pointer<void>(stream));
      },
      py::kw_only(), py::arg("labels"), py::arg("mask"), py::arg("cu_seqlens"), py::arg("batch"),
      py::arg("seq"), py::arg("boundaries"), py::arg("label_stride_b"), py::arg("label_stride_s"),
      py::arg("mask_stride_b"), py::arg("mask_stride_s"), py::arg("shift"), py::arg("ignore_index"),
      py::arg("vocab_size"), py::arg("target"), py::arg("weight"), py::arg("count"), py::arg("weight_sum"),
      py::arg("stream"));
  m.def(
      "merge",
      [](uintptr_t stats, int64_t ranks, int64_t rows, int64_t columns, int64_t rank_stride, uintptr_t target,
         uintptr_t weight, float label_smoothing, float z_loss, int64_t vocab_size, uintptr_t loss,
         uintptr_t lse, uintptr_t log_prob, uintptr_t correct, uintptr_t entropy, uintptr_t stream) {
        gpu::merge({pointer<float>(stats), ranks, rows, columns, rank_stride, pointer<int64_t>(target),
                    pointer<float>(weight), label_smoothing, z_loss, vocab_size, pointer<float>(loss),
                    pointer<float>(lse)},
                   {pointer<float>(log_prob), pointer<uint8_t>(correct), pointer<float>(entropy)},
                   pointer<void>(stream));
      },
      "Metrics of each row when log_prob, correct and entropy are given, else (0) its weighted loss.",
      py::kw_only(), py::arg("stats"), py::arg("ranks"), py::arg("rows"), py::arg("columns"),
      py::arg("rank_stride"), py::arg("target"), py::arg("weight"), py::arg("label_smoothing"),
      py::arg("z_loss"), py::arg("vocab_size"), py::arg("loss"), py::arg("lse"), py::arg("log_prob"),
      py::arg("correct"), py::arg("entropy"), py::arg("stream"));
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FSL_VERSION;
    info["toolkit"] = FSL_TOOLKIT;
    info["targets"] = FSL_TARGETS;
    return info;
  });
}
