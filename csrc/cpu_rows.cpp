// Compiled once per instruction set with FSL_ISA naming it. Plain loops: `omp simd reduction` gives the
// compiler leave to keep a sum in lanes, and nothing else is asked of it.
#include "cpu_rows.h"

#include "cpu_math.h"

namespace fsl {
namespace {

// Rows start at any element, so a word is loaded from any 2-byte address.
typedef uint32_t Word __attribute__((aligned(2), may_alias));

struct Plain {
  float scale;
  float slope;
  float value(float x) const { return x * scale; }
  float less(float x, float reference) const { return x * scale - reference; }
};

struct Capped {
  float inward;    // logit_scale / softcap
  float cap;
  float scale;
  Tanh bend(float x) const { return tanh_and_slope(x * inward); }
  float value(float x) const { return keep_infinity(x, cap * bend(x).value); }
  float less(float x, float reference) const { return value(x) - reference; }
  static float keep_infinity(float x, float capped) {
    return (as_bits(x) & 0x7fffffffu) == 0x7f800000u ? x : capped;
  }
};

template <class T>
using Element = typename T::Element;

template <class T>
float element(const void* row, int64_t column) {
  return T::lo(static_cast<const Element<T>*>(row)[column]);
}

template <class T>
const Word* words(const void* row, int64_t column) {
  return reinterpret_cast<const Word*>(static_cast<const Element<T>*>(row) + column);
}

// Largest logit of [begin, end), NaN or not: a NaN always reaches the caller's sum, except when everything
// else is -inf and there is nothing to sum, so that case looks for one.
template <class T>
float finish_max(float max, const void* row, int64_t begin, int64_t end) {
  if (max != -kInf) return max;
  for (int64_t c = begin; c < end; ++c)
    if (element<T>(row, c) != element<T>(row, c)) return __builtin_nanf("");
  return max;
}

template <class T>
float max_of(const void* row, int64_t begin, int64_t end) {
  if constexpr (T::kPerWord == 1) {
    const auto* x = static_cast<const float*>(row);
    float max = -kInf;
#pragma omp simd reduction(max : max)
    for (int64_t c = begin; c < end; ++c) max = x[c] > max ? x[c] : max;
    return finish_max<T>(max, row, begin, end);
  } else {
    // Sign and magnitude order like integers among positives and backwards among negatives, so two
    // 16-bit extremes give the maximum at a quarter of the work of widening each logit.
    const auto* x = static_cast<const int16_t*>(row);
    int16_t most = INT16_MIN, least = INT16_MAX;
#pragma omp simd reduction(max : most) reduction(min : least)
    for (int64_t c = begin; c < end; ++c) {
      most = x[c] > most ? x[c] : most;
      least = x[c] < least ? x[c] : least;
    }
    return finish_max<T>(T::lo(static_cast<uint16_t>(most >= 0 ? most : least)), row, begin, end);
  }
}

template <class T, Want want, class Z>
void accumulate(const Z& z, float x, float max, float& denominator, float& sum, float& weighted) {
  const float u = z.less(x, max);
  const float e = exp_nonpositive(u);
  denominator += e;
  if constexpr (want != Want::loss) sum += z.value(x);
  if constexpr (want == Want::metrics) weighted += u < -88.0f ? 0.0f : u * e;   // -inf * 0 is no entropy
}

template <class T, Want want, class Z>
Partial chunk_stats(const Z& z, const void* row, int64_t begin, int64_t end) {
  Partial out;
  const float top = max_of<T>(row, begin, end);
  out.max = z.value(top);
  if (top == -kInf) {          // all masked out: exp(-inf - -inf) would be NaN
    if constexpr (want != Want::loss) out.sum = -kInf;
    out.argmax = begin;
    return out;
  }
  const Word* w = words<T>(row, begin);
  const int64_t n = (end - begin) / T::kPerWord;
  const float max = out.max;
  float d0 = 0, d1 = 0, s0 = 0, s1 = 0, h0 = 0, h1 = 0;
#pragma omp simd reduction(+ : d0, d1, s0, s1, h0, h1)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = w[i];
    accumulate<T, want>(z, T::lo(word), max, d0, s0, h0);
    if constexpr (T::kPerWord == 2) accumulate<T, want>(z, T::hi(word), max, d1, s1, h1);
  }
  if (begin + n * T::kPerWord < end) accumulate<T, want>(z, element<T>(row, end - 1), max, d0, s0, h0);
  out.denominator = d0 + d1;
  out.sum = s0 + s1;
  out.weighted = h0 + h1;
  if constexpr (want == Want::metrics) {
    out.argmax = begin;
    while (out.argmax < end - 1 && element<T>(row, out.argmax) != top) ++out.argmax;
  }
  return out;
}

void merge(Partial* into, const Partial& next) {
  const bool higher = next.max > into->max;
  const float max = higher || next.max != next.max ? next.max : into->max;
  const float delta = higher ? into->max - next.max : next.max - into->max;
  into->sum += next.sum;
  if (max == -kInf) return;
  const float shrink = exp_nonpositive(delta);
  if (!(delta > -88.0f || delta != delta)) {   // one side vanishes; -inf * 0 must not make a NaN
    if (higher) {
      into->denominator = next.denominator;
      into->weighted = next.weighted;
    }
  } else if (higher) {
    into->weighted = (into->weighted + delta * into->denominator) * shrink + next.weighted;
    into->denominator = into->denominator * shrink + next.denominator;
  } else {
    into->weighted += (next.weighted + delta * next.denominator) * shrink;
    into->denominator += next.denominator * shrink;
  }
  if (higher) into->argmax = next.argmax;
  into->max = max;
}

template <class T, Want want, class Z>
void stats_range(const Z& z, const void* row, int64_t begin, int64_t end, Partial* partial) {
  for (int64_t c = begin; c < end; c += kChunk) {
    merge(partial, chunk_stats<T, want>(z, row, c, c + kChunk < end ? c + kChunk : end));
  }
}

template <class T, class Z>
float grad_of(const Z& z, const RowGrad& g, float x) {
  if constexpr (__is_same(Z, Plain)) {
    return exp_nonpositive(z.less(x, g.lse)) * g.softmax_factor - g.smoothing;
  } else {
    const Tanh bent = z.bend(x);
    const float p = exp_nonpositive(Capped::keep_infinity(x, z.cap * bent.value) - g.lse);
    return (p * g.softmax_factor - g.smoothing) * (bent.slope * z.scale);
  }
}

template <class T, class Z>
float grad_at_target(const Z& z, const RowGrad& g, float x) {
  RowGrad at = g;
  at.smoothing += g.target_factor;
  return grad_of<T>(z, at, x);
}

template <class T, class Z>
void grad_range(const Z& z, const RowGrad& g, const void* row, void* out, int64_t begin, int64_t end) {
  const bool owns = g.target_column >= begin && g.target_column < end;
  // In place the target's logit is gone after the loop: its gradient is computed before.
  const float at_target = owns ? grad_at_target<T>(z, g, element<T>(row, g.target_column)) : 0.0f;
  const Word* w = words<T>(row, begin);
  Word* o = const_cast<Word*>(words<T>(out, begin));
  const int64_t n = (end - begin) / T::kPerWord;
  const RowGrad local = g;
  const Z transform = z;
  // Word i is written after word i was read, and out is row or does not overlap it.
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = w[i];
    const float low = grad_of<T>(transform, local, T::lo(word));
    o[i] = T::pack(low, T::kPerWord == 2 ? grad_of<T>(transform, local, T::hi(word)) : 0.0f);
  }
  auto* elements = static_cast<Element<T>*>(out);
  if (begin + n * T::kPerWord < end) elements[end - 1] = T::round(grad_of<T>(z, g, element<T>(row, end - 1)));
  if (owns) elements[g.target_column] = T::round(at_target);
}

