// Gradient of the logits, row by row, from the logits and each row's normalizer (docs/design.md, The
// gradient). It is computed in fp32 and rounded once. Each element depends only on its own logit, so it may
// overwrite the logits. A row with factor 0 is not read: it gets stored zeros.
//
// A thread stores 16 aligned bytes of the output at a time, from the row's first aligned address on. Columns
// before it (the head) and after the last whole vector are written one by one.
#pragma once

#include "row_units.cuh"
#include "rows.cuh"

namespace fsl::gpu {

// The constants of a row's gradient, which is
// dz/dx * (p * (softmax_factor + tilt * w) - smoothing - [target] * target_factor) with p = 2^w and
// w = x * unit_log2 - reference. softmax_factor and tilt include the division by the sum and the factor
// 2^-rest (see reference_of). tilt is the part of the gradient of an entropy that depends on w.
struct GradConstants {
  float unit_log2, reference, softmax_factor, smoothing, target_factor;
  int own;     // the target's column, -1 if it is not in this shard
  float tilt;  // with kEntropy only
};

FSL_DEVICE float factor_of(const RowFactor& f, uint32_t n) {
  if (f.weight && f.weight[n] == 0) return 0.0f;
  float grad = f.grad[n * f.stride];
  if (f.weight_sum && *f.weight_sum > 0) grad /= *f.weight_sum;
  return f.weight ? grad * f.weight[n] : grad;
}

// The negative upstream gradient of the row's entropy.
FSL_DEVICE float tilt_of(const GradArgs& a, uint32_t n) {
  if (!a.entropy.grad || (a.factor.weight && a.factor.weight[n] == 0)) return 0.0f;
  return -a.entropy.grad[n * a.entropy.stride];
}

template <int kSoftcap>
FSL_DEVICE GradConstants grad_constants(const GradArgs& a, const Units& z, uint32_t n, float any_factor,
                                        float any_top, float any_total) {
  const RowMath& math = a.math;
  const float top = quiet(any_top), total = quiet(any_total);
  const float factor = quiet(any_factor), slope = kSoftcap ? 1.0f : z.logit_scale;
  const float of_z_loss = math.z_loss > 0 ? 2.0f * math.z_loss * fma(top, z.unit, log(total)) : 0.0f;
  const Reference reference = reference_of(top, z);
  return {broadcast_first_lane(reference.unit_log2),
          reference.rounded,
          factor * (1.0f + of_z_loss) * exp2(-reference.rest) * reciprocal(total) * slope,
          factor * (math.label_smoothing * reciprocal(static_cast<float>(math.vocab_size))) * slope,
          factor * (1.0f - math.label_smoothing) * slope,
          own_column(a.target[n], math.vocab_start, a.logits),
          0.0f};
}

// Adds the gradient of the row's entropy: p * tilt * (u - mean) with u = (w - rest) * ln 2 and the mean of u
// over p. `any_total` is the row's sum.
FSL_DEVICE void add_entropy(GradConstants& g, const GradArgs& a, const Units& z, uint32_t n, float any_tilt,
                            float any_top, float any_total) {
  if (!a.entropy.grad) return;
  const float total = quiet(any_total), tilt = quiet(any_tilt), rest = reference_of(quiet(any_top), z).rest;
  const float of_p = tilt * exp2(-rest) * reciprocal(total) * z.logit_scale;
  const float mean = log(total) - quiet(a.entropy.entropy[n]);
  g.softmax_factor = fma(-of_p, fma(rest, kLn2, mean), g.softmax_factor);
  g.tilt = of_p * kLn2;
}

template <int kSoftcap, bool kEntropy = false>
FSL_DEVICE float gradient(float x, const GradConstants& g, const Units& z, bool target) {
  const Capped c = capped_and_slope<kSoftcap>(x, z);
  const float w = fma(c.value, g.unit_log2, -g.reference), p = exp2(w);
  // w may be -inf where p is 0.
  const float slope = kEntropy ? fma(p == 0 ? 0.0f : w, g.tilt, g.softmax_factor) : g.softmax_factor;
  const float grad = fma(p, slope, target ? -(g.smoothing + g.target_factor) : -g.smoothing);
  return kSoftcap ? grad * (c.slope * z.logit_scale) : grad;
}

// Writes columns [begin, end) of one row; columns from `valid` on are padding. At `begin` the output is
// aligned to 16 bytes, and the logits are `skew` bytes past a multiple of 16.
template <class T, int kSoftcap, bool kShifted, bool kEntropy = false>
struct GradWriter {
  static FSL_DEVICE void zeros(const Row& out, int begin, int end) {
    const uint32_t words[T::kWords] = {};
    int column = begin + 8 * thread_id();
    for (; column + 8 <= end; column += 8 * block_threads())
      store_eight<T>(out.start + int64_t{column} * T::kBytes, words);
    FSL_UNROLL_BY(1) for (; column < end; ++column) T::put(out.start + int64_t{column} * T::kBytes, 0.0f);
  }

