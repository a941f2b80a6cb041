// The formulas of a softcap, and how a row's logits are dealt out to them. Like row_math.h without external
// symbols.
#pragma once

#include <type_traits>

#include "row_kernels.h"
#include "row_math.h"

namespace fsl {
namespace {

// A formula serves logits up to some size. value(x) is z in some unit, exact(x) what minus(x, r) subtracts r
// from, which an FMA has not rounded, and exp(u) is e^z for a value u. times_slope multiplies by dz/dx /
// logit_scale, because the row's constants contain logit_scale. finds_top: the largest logit has to be found
// beside the sums.

// A formula for all logits. statistic(x) is what row_stats reports.
template <class Self>
struct OneFormula {
  static constexpr bool finds_top = true;
  static constexpr float sum_unit = 1;  // of a sum of values, in statistics
  FSL_MEMBER const Self& self() const { return static_cast<const Self&>(*this); }
  FSL_MEMBER float statistic(float x) const { return self().value(x); }
  FSL_MEMBER float minus(float x, float reference) const { return self().value(x) - reference; }
  // 1 / e^z of a value relative to the reference. Dividing by the computed exponential cancels its error.
  FSL_MEMBER float rebase(float x, float reference) const { return 1.0f / self().exp(minus(x, reference)); }
  FSL_MEMBER RowConstants constants(const RowConstants& g) const { return g; }
  // Calls run(formula, begin, end) for words that take the same formula. Returns the bits of the largest
  // logit; or a negative number if that is not known here, or if all logits are negative.
  template <class T, class Run>
  FSL_MEMBER int32_t blocks(const typename T::Word*, int64_t words, Run run) const {
    run(self(), 0, words);
    return -1;
  }
};

// value(x) = x * P(x^2) with a relative error of 3e-7 up to a certain |x|. P is the minimax polynomial of
// tanh(u) / u (1.1e-7 without rounding), with the call's numbers in its coefficients.
template <int degree>
struct NearZero {
  static constexpr bool finds_top = false;
  float c[degree + 1];
  float inverse_cap;

  NearZero(const RowMath& m, const double (&minimax)[degree + 1]) {
    const double inward = double{m.logit_scale} / m.softcap;
    double factor = m.logit_scale * kExactLog2e;
    for (int i = 0; i <= degree; ++i, factor *= inward * inward)
      c[i] = static_cast<float>(minimax[i] * factor);
    inverse_cap = static_cast<float>(1 / (m.softcap * kExactLog2e));
  }

  FSL_MEMBER float ratio(float x) const {
    const float s = x * x;
    float p = c[degree];
    for (int i = degree - 1; i >= 0; --i) p = p * s + c[i];
    return p;
  }
  FSL_MEMBER float value(float x) const { return x * ratio(x); }
  FSL_MEMBER double exact(float x) const { return kFused ? double{x} * ratio(x) : double{value(x)}; }
  FSL_MEMBER float minus(float x, float reference) const { return multiply_add(x, ratio(x), -reference); }
  FSL_MEMBER float exp(float u) const { return exp2_in_range(u); }
  FSL_MEMBER float times_slope(float grad, float value) const {
    const float bent = value * inverse_cap;
    return grad * (1.0f - bent * bent);
  }
};

// For every x; infinities and NaNs stay as they are. Magnitudes are compared as integers, because gcc makes
// no minimum of a float select.
struct Rational {
  float inward;            // logit_scale / softcap
  int32_t last;            // the bits of the |x| from which the tangent is constant
  float cap, inverse_cap;  // as values

  Rational(const RowMath& m, double values_per_z)
      : inward(m.logit_scale / m.softcap), cap(static_cast<float>(m.softcap * values_per_z)) {
    last = static_cast<int32_t>(as_bits(9.2f / inward));   // infinite if no logit is that large
    inverse_cap = 1 / cap < kInf ? 1 / cap : __FLT_MAX__;  // infinity * 0 is NaN
  }

