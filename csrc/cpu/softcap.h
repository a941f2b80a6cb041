// The softcap. Values are in bits, z * log2(e), so that additions reduce the argument of an exponential.
#pragma once

#include <type_traits>

#include "row_kernels.h"
#include "row_math.h"

namespace fsl {

// A formula serves logits of some size: value(x) is z in bits, exact(x) the same before its
// rounding, minus(x, r) is exact(x) - r, exp(u) is 2^u,
// and times_slope multiplies by dz/dx / logit_scale; the row's constants contain logit_scale. finds_top: the
// largest logit has to be found beside the sums.

// value(x) = x * P(x^2) with a relative error of 3e-7 up to a certain |x|. P is the minimax polynomial of
// tanh(u) / u (1.1e-7 without rounding), with the call's numbers in its coefficients.
template <int degree>
struct NearZero {
  static constexpr bool finds_top = false;
  float c[degree + 1];
  float flattening;  // 1 - slope = flattening * value^2

  NearZero(const RowMath& m, const double (&minimax)[degree + 1]) {
    const double bits = m.softcap * kExactLog2e, inward = double{m.logit_scale} / m.softcap;
    double factor = m.logit_scale * kExactLog2e;
    for (int i = 0; i <= degree; ++i, factor *= inward * inward)
      c[i] = static_cast<float>(minimax[i] * factor);
    flattening = static_cast<float>(1 / (bits * bits));
  }

  FSL_MEMBER float ratio(float x) const {
    const float s = x * x;
    float p = c[degree];
    for (int i = degree - 1; i >= 0; --i) p = p * s + c[i];
    return p;
  }
  FSL_MEMBER float value(float x) const { return x * ratio(x); }
  FSL_MEMBER double exact(float x) const { return double{x} * ratio(x); }
  FSL_MEMBER float minus(float x, float reference) const { return multiply_add(x, ratio(x), -reference); }
  FSL_MEMBER float exp(float u) const { return exp2_in_range(u); }
  FSL_MEMBER float times_slope(float grad, float value) const {
    return grad * (1.0f - flattening * (value * value));
  }
};

// For every x; infinities and NaNs stay as they are. Magnitudes are compared as integers, because gcc makes
// no minimum of a float select.
struct Far {
  static constexpr bool finds_top = false;
  float inward;            // logit_scale / softcap
  int32_t last;            // the bits of the |x| from which the tangent is constant
  float cap, inverse_cap;  // in bits

  explicit Far(const RowMath& m) : inward(m.logit_scale / m.softcap) {
    const double bits = m.softcap * kExactLog2e;
    last = static_cast<int32_t>(as_bits(9.2f / inward));  // infinite if no logit is that large
    cap = bits < __FLT_MAX__ ? static_cast<float>(bits) : __FLT_MAX__;
    inverse_cap = 1 / cap < kInf ? 1 / cap : __FLT_MAX__;  // infinity * 0 is NaN
  }

  FSL_MEMBER float value(float x) const {
    const int32_t bits = static_cast<int32_t>(as_bits(x) & 0x7fffffffu);
    const float magnitude = as_float(static_cast<uint32_t>(bits < last ? bits : last));
    const float bent = as_float(as_bits(tanh_of(magnitude * inward)) | (as_bits(x) & 0x80000000u));
    return bits < 0x7f800000 ? cap * bent : x;
  }
  FSL_MEMBER double exact(float x) const { return value(x); }
  FSL_MEMBER float minus(float x, float reference) const { return value(x) - reference; }
  FSL_MEMBER float exp(float u) const { return exp2_nonpositive(u); }
  FSL_MEMBER float times_slope(float grad, float value) const {
    const float bent = value * inverse_cap;
    const int32_t slope = static_cast<int32_t>(as_bits(1.0f - bent * bent));  // < 0 if the slope is
    return grad * as_float(static_cast<uint32_t>(slope > 0 ? slope : 0));
  }
};

// Of some elements, as bits of their dtype: the largest (if it is negative, ~ of its magnitude, so that tops
// order as integers), and the largest magnitude.
struct Largest {
  int32_t top, magnitude;
};

template <class Signed>
FSL_INLINE Largest largest(const void* elements, int64_t count) {
  typedef Signed Loose __attribute__((aligned(2), may_alias));
  const Loose* e = static_cast<const Loose*>(elements);
  constexpr Signed kMagnitude = static_cast<Signed>((uint64_t{1} << (8 * sizeof(Signed) - 1)) - 1);
  Signed top = -1, magnitude = 0, least = kMagnitude;
#pragma omp simd reduction(max : top, magnitude) reduction(min : least)
  for (int64_t i = 0; i < count; ++i) {
    const Signed bits = e[i], unsigned_bits = bits & kMagnitude;
    top = bits > top ? bits : top;
    magnitude = unsigned_bits > magnitude ? unsigned_bits : magnitude;
    least = unsigned_bits < least ? unsigned_bits : least;
  }
  return {top < 0 ? ~int32_t{least} : top, magnitude};
}

// The bits of the largest element that is at most `limit`; negative: none.
template <class T>
FSL_INLINE int32_t last_element(float limit) {
  if (!(limit >= 0)) return -1;
  const auto nearest = static_cast<typename T::Element>(T::round(limit));
  return static_cast<int32_t>(nearest) - (T::lo(nearest) > limit);
}

// The largest of some logits as in Largest, and the formula of its block.
struct Top {
  int32_t element = INT32_MIN;
  int formula = -1;
};

// Caps a block of logits by the formula of the lowest degree that reaches all of them. A model's logits are
// small: most of standard deviation 1 take degree 2 for a cap of 30.
struct Capped {
  static constexpr bool finds_top = true;
  static constexpr double kLn2 = 0.6931471805599453;
  static constexpr float unit = static_cast<float>(kLn2);  // z = unit * value
  static constexpr float sum_unit = unit;
  static constexpr int kFar = 5;          // formulas before `far`
  static constexpr int64_t kBlock = 512;  // words
  NearZero<2> near2;
  NearZero<3> near3;
  NearZero<4> near4;
  NearZero<5> near5;
  NearZero<7> near7;
  Far far;
  float reach[kFar];  // the largest |x|
  float scale;        // logit_scale in bits