  static FSL_DEVICE void each(const Row& in, const Row& out, const GradConstants& g, const Units& z,
                              int column, int end, int valid) {
    FSL_UNROLL_BY(1) for (; column < end; ++column) {
      const float grad =
          column < valid ? gradient<kSoftcap, kEntropy>(load_one<T>(in, column), g, z, false) : 0.0f;
      T::put(out.start + int64_t{column} * T::kBytes, grad);
    }
  }

  static FSL_DEVICE void in_place_of_logits(uint32_t (&words)[T::kWords], const GradConstants& g,
                                            const Units& z) {
    float x[8];
    scheduling_barrier();
    FSL_UNROLL for (int i = 0; i < 8; ++i) x[i] =
        gradient<kSoftcap, kEntropy>(T::element(words, i), g, z, false);
    T::put(words, x);
  }

  // kRuns independent loads, then the arithmetic and the stores. `first` is the thread's first column.
  static FSL_DEVICE void whole_tile(const Row& in, const Row& out, const GradConstants& g, const Units& z,
                                    int first, int skew) {
    const int stride = 8 * block_threads();
    uint32_t words[kRuns][T::kWords];
    FSL_UNROLL for (int r = 0; r < kRuns; ++r)
        load_eight<T, kShifted>(words[r], in.start + int64_t{first + r * stride} * T::kBytes, skew);
    FSL_UNROLL for (int r = 0; r < kRuns; ++r) {
      in_place_of_logits(words[r], g, z);
      store_eight_of_warp<T, kShifted>(out.start + int64_t{first + r * stride} * T::kBytes, words[r]);
    }
  }

  // A tile at either end of the row, one vector at a time: several at once would cost all tiles registers. A
  // vector that reaches beyond `last`, or whose chunks reach out of the row, is done logit by logit, up to
  // `end`.
  static FSL_DEVICE void edge_tile(const Row& in, const Row& out, const GradConstants& g, const Units& z,
                                   int first, int skew, int last, int padding, int end) {
    const int stride = 8 * block_threads();
    FSL_UNROLL_BY(1) for (int r = 0; r < kRuns; ++r) {
      const int column = first + r * stride;
      if (column >= padding) return;
      if (column + 8 <= last && chunks_inside<T, kShifted>(in, column, 8, skew)) {
        uint32_t words[T::kWords];
        load_eight<T, kShifted>(words, in.start + int64_t{column} * T::kBytes, skew);
        in_place_of_logits(words, g, z);
        store_eight<T>(out.start + int64_t{column} * T::kBytes, words);
      } else {
        each(in, out, g, z, column, column + 8 < end ? column + 8 : end, last);
      }
    }
  }

  // The end of the vocabulary within columns [begin, end).
  static FSL_DEVICE int last_of(int begin, int end, int valid) {
    return valid < begin ? begin : valid < end ? valid : end;
  }

  static FSL_DEVICE void columns(const Row& in, const Row& out, const GradConstants& g, const Units& z,
                                 int begin, int end, int valid, int skew) {
    const int mine = 8 * thread_id(), tile = 8 * kRuns * block_threads(), last = last_of(begin, end, valid);
    const int padding =
        last == end ? end : begin + (last - begin + 7) / 8 * 8;  // from here on zeros, in whole vectors
    const auto edge = [&](int first) {
      edge_tile(in, out, g, z, first + mine, skew, last, padding, end);
      return first + tile;
    };
    int first = begin;
    if (kShifted && !chunks_inside<T, kShifted>(in, first, 0, skew)) first = edge(first);
    for (; first + tile <= last && chunks_inside<T, kShifted>(in, first, tile, skew); first += tile)
      whole_tile(in, out, g, z, first + mine, skew);
    while (first < padding) first = edge(first);
    zeros(out, padding, end);
  }

