// Scalar arithmetic that the compiler turns into vectors: exp, tanh, conversion of the three dtypes.
// Everything must be static inline. Each instruction set compiles its own copy; with external symbols the
// linker could pick the AVX-512 copy for a machine without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

namespace fsl {

#define FSL_MEMBER inline __attribute__((always_inline))
#define FSL_INLINE static FSL_MEMBER
#define FSL_LAMBDA __attribute__((always_inline))

FSL_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FSL_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr double kExactLog2e = 1.4426950408889634;
constexpr float kLog2e = static_cast<float>(kExactLog2e);
constexpr float kInf = __builtin_inff();

FSL_INLINE float canonical(float x) { return x == x ? x : __builtin_nanf(""); }

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// a * b + c, rounded once if the instruction set has FMA. If contraction were left to the compiler, the same
// expression could round once in a loop and twice outside it.
FSL_INLINE float multiply_add(float a, float b, float c) {
  return kFused ? __builtin_fmaf(a, b, c) : a * b + c;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits

// 2^(n + f) for |f| <= 1/2, given shifted = n + kRound.
//
// 2^f is a polynomial of degree 5 with p(0) = 1. Its coefficients come from Lawson's weighted least squares
// for the smallest maximal relative error, which is 9.2e-8.
FSL_INLINE float power_of_two(float shifted, float f) {
  float p = 0.001326472731307149f;
  p = p * f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
}

// e^(unit * u) for unit * u <= 88, given unit_log2 = unit * log2(e). u * unit_log2 = n + f. The unit is
// applied here, so that u is a difference of logits and not of rounded products.
//
// With z = unit * u the relative error is at most 2e-7 + |z| * 3e-8. Without FMA the product is rounded
// before n is subtracted, and the bound is 2e-7 + |z| * 9e-8. If unit_log2 is itself rounded, add |z| * 6e-8.
// Results below 2^-126 have an absolute error of at most 2^-126. The result is exactly 0 for n <= -127
// (2^-126.5) and for -inf. A NaN gives NaN if its low 9 bits are clear. u = +inf gives NaN; it arises only in
// rows that contain +inf and in sums that are then discarded.
FSL_INLINE float exp_nonpositive(float u, float unit_log2) {
  const float shifted = multiply_add(u, unit_log2, kRound);
  const float power = power_of_two(shifted, multiply_add(u, unit_log2, kRound - shifted));
  return shifted <= kRound - 127 ? 0.0f : power;
}

// 2^u for |u| <= 126, with a relative error of 2e-7. Additions take the place of FMAs, which have less room.
FSL_INLINE float exp2_in_range(float u) {
  const float shifted = u + kRound;
  return power_of_two(shifted, u - (shifted - kRound));
}

// The same for u <= 126; like exp_nonpositive below -126 and for infinities and NaNs.
FSL_INLINE float exp2_nonpositive(float u) { return u + kRound <= kRound - 127 ? 0.0f : exp2_in_range(u); }

// tanh(u) for 0 <= u <= 9.2, with a relative error of 4e-7. large_cap in gpu/row_math.cuh explains the
// formula.
FSL_INLINE float tanh_of(float u) {
  const float s = u * u;
  float p = 1.3714539e-8f, q = 7.9227329e-7f;
  p = p * s + 2.0865291e-5f, q = q * s + 3.3109872e-4f;
  p = p * s + 0.0035110474f, q = q * s + 0.025935707f;
  p = p * s + 0.13394015f, q = q * s + 0.46727334f;
  p = p * s + 1.0f, q = q * s + 1.0f;
  return u * p / q;
}

// A dtype is read and written one word, which is two logits, at a time. 16-bit logits are widened inside the
// word, which avoids the lane shuffles of a uint16 -> uint32 conversion. fp32 is read in pairs too, so that
// sums have the same order for every dtype. `lo` and `hi` unpack a word; `pack` (a word) and `round` (one
// element) round to nearest even.
struct F32 {
  using Element = uint32_t;
  typedef uint64_t Word __attribute__((aligned(4), may_alias));
  // NaNs lose their payload, because exp_nonpositive shifts low bits into the exponent.
  FSL_INLINE float lo(uint64_t word) { return canonical(as_float(static_cast<uint32_t>(word))); }
  FSL_INLINE float hi(uint64_t word) { return canonical(as_float(static_cast<uint32_t>(word >> 32))); }
  FSL_INLINE uint32_t round(float x) { return as_bits(x); }
  FSL_INLINE uint64_t pack(float low, float high) { return as_bits(low) | uint64_t{as_bits(high)} << 32; }
};

struct BF16 {
  using Element = uint16_t;
  typedef uint32_t Word __attribute__((aligned(2), may_alias));  // a row may start at any element
  FSL_INLINE float lo(uint32_t word) { return as_float(word << 16); }
  FSL_INLINE float hi(uint32_t word) { return as_float(word & 0xffff0000u); }
  // The rounded bf16 in the upper half. A NaN must be quiet with a clear low half, or the carry could change
  // it to an infinity. The callers' NaNs are: they come from arithmetic on bf16 logits and canonical row
  // constants.
  FSL_INLINE uint32_t upper(float x) {
    const uint32_t bits = as_bits(x);
    return bits + (bits & 0x10000u ? 0x8000u : 0x7fffu);  // half to even; the select saves an instruction
  }
  FSL_INLINE uint32_t round(float x) { return upper(x) >> 16; }
  FSL_INLINE uint32_t pack(float low, float high) { return (upper(low) >> 16) | (upper(high) & 0xffff0000u); }
};

struct F16 {
  using Element = uint16_t;
  typedef uint32_t Word __attribute__((aligned(2), may_alias));
  // Multiplying by 2^112 corrects the exponent, also of subnormal halves.
  FSL_INLINE float widen(uint32_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    const float finite = as_float(magnitude) * 0x1p112f;
    const uint32_t special = magnitude + 0x70000000u;  // infinity and NaN: exponent 31 -> 255
    const uint32_t bits = magnitude >= 0x0f800000u ? special : as_bits(finite);
    return as_float(bits | (half & 0x8000u) << 16);
  }
  FSL_INLINE float lo(uint32_t word) { return widen(word & 0xffffu); }
  FSL_INLINE float hi(uint32_t word) { return widen(word >> 16); }
  FSL_INLINE uint32_t round(float x) {
    const uint32_t sign = as_bits(x) >> 16 & 0x8000u;
    const uint32_t bits = as_bits(x) & 0x7fffffffu;
    const uint32_t normal = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    // Below 2^-14: after adding 0.5, the float's last bit is the half's last bit, so the addition rounds.
    const uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
    const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = bits < 0x38800000u ? subnormal : normal;
    return sign | (bits >= 0x477ff000u ? special : finite);  // 65520 and above round to infinity
  }
  FSL_INLINE uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
};

}  // namespace fsl