  explicit Capped(const RowMath& m)
      : near2(m, {0.99999989, -0.33328449, 0.13010712}),
        near3(m, {0.99999989, -0.33331188, 0.13267401, -0.04737781}),
        near4(m, {0.99999989, -0.33331923, 0.13304046, -0.05179912, 0.01501788}),
        near5(m, {0.99999989, -0.33332224, 0.13314944, -0.0528299336, 0.0185594864, -0.00400811565}),
        near7(m, {0.99999989, -0.333324687, 0.133219782, -0.0533869995, 0.0203574886, -0.0065993114,
                  0.00149240591, -0.00016440079}),
        far(m),
        scale(static_cast<float>(m.logit_scale * kExactLog2e)) {
    // For extreme units a coefficient or a square would overflow or be subnormal.
    const bool moderate = far.inward > 0x1p-12f && far.inward < 0x1p12f;
    constexpr float kReach[kFar] = {0.2014f, 0.4059f, 0.6269f, 0.8499f, 1.2877f};
    for (int i = 0; i < kFar; ++i) reach[i] = moderate ? kReach[i] / far.inward : -1;
  }

  template <class Run>
  FSL_MEMBER auto with(int formula, Run run) const {
    switch (formula) {
      case 0:
        return run(near2);
      case 1:
        return run(near3);
      case 2:
        return run(near4);
      case 3:
        return run(near5);
      case 4:
        return run(near7);
      default:
        return run(far);
    }
  }

  // The first formula that reaches a magnitude.
  template <class Number>
  FSL_MEMBER static int formula(Number magnitude, const Number* last) {
    int i = 0;
    while (i < kFar && !(magnitude <= last[i])) ++i;
    return i;
  }

  FSL_MEMBER int of(float x) const { return formula(__builtin_fabsf(x), reach); }

  FSL_MEMBER float value(float x) const {
    return with(of(x), [&](const auto& f) { return f.value(x); });
  }
  FSL_MEMBER float minus(float x, float reference) const {
    return with(of(x), [&](const auto& f) { return f.minus(x, reference); });
  }
  FSL_MEMBER float statistic(float x) const {
    return static_cast<float>(with(of(x), [&](const auto& f) { return f.exact(x); }) * kLn2);
  }
  // 1 / 2^(value(x) - reference), but relative to statistic(x), for a logit of a block with the given formula
  // (negative: of no block). Dividing by the computed exponential cancels its error.
  FSL_MEMBER float rebase(float x, int given, float reference) const {
    return with(given < 0 ? of(x) : given, [&](const auto& f) {
      const auto rounded = static_cast<float>(f.exact(x) - statistic(x) * kExactLog2e);
      return exp2_in_range(rounded) / exp2_nonpositive(f.minus(x, reference));
    });
  }
  FSL_MEMBER float exp(float u) const { return far.exp(u); }
  FSL_MEMBER float times_slope(float grad, float value) const { return far.times_slope(grad, value); }

  // The row's constants, relative to a reference in bits. Its rounding goes into the factor.
  FSL_MEMBER RowConstants constants(RowConstants g) const {
    const double exact = g.reference * kExactLog2e;
    g.reference = static_cast<float>(exact);
    const float rounded = static_cast<float>(g.reference - exact);
    if (rounded == rounded) g.softmax_factor *= exp2_nonpositive(rounded);  // infinities have none
    return g;
  }

  // Calls run(formula, begin, end) for the words of each block, of which there are `words`. Reports the
  // largest element and its formula.
  template <class T, class Run>
  FSL_MEMBER Top blocks(const typename T::Word* w, int64_t words, float reference, Run run) const {
    using Signed = std::make_signed_t<typename T::Element>;
    const float room = (125.0f - __builtin_fabsf(reference)) / scale;  // no exponential is out of range
    int32_t last[kFar];
    for (int i = 0; i < kFar; ++i) last[i] = last_element<T>(reach[i] < room ? reach[i] : room);
    Top top;
    for (int64_t begin = 0; begin < words; begin += kBlock) {
      const int64_t end = begin + kBlock < words ? begin + kBlock : words;
      const Largest block = largest<Signed>(w + begin, 2 * (end - begin));
      const int formula = Capped::formula(block.magnitude, last);
      if (block.top > top.element) top = {block.top, formula};
      with(formula, [&](const auto& f) FSL_LAMBDA { run(f, begin, end); });
    }
    return top;
  }
};

}  // namespace fsl
