// From what a call says at run time to the kernel compiled for it.
#pragma once

#include <type_traits>

#include "row_math.cuh"

namespace fsl::gpu {

// fn(dtype tag)
template <class Fn>
void with_dtype(Dtype dtype, const Fn& fn) {
  switch (dtype) {
    case Dtype::f32:
      return fn(F32{});
    case Dtype::bf16:
      return fn(BF16{});
    case Dtype::f16:
      return fn(F16{});
  }
}

// fn(std::bool_constant)
template <class Fn>
void with_bool(bool value, const Fn& fn) {
  value ? fn(std::true_type{}) : fn(std::false_type{});
}

// fn(std::integral_constant: number of statistics)
template <class Fn>
void with_statistics(Want want, const Fn& fn) {
  switch (want) {
    case Want::loss:
      return fn(std::integral_constant<int, 3>{});
    case Want::smoothing:
      return fn(std::integral_constant<int, 4>{});
    case Want::metrics:
      return fn(std::integral_constant<int, 6>{});
  }
}

// Bytes that row starts lie past a multiple of 16 when all rows agree, else -1.
inline int common_skew(const Rows& rows) {
  const int64_t bytes = rows.dtype == Dtype::f32 ? 4 : 2;
  const bool agree = (rows.batch == 1 || rows.stride_b * bytes % 16 == 0) &&
                     (rows.seq == 1 || rows.stride_s * bytes % 16 == 0);
  return agree ? static_cast<int>(reinterpret_cast<uintptr_t>(rows.data) % 16) : -1;
}

// Whether a row of `a` and the same row of `b` always lie equally far past a multiple of 16 bytes.
inline bool same_skew(const Rows& a, const Rows& b) {
  const bool same = a.data == b.data && a.stride_b == b.stride_b && a.stride_s == b.stride_s;
  return same || (common_skew(a) >= 0 && common_skew(a) == common_skew(b));
}

inline void check_rows(const Rows& rows) {
  if (rows.count() > 0x7fffffff || rows.columns > 0x7fffffff - 65536)
    throw std::invalid_argument("expected fewer than 2^31 rows and columns, got " +
                                std::to_string(rows.count()) + " and " + std::to_string(rows.columns));
}

}  // namespace fsl::gpu