Plain plain(const Transform& t) { return {t.logit_scale, t.logit_scale}; }
Capped capped(const Transform& t) { return {t.logit_scale / t.softcap, t.softcap, t.logit_scale}; }

// Calls run(dtype tag, transform) with the types the arguments name.
template <class Run>
void with_types(Dtype dtype, const Transform& transform, Run run) {
  auto with_dtype = [&](auto tag) {
    if (transform.softcap > 0) run(tag, capped(transform));
    else run(tag, plain(transform));
  };
  if (dtype == Dtype::f32) with_dtype(F32{});
  else if (dtype == Dtype::bf16) with_dtype(BF16{});
  else with_dtype(F16{});
}

void stats(const StatsArgs& a, const void* row, int64_t begin, int64_t end, Partial* partial) {
  with_types(a.logits.dtype, a.transform, [&](auto tag, auto z) {
    using T = decltype(tag);
    if (a.want == Want::loss) stats_range<T, Want::loss>(z, row, begin, end, partial);
    else if (a.want == Want::smoothing) stats_range<T, Want::smoothing>(z, row, begin, end, partial);
    else stats_range<T, Want::metrics>(z, row, begin, end, partial);
  });
}

void grad(const GradArgs& a, const RowGrad& g, const void* row, void* out, int64_t begin, int64_t end) {
  with_types(a.logits.dtype, a.transform, [&](auto tag, auto z) {
    if constexpr (__is_same(decltype(z), Plain)) {
      RowGrad scaled = g;      // dz/dx is one number for the whole row
      scaled.softmax_factor *= z.slope;
      scaled.smoothing *= z.slope;
      scaled.target_factor *= z.slope;
      grad_range<decltype(tag)>(z, scaled, row, out, begin, end);
    } else {
      grad_range<decltype(tag)>(z, g, row, out, begin, end);
    }
  });
}

float target_logit(const StatsArgs& a, const void* row, int64_t column) {
  float value = 0;
  with_types(a.logits.dtype, a.transform,
             [&](auto tag, auto z) { value = z.value(element<decltype(tag)>(row, column)); });
  return value;
}

void exp_all(const float* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive(canonical(in[i]));
}

}  // namespace

#define FSL_NAME(isa) kernels_##isa
#define FSL_EXPAND(isa) FSL_NAME(isa)
#define FSL_QUOTE(isa) #isa
#define FSL_STRING(isa) FSL_QUOTE(isa)

extern const RowKernels FSL_EXPAND(FSL_ISA);
const RowKernels FSL_EXPAND(FSL_ISA) = {FSL_STRING(FSL_ISA), stats, grad, merge, target_logit, exp_all};

}  // namespace fsl
