// Selects the kernel instance for a call's run-time values.
#pragma once

#include <type_traits>

#include "row_math.cuh"

namespace fsl::gpu {

// Calls fn(F32{}), fn(BF16{}) or fn(F16{}).
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

// Calls fn(std::true_type{}) or fn(std::false_type{}).
template <class Fn>
void with_bool(bool value, const Fn& fn) {
  value ? fn(std::true_type{}) : fn(std::false_type{});
}

// Calls fn(std::integral_constant) with the Cap of `math`.
template <class Fn>
void with_cap(const RowMath& math, const Fn& fn) {
  switch (cap_of(math)) {
    case kNoCap:
      return fn(std::integral_constant<int, kNoCap>{});
    case kSmallCap:
      return fn(std::integral_constant<int, kSmallCap>{});
    case kLargeCap:
      return fn(std::integral_constant<int, kLargeCap>{});
  }
}

// Calls fn(std::integral_constant) with the number of statistics.
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

// How many bytes past a multiple of 16 the rows start; -1 if rows differ.
inline int common_skew(const Rows& rows) {
  const int64_t bytes = rows.dtype == Dtype::f32 ? 4 : 2;
  const bool agree = (rows.batch == 1 || rows.stride_b * bytes % 16 == 0) &&
                     (rows.seq == 1 || rows.stride_s * bytes % 16 == 0);
  return agree ? static_cast<int>(reinterpret_cast<uintptr_t>(rows.data) % 16) : -1;
}

// Whether each row of `a` and the same row of `b` start equally many bytes past a multiple of 16.
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
