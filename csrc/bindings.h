// Converts what Python passes into the structs of args.h, for the modules of all backends.
//
// Python passes a struct as a tuple of its fields, in order, and an address as an int, 0 for null. The caller
// owns the memory and must make it large enough.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "args.h"

namespace fsl {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Field>
Field field(pybind11::handle tuple, Py_ssize_t at) {
  const pybind11::handle item = PyTuple_GET_ITEM(tuple.ptr(), at);
  if constexpr (std::is_pointer_v<Field>) return reinterpret_cast<Field>(item.cast<uintptr_t>());
  else if constexpr (std::is_enum_v<Field>) return static_cast<Field>(item.cast<int>());
  else return item.cast<Field>();
}

// Builds a T, whose fields have the types `Fields`, from a tuple of the same length.
template <class T, class... Fields, size_t... at>
T from_tuple(pybind11::handle tuple, std::index_sequence<at...>) {
  return T{field<Fields>(tuple, at)...};
}

template <class T, class... Fields>
struct TupleCaster {
  PYBIND11_TYPE_CASTER(T, pybind11::detail::const_name("tuple"));

  bool load(pybind11::handle given, bool) {
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != sizeof...(Fields)) return false;
    value = from_tuple<T, Fields...>(given, std::index_sequence_for<Fields...>());
    return true;
  }
};

// Rows without `valid`, which follows from RowMath.
struct Tensor3 {
  void* data;
  int dtype;
  int64_t batch, seq, columns, stride_b, stride_s;

  Rows rows(const RowMath& math) const {
    if (dtype < 0 || dtype > 2)
      throw std::invalid_argument("expected dtype 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                                  std::to_string(dtype));
    return {data,    static_cast<Dtype>(dtype),   batch,    seq,
            columns, math.valid_columns(columns), stride_b, stride_s};
  }
};

// Statistics of all shards, [ranks, rows, statistics]. Consecutive ranks are rank_stride apart.
struct Gathered {
  const float* stats;
  int64_t ranks, rows, statistics, rank_stride;
};

inline Want want(int statistics) {
  if (statistics != 3 && statistics != 4 && statistics != 6)
    throw std::invalid_argument("expected 3, 4 or 6 statistics, got " + std::to_string(statistics));
  return static_cast<Want>(statistics);
}

inline StatsArgs stats_args(const Tensor3& logits, const RowMath& math, uintptr_t target, uintptr_t weight,
                            int statistics, uintptr_t stats) {
  return {logits.rows(math),    math, pointer<int64_t>(target), pointer<float>(weight), want(statistics),
          pointer<float>(stats)};
}

inline MergeArgs merge_args(const Gathered& gathered, const RowMath& math, uintptr_t target, uintptr_t weight,
                            uintptr_t loss, uintptr_t normalizer) {
  return {gathered.stats,         gathered.ranks,
          gathered.rows,          gathered.statistics,
          gathered.rank_stride,   pointer<int64_t>(target),
          pointer<float>(weight), math,
          pointer<float>(loss),   pointer<float>(normalizer)};
}

inline ReduceArgs reduce_args(uintptr_t loss, int64_t rows, uintptr_t weight_sum, uintptr_t result) {
  return {pointer<float>(loss), rows, pointer<float>(weight_sum), pointer<float>(result)};
}

inline LossArgs loss_args(const TargetsArgs& targets, const Tensor3& logits, const RowMath& math,
                          uintptr_t normalizer, int reduction, uintptr_t result) {
  if (reduction < 0 || reduction > 2)
    throw std::invalid_argument("expected reduction 0, 1 or 2, got " + std::to_string(reduction));
  return {targets,
          logits.rows(math),
          math,
          pointer<float>(normalizer),
          static_cast<Reduction>(reduction),
          pointer<float>(result)};
}

inline GradArgs grad_args(const Tensor3& logits, const Tensor3& grad, const RowMath& math, uintptr_t target,
                          uintptr_t normalizer, const RowFactor& factor, uintptr_t stored) {
  return {logits.rows(math),
          grad.rows(math),
          math,
          pointer<int64_t>(target),
          pointer<float>(normalizer),
          factor,
          pointer<float>(stored)};
}

inline StatsGradArgs stats_grad_args(const GradArgs& grad, uintptr_t weight, uintptr_t loss) {
  return {grad, pointer<float>(weight), pointer<float>(loss), const_cast<float*>(grad.normalizer)};
}

inline RescaleArgs rescale_args(const Tensor3& grad, const RowMath& math, const RowFactor& factor,
                                uintptr_t stored) {
  return {grad.rows(math), factor, pointer<float>(stored)};
}

}  // namespace fsl

namespace pybind11::detail {

template <>
struct type_caster<fsl::RowMath>
    : fsl::TupleCaster<fsl::RowMath, float, float, float, float, int64_t, int64_t> {};

template <>
struct type_caster<fsl::Tensor3>
    : fsl::TupleCaster<fsl::Tensor3, void*, int, int64_t, int64_t, int64_t, int64_t, int64_t> {};

template <>
struct type_caster<fsl::Gathered>
    : fsl::TupleCaster<fsl::Gathered, const float*, int64_t, int64_t, int64_t, int64_t> {};

template <>
struct type_caster<fsl::RowFactor>
    : fsl::TupleCaster<fsl::RowFactor, const float*, int64_t, const float*, const float*> {};

template <>
struct type_caster<fsl::TargetsArgs>
    : fsl::TupleCaster<fsl::TargetsArgs, const int64_t*, const float*, const int64_t*, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, int64_t, bool, int64_t, int64_t, int64_t*, float*,
                       int32_t*, float*> {};

}  // namespace pybind11::detail
