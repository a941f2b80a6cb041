// Arithmetic of the GPU kernels: exponentials, the softcap, conversion of the three dtypes. Compiled without
// contraction; FMAs are written out. So a formula gives the same bits in every kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../args.h"
#include "platform.h"

namespace fsl::gpu {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

FSL_DEVICE float magnitude(float x) { return from_bits(bits(x) & 0x7fffffffu); }
FSL_DEVICE float nan() { return from_bits(0x7fc00000u); }
// Drops a NaN's payload, which the rounding to bf16 could turn into an infinity.
FSL_DEVICE float quiet(float x) { return x == x ? x : nan(); }

// e^u; 0 for -inf, NaN for NaN.
FSL_DEVICE float exp(float u) { return exp2(u * kLog2e); }

// A maximum that may be subtracted: 0 instead of -inf, because -inf - -inf is NaN.
FSL_DEVICE float not_minus_infinity(float m) { return m == -kInfinity ? 0.0f : m; }

// How a softcap is computed. Up to kMostSmallCap there is a short formula, whose error grows with the cap.
enum Cap : int { kNoCap = 0, kSmallCap = 1, kLargeCap = 2 };
constexpr float kMostSmallCap = 32;

inline Cap cap_of(const RowMath& m) {
  return m.softcap <= 0 ? kNoCap : m.softcap <= kMostSmallCap ? kSmallCap : kLargeCap;
}

// The constants of z = unit * x, computed on the host, where divisions round correctly.
struct Units {
  float unit;       // z = unit * x, with x capped first
  float unit_log2;  // unit * log2(e): an exponential is one FMA and one exp2
  float far;        // large |x| start here; see reference_of
  float inward;  // with kLargeCap the tangent is that of x * inward, with kSmallCap 2^(x * inward) gives it
  float cap;
  float logit_scale;  // dz/dx without the factor Capped::slope
};

inline Units units_of(const RowMath& m) {
  const float unit = m.unit(), unit_log2 = unit * kLog2e;
  int exponent = 0;
  std::frexp(unit_log2, &exponent);  // far * unit_log2 is 2^30 to 2^31
  const float far = std::ldexp(1.0f, std::max(31 - exponent, -94));
  float inward = cap_of(m) ? m.logit_scale / m.softcap : 0.0f;
  // The largest number, not infinity: infinity * 0 is NaN.
  if (cap_of(m) == kSmallCap) inward = std::min(2 * kLog2e * inward, std::numeric_limits<float>::max());
  return {unit, unit_log2, far, inward, m.softcap, m.logit_scale};
}

// The reference of 2^(x * unit_log2 - m * unit_log2), where m is a maximum. It is computed as
// 2^(x * unit_log2 - rounded): one FMA and one exp2.
struct Reference {
  float unit_log2, rounded, rest;
};

// `rounded` is the rounded product m * unit_log2. Its rounding error, rest, is up to half a unit in the last
// place of the product. It multiplies the exponentials of all x by the same 2^rest, which is too much for a
// sum, so it is removed once, at the end.
//
// From |m| = far on, half a unit is 64 or more, and 2^rest soon overflows. But there the next fp32 number
// below m is at least 64 lower in the exponent, so a logit either equals m or vanishes. Any larger unit_log2
// gives the same result. So unit_log2 becomes the power of two that makes the product 2^32 to 2^33. This
// product is exact (rest is 0), and the exponent is 0 for x = m, at most -256 for any other x, and never
// positive.
//
// Sums relative to an older maximum `old` <= m are multiplied by 2^(old * unit_log2 - rounded). No comparison
// is needed if `old` and m lie on different sides of far: far is a power of two, so the product of old = -far
// is exact, and the product of any m above it is at least one unit (128) higher, while rest is at most half a
// unit.
FSL_DEVICE Reference reference_of(float m, const Units& z) {
  const float power = from_bits(0x8f000000u - (bits(m) & 0x7f800000u));  // its exponent is 286 - that of m
  const float unit_log2 = magnitude(m) >= z.far ? power : z.unit_log2, rounded = m * unit_log2;
  return {unit_log2, rounded, fma(m, unit_log2, -rounded)};
}

// z = cap * tanh(u) with u = x * logit_scale / cap, infinities unchanged, and (dz/dx) / logit_scale.
struct Capped {
  float value, slope;
};

// z = cap - 2 cap r with r = 1 / (1 + e^2u). Its error is at most cap * 2^-21, also where z is small. For a
// small cap this is 1.5e-5, no more than the rounding of a few fp32 numbers as large as the cap. It takes
// half the instructions of large_cap, and one transcendental more.
FSL_DEVICE Capped small_cap(float x, const Units& z) {
  const float r = reciprocal(1.0f + exp2(x * z.inward));
  return {fma(r, -2.0f * z.cap, z.cap), 4.0f * r * (1.0f - r)};
}

// tanh u = u * P(u^2) / Q(u^2), the minimax rational function of degrees 4 and 4 on |u| <= 8.8. Its relative
// error is 1.7e-8, and 5e-7 with all fp32 rounding, for every u. At 9.2, where u stops, the quotient is
// 2.6e-7 above 1, so the slope of saturated logits is exactly 0 whichever way the reciprocal rounds.
FSL_DEVICE Capped large_cap(float x, const Units& z) {
  const float u = max(min(x * z.inward, 9.2f), -9.2f), s = u * u;
  float p = fma(s, 1.3714539e-8f, 2.0865291e-5f), q = fma(s, 7.9227329e-7f, 3.3109872e-4f);
  p = fma(p, s, 0.0035110474f), q = fma(q, s, 0.025935707f);
  p = fma(p, s, 0.13394015f), q = fma(q, s, 0.46727334f);
  p = fma(p, s, 1.0f), q = fma(q, s, 1.0f);
  const float bent = u * p * reciprocal(q);
  return {z.cap * bent, max(fma(-bent, bent, 1.0f), 0.0f)};
}

template <int kSoftcap>
FSL_DEVICE Capped capped_and_slope(float x, const Units& z) {
  if (kSoftcap == kNoCap) return {x, 1.0f};
  const Capped c = kSoftcap == kSmallCap ? small_cap(x, z) : large_cap(x, z);
  return {magnitude(x) < kInfinity ? c.value : x, c.slope};
}

// x with the softcap applied if there is one.
template <int kSoftcap>
FSL_DEVICE float capped(float x, const Units& z) {
  return capped_and_slope<kSoftcap>(x, z).value;
}

// The dtypes. Eight neighbouring logits are kWords 32-bit words, in memory order.
struct F32 {
  static constexpr int kBytes = 4, kWords = 8;
  static FSL_DEVICE float element(const uint32_t* words, int i) { return from_bits(words[i]); }
  static FSL_DEVICE uint32_t load(const void* at) { return *static_cast<const uint32_t*>(at); }
  static FSL_DEVICE void put(char* at, float x) { store(at, bits(x)); }
  static FSL_DEVICE void put(uint32_t* words, const float* x) {
    FSL_UNROLL for (int i = 0; i < 8; ++i) words[i] = bits(x[i]);
  }
};

struct Sixteen {
  static constexpr int kBytes = 2, kWords = 4;
  static FSL_DEVICE uint32_t load(const void* at) { return *static_cast<const uint16_t*>(at); }
};

struct BF16 : Sixteen {
  static FSL_DEVICE float element(const uint32_t* words, int i) {
    return from_bits(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
  static FSL_DEVICE void put(char* at, float x) { store(at, static_cast<uint16_t>(pack_bf16(x, 0.0f))); }
  static FSL_DEVICE void put(uint32_t* words, const float* x) {
    FSL_UNROLL for (int i = 0; i < 4; ++i) words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  }
};

struct F16 : Sixteen {
  static FSL_DEVICE float element(const uint32_t* words, int i) {
    return widen_half(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu);
  }
  static FSL_DEVICE void put(char* at, float x) { store(at, static_cast<uint16_t>(pack_half(x, 0.0f))); }
  static FSL_DEVICE void put(uint32_t* words, const float* x) {
    FSL_UNROLL for (int i = 0; i < 4; ++i) words[i] = pack_half(x[2 * i], x[2 * i + 1]);
  }
};

}  // namespace fsl::gpu
