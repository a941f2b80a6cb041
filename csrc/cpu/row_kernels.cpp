// Compiled once per instruction set; FSL_ISA is its name. The loops run over a fixed number of lanes, and the
// compiler turns them into vectors of the set's width. Only the prefetch uses an intrinsic.
#include "row_kernels.h"

#include "row_math.h"
#include "softcap.h"

namespace fsl {
namespace {

constexpr int kLanes = 16;          // words; see Lanes
constexpr int kGroup = 2 * kLanes;  // logits

// Values are logits: z = unit * value(x); unit_log2 = unit * log2(e).
template <class Self>
struct WithoutCap : OneFormula<Self> {
  float unit, unit_log2;
  explicit WithoutCap(const RowMath& m) : unit(m.logit_scale), unit_log2(m.logit_scale * kLog2e) {}
  FSL_MEMBER float value(float x) const { return x; }
  FSL_MEMBER float exp(float u) const { return exp_nonpositive(u, unit_log2); }
  FSL_MEMBER float times_slope(float grad, float) const { return grad; }
};
struct Plain : WithoutCap<Plain> {
  using WithoutCap::WithoutCap;
};
struct Tilted : WithoutCap<Tilted> {  // with the gradient of an entropy
  using WithoutCap::WithoutCap;
};

template <class T>
using Element = typename T::Element;

template <class T>
FSL_INLINE float element(const void* row, int64_t column) {
  return T::lo(static_cast<const Element<T>*>(row)[column]);
}

template <class T>
using Word = typename T::Word;

template <class T>
FSL_INLINE const Word<T>* words(const void* row, int64_t column) {
  return reinterpret_cast<const Word<T>*>(static_cast<const Element<T>*>(row) + column);
}

template <class T>
float max_of(const void* row, int64_t begin, int64_t end) {
  float max = -kInf;
#pragma omp simd reduction(max : max)
  for (int64_t c = begin; c < end; ++c) {
    const float x = element<T>(row, c);
    max = x > max ? x : max;
  }
  return max;
}

// The sums of a chunk relative to any finite reference, in units of x. `top` holds the bits of the largest
// logit, or is negative if all logits are negative. Bits of non-negative floats order as integers, and an
// integer maximum costs half of a float maximum.
struct Sums {
  int32_t top;
  float sum_exp, sum, moment;
};

// u * e with e = exp(u), and 0 if e is 0: a masked-out column (u = -inf) adds nothing to the entropy.
FSL_INLINE float moment_of(float u, float e) { return e == 0.0f ? 0.0f : u * e; }

constexpr int64_t kLine = 64, kAhead = 4096;  // bytes

// The logits of kLanes words, first the low ones, then the high ones.
template <class T>
struct Group {
  float x[kGroup];

  explicit FSL_MEMBER Group(const Word<T>* w) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      x[l] = T::lo(w[l]);
      x[kLanes + l] = T::hi(w[l]);
    }
  }
};

// Without prefetching, arithmetic fills the reorder window before enough cache lines are in flight (measured
// on Ice Lake: 14.5 ms -> 9.5 ms for 128 MiB of bf16 on two cores).
template <class T>
FSL_INLINE void prefetch_ahead(const Word<T>* w) {
  for (int64_t byte = 0; byte < kLanes * static_cast<int64_t>(sizeof(Word<T>)); byte += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead + byte);
}

// A sum has kLanes partial sums on every instruction set, so that all of them add in the same order. The
// compiler turns the inner loops over lanes into vectors.
template <Want want>
struct Lanes {
  int32_t top[kLanes];
  float sum_exp[kLanes], sum[kLanes], moment[kLanes];

  Lanes() {
    for (int l = 0; l < kLanes; ++l) {
      top[l] = -1;
      sum_exp[l] = sum[l] = moment[l] = 0;
    }
  }

