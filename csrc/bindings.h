// Converts what Python passes into the structs of args.h, for the modules of all backends.
//
// Python passes a struct as a tuple of its fields, in order, and an address as an int, 0 for null. The caller
// owns the memory and must make it large enough.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "args.h"

namespace fsl {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Item `at` of a tuple. It converts itself to the type of the field that it initialises: a pointer, an
// enum, a bool or a number.
struct Item {
  pybind11::handle tuple;
  size_t at;

  template <class Field>
  operator Field() const {
    const pybind11::handle item = PyTuple_GET_ITEM(tuple.ptr(), at);
    if constexpr (std::is_pointer_v<Field>) return reinterpret_cast<Field>(item.cast<uintptr_t>());
    else if constexpr (std::is_enum_v<Field>) return static_cast<Field>(item.cast<int>());
    else return item.cast<Field>();
  }
};

// Whether a T can be initialised by so many items.
template <class T, size_t... at, class = decltype(T{Item{{}, at}...})>
constexpr bool initialised_by(std::index_sequence<at...>) {
  return true;
}

template <class T>
constexpr bool initialised_by(...) {
  return false;
}

// The number of fields of the aggregate T: the most items that can initialise it. C++17 has no other way to
// count them. It starts at the size of T in bytes, because compilers warn if items are missing.
template <class T, size_t items = sizeof(T)>
constexpr size_t field_count() {
  if constexpr (initialised_by<T>(std::make_index_sequence<items>())) return items;
  else return field_count<T, items - 1>();
}

// Builds the aggregate T from a tuple with as many items as T has fields.
template <class T>
struct TupleCaster {
  PYBIND11_TYPE_CASTER(T, pybind11::detail::const_name("tuple"));

  bool load(pybind11::handle given, bool) {
    constexpr size_t fields = field_count<T>();
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != fields) return false;
    value = from(given, std::make_index_sequence<fields>());
    return true;
  }

  template <size_t... at>
  static T from(pybind11::handle tuple, std::index_sequence<at...>) {
    return T{Item{tuple, at}...};
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

// Throws unless there are kernels for rows with their own scale, or for the gradient of their entropy.
inline void check_rows_of_tokens(const RowMath& math) {
  if (math.softcap != 0 || math.label_smoothing != 0 || math.z_loss != 0)
    throw std::invalid_argument(
        "expected no softcap, label_smoothing and z_loss with a scale of rows or a gradient of entropies");
}

inline StatsArgs stats_args(const Tensor3& logits, const RowMath& math, uintptr_t target, uintptr_t weight,
                            int statistics, uintptr_t stats, uintptr_t scale) {
  if (scale) {
    check_rows_of_tokens(math);
    if (want(statistics) != Want::metrics)
      throw std::invalid_argument("expected 6 statistics with a scale of rows, got " +
                                  std::to_string(statistics));
  }
  return {logits.rows(math),        math,
          pointer<int64_t>(target), pointer<float>(weight),
          want(statistics),         pointer<float>(stats),
          pointer<float>(scale)};
}

inline MergeArgs merge_args(const Gathered& gathered, const RowMath& math, uintptr_t target, uintptr_t weight,
                            uintptr_t loss, uintptr_t normalizer, uintptr_t scale) {
  return {gathered.stats,         gathered.ranks,
          gathered.rows,          gathered.statistics,
          gathered.rank_stride,   pointer<int64_t>(target),
          pointer<float>(weight), math,
          pointer<float>(loss),   pointer<float>(normalizer),
          pointer<float>(scale)};
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
                          uintptr_t normalizer, const RowFactor& factor, uintptr_t stored, uintptr_t scale,
                          const EntropyGrad& entropy) {
  if (scale || entropy.grad) check_rows_of_tokens(math);
  return {logits.rows(math),
          grad.rows(math),
          math,
          pointer<int64_t>(target),
          pointer<float>(normalizer),
          factor,
          pointer<float>(stored),
          pointer<float>(scale),
          entropy};
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
struct type_caster<fsl::RowMath> : fsl::TupleCaster<fsl::RowMath> {};

template <>
struct type_caster<fsl::Tensor3> : fsl::TupleCaster<fsl::Tensor3> {};

template <>
struct type_caster<fsl::Gathered> : fsl::TupleCaster<fsl::Gathered> {};

template <>
struct type_caster<fsl::RowFactor> : fsl::TupleCaster<fsl::RowFactor> {};

template <>
struct type_caster<fsl::EntropyGrad> : fsl::TupleCaster<fsl::EntropyGrad> {};

template <>
struct type_caster<fsl::TargetsArgs> : fsl::TupleCaster<fsl::TargetsArgs> {};

}  // namespace pybind11::detail