  // The thread that stores `column` in a call of columns() that starts at `begin`, if the vocabulary ends at
  // `last`.
  static FSL_DEVICE int writer(int begin, int last, int column) {
    const int past = column - begin, thread = past / 8 % block_threads(), tile = 8 * kRuns * block_threads();
    const bool traded = kTrades<T, kShifted> && begin + past / tile * tile + tile <= last;
    return traded ? thread / 2 * 2 + past / 4 % 2 : thread;
  }

  // zeros() and columns() for a range that starts at any column. any_columns() takes no padding.
  static FSL_DEVICE void zero_columns(const Row& out, int begin, int end) {
    const int first = aligned_column<T>(out, begin), odd = begin + thread_id();
    if (odd < first && odd < end) T::put(out.start + int64_t{odd} * T::kBytes, 0.0f);
    zeros(out, first, end);
  }

  static FSL_DEVICE void any_columns(const Row& in, const Row& out, const GradConstants& g, const Units& z,
                                     int begin, int end) {
    const int first = aligned_column<T>(out, begin), odd = begin + thread_id();
    if (odd < first && odd < end) each(in, out, g, z, odd, odd + 1, end);
    if (first < end) columns(in, out, g, z, first, end, end, (in.skew + first % 16 * T::kBytes) % 16);
  }
};

// The blocks of a row take `each` columns each. kEntropy: also the gradient of an entropy, and rows that may
// have their own scale.
template <class T, int kSoftcap, bool kShifted, bool kEntropy>
FSL_KERNEL(512, (kSoftcap ? 4 : (kEntropy ? 6 : 8)))
row_grad_kernel(GradArgs a, Units z_of_all, Divisor by_parts, int each) {
  using Kernel = GradWriter<T, kSoftcap, kShifted, kEntropy>;
  // Start with the last row: forward read it last, so the L2 or Infinity Cache may still hold it. Measured on
  // an H100: no difference at 1 GiB of logits, up to a quarter of both passes' time saved at 250 to 800 MB.
  const uint32_t blocks = static_cast<uint32_t>(a.grad.batch * a.grad.seq) * by_parts.value;
  const Divided block = divide(blocks - 1 - block_id(), by_parts);
  const uint32_t n = block.quotient, part = block.rest;
  const float factor = factor_of(a.factor, n), tilt = kEntropy ? tilt_of(a, n) : 0.0f;
  if (a.stored && a.stored[n] == factor) return;
  const int width = static_cast<int>(a.grad.columns), valid = static_cast<int>(a.logits.valid);
  const Row out = row_at<T>(a.grad, n), in = row_at<T>(a.logits, n);
  const int before = aligned_column<T>(out, 0), head = before < width ? before : width;
  const int begin = head + part * each, end = width - begin < each ? width : begin + each;
  const bool in_head = part == 0 && thread_id() < head;
  if (factor == 0 && tilt == 0) {
    if (in_head) T::put(out.start + thread_id() * T::kBytes, 0.0f);
    Kernel::zeros(out, begin, end);
    return;
  }
  const float* normalizer = a.normalizer + int64_t{n} * kNormalizer;
  const Units z = kEntropy ? units_of_row(z_of_all, a.scale, n) : z_of_all;
  GradConstants g = grad_constants<kSoftcap>(a, z, n, factor, normalizer[kRowMax], normalizer[kRowSum]);
  if (kEntropy) add_entropy(g, a, z, n, tilt, normalizer[kRowMax], normalizer[kRowSum]);
  // The thread that writes the target's column computes its gradient again, so that no other thread compares
  // columns. It reads the logit first, because in place the gradient overwrites it.
  const bool owner =
      g.own < head ? in_head && g.own == thread_id()
                   : g.own >= begin && g.own < end &&
                         Kernel::writer(begin, Kernel::last_of(begin, end, valid), g.own) == thread_id();
  const float own = owner ? load_one<T>(in, g.own) : 0.0f;
  if (in_head) Kernel::each(in, out, g, z, thread_id(), thread_id() + 1, valid);
  Kernel::columns(in, out, g, z, begin, end, valid, (in.skew + head * T::kBytes) % 16);
  if (owner) T::put(out.start + int64_t{g.own} * T::kBytes, gradient<kSoftcap, kEntropy>(own, g, z, true));
}

}  // namespace fsl::gpu
