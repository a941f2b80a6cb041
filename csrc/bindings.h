// What the Python modules of all backends share: csrc/args.h as classes, made of addresses and numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "args.h"

namespace fsl {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Rows rows(uintptr_t data, int dtype, int64_t batch, int64_t seq, int64_t columns, int64_t valid,
                 int64_t stride_b, int64_t stride_s) {
  if (dtype < 0 || dtype > 2)
    throw std::invalid_argument("expected dtype 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                                std::to_string(dtype));
  if (valid < 0 || valid > columns)
    throw std::invalid_argument("expected 0 <= valid <= columns, got " + std::to_string(valid) + " of " +
                                std::to_string(columns));
  return {pointer<void>(data), static_cast<Dtype>(dtype), batch, seq, columns, valid, stride_b, stride_s};
}

inline Want want(int columns) {
  if (columns != 3 && columns != 4 && columns != 6)
    throw std::invalid_argument("expected 3, 4 or 6 statistics, got " + std::to_string(columns));
  return static_cast<Want>(columns);
}

inline StatsArgs stats_args(const Rows& logits, float logit_scale, float softcap, uintptr_t target,
                            uintptr_t weight, int64_t vocab_start, int columns, uintptr_t stats) {
  return {logits,      {logit_scale, softcap}, pointer<int64_t>(target), pointer<float>(weight),
          vocab_start, want(columns),          pointer<float>(stats)};
}

inline GradArgs grad_args(const Rows& logits, const Rows& grad, float logit_scale, float softcap,
                          uintptr_t target, uintptr_t normalizer, uintptr_t scale, int64_t vocab_start,
                          float label_smoothing, float z_loss, int64_t vocab_size, uintptr_t stored) {
  return {logits,
          grad,
          {logit_scale, softcap},
          pointer<int64_t>(target),
          pointer<float>(normalizer),
          pointer<float>(scale),
          vocab_start,
          label_smoothing,
          z_loss,
          vocab_size,
          pointer<float>(stored)};
}

inline StatsGradArgs stats_grad_args(const GradArgs& grad, uintptr_t weight, uintptr_t loss,
                                     uintptr_t normalizer) {
  return {grad, pointer<float>(weight), pointer<float>(loss), pointer<float>(normalizer)};
}

inline RescaleArgs rescale_args(const Rows& grad, uintptr_t scale, uintptr_t stored) {
  return {grad, pointer<float>(scale), pointer<float>(stored)};
}

inline TargetsArgs targets_args(uintptr_t labels, uintptr_t mask, uintptr_t cu_seqlens, int64_t batch,
                                int64_t seq, int64_t boundaries, int64_t label_stride_b,
                                int64_t label_stride_s, int64_t mask_stride_b, int64_t mask_stride_s,
                                bool shift, int64_t ignore_index, int64_t vocab_size, uintptr_t target,
                                uintptr_t weight, uintptr_t count, uintptr_t weight_sum) {
  return {pointer<int64_t>(labels),
          pointer<float>(mask),
          pointer<int64_t>(cu_seqlens),
          batch,
          seq,
          boundaries,
          label_stride_b,
          label_stride_s,
          mask_stride_b,
          mask_stride_s,
          shift,
          ignore_index,
          vocab_size,
          pointer<int64_t>(target),
          pointer<float>(weight),
          pointer<int32_t>(count),
          pointer<float>(weight_sum)};
}

inline MergeArgs merge_args(uintptr_t stats, int64_t ranks, int64_t rows, int64_t columns,
                            int64_t rank_stride, uintptr_t target, uintptr_t weight, float unit,
                            float label_smoothing, float z_loss, int64_t vocab_size, uintptr_t loss,
                            uintptr_t normalizer) {
  return {pointer<float>(stats),
          ranks,
          rows,
          columns,
          rank_stride,
          pointer<int64_t>(target),
          pointer<float>(weight),
          unit,
          label_smoothing,
          z_loss,
          vocab_size,
          pointer<float>(loss),
          pointer<float>(normalizer)};
}

// Local to the module: each backend's module has classes of its own.
inline void bind_args(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init(&rows), py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("batch"),
           py::arg("seq"), py::arg("columns"), py::arg("valid"), py::arg("stride_b"), py::arg("stride_s"));
  py::class_<StatsArgs>(m, "StatsArgs", py::module_local())
      .def(py::init(&stats_args), py::kw_only(), py::arg("logits"), py::arg("logit_scale"),
           py::arg("softcap"), py::arg("target"), py::arg("weight"), py::arg("vocab_start"),
           py::arg("columns"), py::arg("stats"));
  py::class_<GradArgs>(m, "GradArgs", py::module_local())
      .def(py::init(&grad_args), py::kw_only(), py::arg("logits"), py::arg("grad"), py::arg("logit_scale"),
           py::arg("softcap"), py::arg("target"), py::arg("normalizer"), py::arg("scale"),
           py::arg("vocab_start"), py::arg("label_smoothing"), py::arg("z_loss"), py::arg("vocab_size"),
           py::arg("stored"));
  py::class_<StatsGradArgs>(m, "StatsGradArgs", py::module_local())
      .def(py::init(&stats_grad_args), py::kw_only(), py::arg("grad"), py::arg("weight"), py::arg("loss"),
           py::arg("normalizer"));
  py::class_<RescaleArgs>(m, "RescaleArgs", py::module_local())
      .def(py::init(&rescale_args), py::kw_only(), py::arg("grad"), py::arg("scale"), py::arg("stored"));
  py::class_<TargetsArgs>(m, "TargetsArgs", py::module_local())
      .def(py::init(&targets_args), py::kw_only(), py::arg("labels"), py::arg("mask"), py::arg("cu_seqlens"),
           py::arg("batch"), py::arg("seq"), py::arg("boundaries"), py::arg("label_stride_b"),
           py::arg("label_stride_s"), py::arg("mask_stride_b"), py::arg("mask_stride_s"), py::arg("shift"),
           py::arg("ignore_index"), py::arg("vocab_size"), py::arg("target"), py::arg("weight"),
           py::arg("count"), py::arg("weight_sum"));
  py::class_<MergeArgs>(m, "MergeArgs", py::module_local())
      .def(py::init(&merge_args), py::kw_only(), py::arg("stats"), py::arg("ranks"), py::arg("rows"),
           py::arg("columns"), py::arg("rank_stride"), py::arg("target"), py::arg("weight"), py::arg("unit"),
           py::arg("label_smoothing"), py::arg("z_loss"), py::arg("vocab_size"), py::arg("loss"),
           py::arg("normalizer"));
}

}  // namespace fsl