  FSL_MEMBER float value(float x) const {
    const int32_t bits = static_cast<int32_t>(as_bits(x) & 0x7fffffffu);
    const float magnitude = as_float(static_cast<uint32_t>(bits < last ? bits : last));
    const float bent = as_float(as_bits(tanh_of(magnitude * inward)) | (as_bits(x) & 0x80000000u));
    return bits < 0x7f800000 ? cap * bent : x;
  }
  FSL_MEMBER float times_slope(float grad, float value) const {
    const float bent = value * inverse_cap;
    const int32_t slope = static_cast<int32_t>(as_bits(1.0f - bent * bent));  // < 0 if the slope is
    return grad * as_float(static_cast<uint32_t>(slope > 0 ? slope : 0));
  }
};

// A cap above kMostSmallCap. Values are z.
struct LargeCap : Rational, OneFormula<LargeCap> {
  static constexpr float unit = 1;
  explicit LargeCap(const RowMath& m) : Rational(m, 1) {}
  FSL_MEMBER float exp(float u) const { return exp_nonpositive(u, kLog2e); }
};

// Logits that are too large for a polynomial, with a small cap.
struct Far : Rational {
  static constexpr bool finds_top = false;
  explicit Far(const RowMath& m) : Rational(m, kExactLog2e) {}
  FSL_MEMBER double exact(float x) const { return value(x); }
  FSL_MEMBER float minus(float x, float reference) const { return value(x) - reference; }
  FSL_MEMBER float exp(float u) const { return exp2_nonpositive(u); }
};

// Of some elements, as bits of their dtype: the largest, or a negative number if all are negative; and the
// largest magnitude.
struct Largest {
  int32_t top, magnitude;
};

template <class Signed>
FSL_INLINE Largest largest(const void* elements, int64_t count) {
  typedef Signed Loose __attribute__((aligned(2), may_alias));
  const Loose* e = static_cast<const Loose*>(elements);
  constexpr Signed kMagnitude = static_cast<Signed>((uint64_t{1} << (8 * sizeof(Signed) - 1)) - 1);
  Signed top = -1, magnitude = 0;
#pragma omp simd reduction(max : top, magnitude)
  for (int64_t i = 0; i < count; ++i) {
    const Signed bits = e[i], unsigned_bits = bits & kMagnitude;
    top = bits > top ? bits : top;
    magnitude = unsigned_bits > magnitude ? unsigned_bits : magnitude;
  }
  return {top, magnitude};
}

// The bits of the largest element that is at most `limit`; negative: none.
template <class T>
FSL_INLINE int32_t last_element(float limit) {
  if (!(limit >= 0)) return -1;
  const auto nearest = static_cast<typename T::Element>(T::round(limit));
  return static_cast<int32_t>(nearest) - (T::lo(nearest) > limit);
}

// Values are in bits, z * log2(e), so that additions reduce the argument of an exponential; |z| <= 43 puts
// the exponentials of a polynomial's values between 2^-124 and 1. A block of logits takes the formula of the
// lowest degree that reaches all of them. A model's logits are small: most of standard deviation 1 take
// degree 2 for a cap of 30.
constexpr double kLn2 = 0.6931471805599453;
constexpr float kMostSmallCap = 62 * static_cast<float>(kLn2);

struct SmallCap {
  static constexpr bool finds_top = true;
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

  explicit SmallCap(const RowMath& m)
      : near2(m, {0.99999989, -0.33328449, 0.13010712}),
        near3(m, {0.99999989, -0.33331188, 0.13267401, -0.04737781}),
        near4(m, {0.99999989, -0.33331923, 0.13304046, -0.05179912, 0.01501788}),
        near5(m, {0.99999989, -0.33332224, 0.13314944, -0.0528299336, 0.0185594864, -0.00400811565}),
        near7(m, {0.99999989, -0.333324687, 0.133219782, -0.0533869995, 0.0203574886, -0.0065993114,
                  0.00149240591, -0.00016440079}),
        far(m) {
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
  // z, rounded down: a sum relative to the maximum must not be below 1, or a loss could be negative. Nor may
  // it be corrected to 1, because the gradient of a sure token has the same rounding.
  FSL_MEMBER float statistic(float x) const {
    const double exact = with(of(x), [&](const auto& f) { return f.exact(x); }) * kLn2;
    const float rounded = static_cast<float>(exact);
    const float below = as_float(rounded > 0 ? as_bits(rounded) - 1 : as_bits(rounded) + 1);
    return rounded > exact && rounded != 0 ? below : rounded;
  }

  // As in OneFormula, but relative to statistic(x), which is rounded.
  FSL_MEMBER float rebase(float x, float reference) const {
    return with(of(x), [&](const auto& f) {
      const auto rounded = static_cast<float>(f.exact(x) - statistic(x) * kExactLog2e);
      return exp2_in_range(rounded) / exp2_nonpositive(f.minus(x, reference));
    });
  }
  FSL_MEMBER float exp(float u) const { return far.exp(u); }
  FSL_MEMBER float times_slope(float grad, float value) const { return far.times_slope(grad, value); }

  // The row's constants, relative to a reference that is a value. Its rounding goes into the factor.
  FSL_MEMBER RowConstants constants(RowConstants g) const {
    const double exact = g.reference * kExactLog2e;
    g.reference = static_cast<float>(exact);
    const float rounded = static_cast<float>(g.reference - exact);
    if (rounded == rounded) g.softmax_factor *= exp2_nonpositive(rounded);  // infinities have none
    return g;
  }

  template <class T, class Run>
  FSL_MEMBER int32_t blocks(const typename T::Word* w, int64_t words, Run run) const {
    using Signed = std::make_signed_t<typename T::Element>;
    int32_t last[kFar];
    for (int i = 0; i < kFar; ++i) last[i] = last_element<T>(reach[i]);
    int32_t top = -1;
    for (int64_t begin = 0; begin < words; begin += kBlock) {
      const int64_t end = begin + kBlock < words ? begin + kBlock : words;
      const Largest block = largest<Signed>(w + begin, 2 * (end - begin));
      top = block.top > top ? block.top : top;
      with(formula(block.magnitude, last), [&](const auto& f) FSL_LAMBDA { run(f, begin, end); });
    }
    return top < 0 ? -1 : static_cast<int32_t>(as_bits(T::lo(static_cast<typename T::Element>(top))));
  }
};

}  // namespace
}  // namespace fsl