  template <class Z>
  FSL_MEMBER void add(const Z& z, float x, float value, float u, int l) {
    const float e = z.exp(u);
    if constexpr (Z::finds_top) {
      const int32_t bits = static_cast<int32_t>(as_bits(x));
      top[l] = bits > top[l] ? bits : top[l];
    }
    sum_exp[l] += e;
    if constexpr (want != Want::loss) sum[l] += value;
    if constexpr (want == Want::metrics) moment[l] += moment_of(u, e);
  }

  // One loop would be a longer chain of dependent instructions: the reorder window would hold fewer of them.
  template <class Z>
  FSL_MEMBER void add_all(const Z& z, const float* x, float reference) {
    float u[kLanes];
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) u[l] = z.minus(x[l], reference);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) add(z, x[l], z.value(x[l]), u[l], l);
  }

  Sums total() const {
    Sums t{-1, 0, 0, 0};
    for (int l = 0; l < kLanes; ++l) {
      t.top = top[l] > t.top ? top[l] : t.top;
      t.sum_exp += sum_exp[l];
      t.sum += sum[l];
      t.moment += moment[l];
    }
    return t;
  }
};

template <class T, Want want, class Z>
Sums sums_against(const Z& z, const void* row, int64_t begin, int64_t end, float reference) {
  const Z local = z;
  const Word<T>* w = words<T>(row, begin);
  const int64_t n = (end - begin) / 2, whole = n - n % kLanes;
  Lanes<want> low, high;
  const int32_t of_blocks =
      local.template blocks<T>(w, whole, [&](const auto& formula, int64_t i, int64_t stop) FSL_LAMBDA {
        const auto f = formula;
        for (; i < stop; i += kLanes) {
          prefetch_ahead<T>(w + i);
          const Group<T> g(w + i);
          low.add_all(f, g.x, reference);
          high.add_all(f, g.x + kLanes, reference);
        }
      });
  for (int64_t c = begin + whole * 2; c < end; ++c) {
    const float x = element<T>(row, c);
    low.add(local, x, local.value(x), local.minus(x, reference), c % kLanes);
  }
  const Sums a = low.total(), b = high.total();
  const int32_t top = a.top > b.top ? a.top : b.top;
  return {of_blocks > top ? of_blocks : top, a.sum_exp + b.sum_exp, a.sum + b.sum, a.moment + b.moment};
}

// Makes the sums relative to a new maximum: delta = unit * (old - new), factor = e^delta.
void move_maximum(Partial* p, float delta, float factor) {
  p->moment = (p->moment + delta * p->sum_exp) * factor;
  p->sum_exp *= factor;
}

// Sums of e^(unit * (x - reference)) cannot overflow if every z is at most this far above the reference.
constexpr float kHeadroom = 64.0f;
constexpr int64_t kGuess = 64;
// Making the moment relative to the maximum subtracts (max - reference) * sum_exp, which nearly cancels the
// term of a maximum far above the reference. Such a moment is added up again, relative to the maximum.
constexpr float kMomentHeadroom = 4.0f;

// One pass over the chunk. The reference of the exponentials is guessed from the first columns, and the sums
// are made relative to the maximum afterwards. So arithmetic and memory overlap; with a separate pass for the
// maximum they would alternate. If the guess is far too low, there is a second pass, also if max - reference
// overflows.
template <class T, Want want, class Z>
Partial chunk_stats(const Z& z, const void* row, int64_t begin, int64_t end) {
  float guess = max_of<T>(row, begin, begin + kGuess < end ? begin + kGuess : end);
  if (guess == -kInf) guess = max_of<T>(row, begin, end);
  float reference = guess == -kInf ? 0.0f : z.value(guess);
  Sums sums = sums_against<T, want>(z, row, begin, end, reference);
  const float top = sums.top < 0 ? max_of<T>(row, begin, end) : as_float(static_cast<uint32_t>(sums.top));
  const float max = z.value(top);
  if ((max - reference) * z.unit > kHeadroom) {
    reference = max;
    sums = sums_against<T, want>(z, row, begin, end, reference);
  }
  Partial out{z.statistic(top), sums.sum_exp, sums.sum * Z::sum_unit, sums.moment * z.unit, begin};
  if (max != -kInf) {
    // Dividing by the maximum's own computed exponential cancels its error: its term in the sum is 1, but
    // for the rounding of a capped maximum.
    move_maximum(&out, (reference - max) * z.unit, z.rebase(top, reference));
    if (out.sum_exp < 1) out.sum_exp = 1;  // undo a last rounding, or a loss could be negative
    if constexpr (want == Want::metrics) {
      if ((max - reference) * z.unit > kMomentHeadroom)
        out.moment = sums_against<T, want>(z, row, begin, end, max).moment * z.unit;
    }
  }
  if constexpr (want == Want::metrics) {
    while (out.argmax < end - 1 && element<T>(row, out.argmax) != top) ++out.argmax;
  }
  return out;
}

void merge(Partial* into, const Partial& next, float unit) {
  Partial right = next;
  const bool higher = right.max > into->max;
  Partial& lower = higher ? *into : right;
  const float max = higher ? right.max : into->max, delta = (lower.max - max) * unit;
  if (delta < -88.0f) {  // the lower sums vanish, but a NaN must stay; delta may be -inf
    lower.sum_exp *= 0.0f;
    lower.moment *= 0.0f;
  } else if (lower.max != max) {
    move_maximum(&lower, delta, exp_nonpositive(delta, kLog2e));
  }
  into->max = max;
  into->sum_exp += right.sum_exp;
  into->sum += right.sum;
  into->moment += right.moment;
  if (higher) into->argmax = right.argmax;
}

template <class T, Want want, class Z>
void stats_range(const Z& z, const void* row, int64_t begin, int64_t end, Partial* partial) {
  for (int64_t c = begin; c < end; c += kChunk) {
    merge(partial, chunk_stats<T, want>(z, row, c, c + kChunk < end ? c + kChunk : end),
          z.unit / Z::sum_unit);
  }
}

// The gradient of a logit, given z.value(x) and z.minus(x, reference).
template <class Z>
FSL_INLINE float grad_of(const Z& z, const RowConstants& g, float value, float u) {
  const float p = z.exp(u);
  if constexpr (__is_same(Z, Tilted)) {
    const float there = p == 0.0f ? 0.0f : u * z.unit;  // u may be -inf
    return p * multiply_add(there, g.tilt, g.softmax_factor) - g.smoothing;
  } else {
    return z.times_slope(p * g.softmax_factor - g.smoothing, value);
  }
}

template <class T, class Z>
float grad_at_target(const Z& z, const RowConstants& g, float x) {
  RowConstants at = g;
  at.smoothing += g.target_factor;
  return grad_of(z, at, z.value(x), z.minus(x, at.reference));
}

template <class T, class Z>
void grad_range(const Z& z, const RowConstants& g, const void* row, void* out, int64_t begin, int64_t end) {
  const bool owns = g.target_column >= begin && g.target_column < end;
  // Computed before the loop, because in place the loop overwrites the target's logit.
  const float at_target = owns ? grad_at_target<T>(z, g, element<T>(row, g.target_column)) : 0.0f;
  const Word<T>* w = words<T>(row, begin);
  Word<T>* o = const_cast<Word<T>*>(words<T>(out, begin));
  const int64_t n = (end - begin) / 2, whole = n - n % kLanes;
  const RowConstants local = g;
  const Z transform = z;
  // Safe in place: `out` is `row` or does not overlap it, and word i is read before it is written.
  transform.template blocks<T>(w, whole, [&](const auto& formula, int64_t i, int64_t stop) FSL_LAMBDA {
    const auto f = formula;
    for (; i < stop; i += kLanes) {
      prefetch_ahead<T>(w + i);
      const Group<T> group(w + i);
      float value[kGroup], u[kGroup];
#pragma omp simd
      for (int l = 0; l < kGroup; ++l) {
        value[l] = f.value(group.x[l]);
        u[l] = f.minus(group.x[l], local.reference);
      }
#pragma omp simd
      for (int l = 0; l < kLanes; ++l)
        o[i + l] =
            T::pack(grad_of(f, local, value[l], u[l]), grad_of(f, local, value[kLanes + l], u[kLanes + l]));
    }
  });
  auto* elements = static_cast<Element<T>*>(out);
  for (int64_t c = begin + whole * 2; c < end; ++c) {
    const float x = element<T>(row, c);
    elements[c] = T::round(grad_of(z, g, z.value(x), z.minus(x, g.reference)));
  }
  if (owns) elements[g.target_column] = T::round(at_target);
}

// Calls run(dtype tag, Plain, SmallCap or LargeCap).
template <class Run>
void with_types(Dtype dtype, const RowMath& math, Run run) {
  auto with_dtype = [&](auto tag) {
    if (math.softcap > kMostSmallCap) run(tag, LargeCap(math));
    else if (math.softcap > 0) run(tag, SmallCap(math));
    else run(tag, Plain(math));
  };
  if (dtype == Dtype::f32) with_dtype(F32{});
  else if (dtype == Dtype::bf16) with_dtype(BF16{});
  else with_dtype(F16{});
}

void stats(const StatsArgs& a, const void* row, int64_t begin, int64_t end, Partial* partial) {
  with_types(a.logits.dtype, a.math, [&](auto tag, auto z) {
    using T = decltype(tag);
    if (a.want == Want::loss) stats_range<T, Want::loss>(z, row, begin, end, partial);
    else if (a.want == Want::smoothing) stats_range<T, Want::smoothing>(z, row, begin, end, partial);
    else stats_range<T, Want::metrics>(z, row, begin, end, partial);
  });
}

void grad(const GradArgs& a, const RowConstants& g, const void* row, void* out, int64_t begin, int64_t end) {
  RowConstants scaled = g;
  scaled.softmax_factor *= a.math.logit_scale;
  scaled.smoothing *= a.math.logit_scale;
  scaled.target_factor *= a.math.logit_scale;
  scaled.tilt *= a.math.logit_scale;
  with_types(a.logits.dtype, a.math, [&](auto tag, auto z) {
    using T = decltype(tag);
    if constexpr (__is_same(decltype(z), Plain)) {
      if (a.entropy.grad) return grad_range<T>(Tilted(a.math), scaled, row, out, begin, end);
    }
    grad_range<T>(z, z.constants(scaled), row, out, begin, end);
  });
}

template <class T>
void rescale_row(void* row, int64_t columns, float ratio) {
  Word<T>* w = const_cast<Word<T>*>(words<T>(row, 0));  // not auto, which would drop Word's alignment
  const int64_t n = columns / 2;
  const auto scaled = [ratio](float x) { return canonical(x * ratio); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch_ahead<T>(w + i);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) w[i + l] = T::pack(scaled(T::lo(w[i + l])), scaled(T::hi(w[i + l])));
  }
  auto* elements = static_cast<Element<T>*>(row);
  for (int64_t c = i * 2; c < columns; ++c) elements[c] = T::round(scaled(T::lo(elements[c])));
}

void rescale(Dtype dtype, void* row, int64_t columns, float ratio) {
  with_types(dtype, {0, 0, 0, 1, 0, 0},
             [&](auto tag, auto) { rescale_row<decltype(tag)>(row, columns, ratio); });
}

float target_logit(const StatsArgs& a, const void* row, int64_t column) {
  float value = 0;
  with_types(a.logits.dtype, a.math,
             [&](auto tag, auto z) { value = z.statistic(element<decltype(tag)>(row, column)); });
  return value;
}

void exp_all(const float* in, float* out, int64_t n, float unit_log2) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive(canonical(in[i]), unit_log2);
}

}  // namespace

#define FSL_NAME(isa) kernels_##isa
#define FSL_EXPAND(isa) FSL_NAME(isa)
#define FSL_QUOTE(isa) #isa
#define FSL_STRING(isa) FSL_QUOTE(isa)

extern const RowKernels FSL_EXPAND(FSL_ISA);
const RowKernels FSL_EXPAND(FSL_ISA) = {FSL_STRING(FSL_ISA), stats,  grad, rescale, merge,
                                        target_logit,        exp_all};

}  // namespace fsl
