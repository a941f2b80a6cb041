#include "backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include "pages.h"
#include "row_kernels.h"
#include "parallel.h"

namespace fsl {

#define FSL_DECLARE(isa) extern const RowKernels kernels_##isa;
FSL_ISAS(FSL_DECLARE)

GompParallel loaded_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  static const auto gomp = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return gomp;
#else
  return nullptr;
#endif
}

namespace {

bool runs_here(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(isa, "baseline");
}

const RowKernels* all_kernels() {
#define FSL_LIST(isa) kernels_##isa,
  static const RowKernels all[] = {FSL_ISAS(FSL_LIST)};
  return all;
}

constexpr int kKernelSets = 0
#define FSL_COUNT(isa) +1
    FSL_ISAS(FSL_COUNT);

const RowKernels* fastest() {
  const RowKernels* k = all_kernels();
  while (!runs_here(k->isa)) ++k;  // the last one is `baseline`, which runs anywhere
  return k;
}

const RowKernels*& chosen() {
  static const RowKernels* kernels = fastest();
  return kernels;
}

size_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

char* at(const Rows& rows, int64_t row, int64_t column = 0) {
  const int64_t element = row / rows.seq * rows.stride_b + row % rows.seq * rows.stride_s + column;
  return static_cast<char*>(rows.data) + element * static_cast<int64_t>(bytes_of(rows.dtype));
}

int64_t chunks_of(const Rows& rows) { return (rows.valid + kChunk - 1) / kChunk; }

// Whether too few rows have a nonzero factor(row) to keep all threads busy with whole rows.
template <class Factor>
bool too_few(const Factor& factor, int64_t rows, int threads) {
  int64_t busy = 0;
  for (int64_t row = 0; row < rows; ++row) busy += factor(row) != 0;
  return busy < 4 * static_cast<int64_t>(threads);
}

void write_stats(const StatsArgs& a, const RowKernels& kernels, int64_t row, const Partial& p) {
  float* out = a.stats + row * static_cast<int64_t>(a.want);
  out[kMaximum] = p.max;
  out[kSumExp] = p.sum_exp;
  const int64_t column = a.target[row] - a.math.vocab_start;
  const bool owned = a.target[row] >= 0 && column >= 0 && column < a.logits.valid;
  out[kTarget] = owned ? kernels.target_logit(a, at(a.logits, row), column) : 0.0f;
  if (a.want >= Want::smoothing) out[kSum] = p.sum;
  if (a.want == Want::metrics) {
    out[kArgmax] = static_cast<float>(a.math.vocab_start + p.argmax);
    out[kMoment] = p.moment;
  }
}

// The arguments of one row, which may have its own scale.
template <class Args>
Args for_row(const Args& a, int64_t row) {
  Args own = a;
  own.math = cpu::of_row(a.math, a.scale, row);
  return own;
}

void whole_row_stats(const StatsArgs& a, const RowKernels& kernels, int64_t row) {
  Partial partial;
  kernels.stats(for_row(a, row), at(a.logits, row), 0, a.logits.valid, &partial);
  write_stats(a, kernels, row, partial);
}

float quiet(float x) { return std::isnan(x) ? std::nanf("") : x; }  // see upper() in row_math.h

float factor_of(const RowFactor& f, int64_t row) {
  if (f.weight && f.weight[row] == 0) return 0;
  float grad = f.grad[row * f.stride];
  if (f.weight_sum && *f.weight_sum > 0) grad /= *f.weight_sum;
  return f.weight ? grad * f.weight[row] : grad;
}

// The negative upstream gradient of the row's entropy.
float tilt_of(const GradArgs& a, int64_t row) {
  if (!a.entropy.grad || (a.factor.weight && a.factor.weight[row] == 0)) return 0;
  return -a.entropy.grad[row * a.entropy.stride];
}

bool has_gradient(const GradArgs& a, int64_t row) {
  return factor_of(a.factor, row) != 0 || tilt_of(a, row) != 0;
}

RowConstants row_constants(const GradArgs& a, int64_t row, float any_factor) {
  const RowMath& math = a.math;
  const float* normalizer = a.normalizer + row * kNormalizer;
  const float factor = quiet(any_factor), max = quiet(normalizer[kRowMax]), sum = quiet(normalizer[kRowSum]);
  const float eps = math.label_smoothing;
  const float of_z_loss = math.z_loss > 0 ? 2 * math.z_loss * (max * math.unit() + std::log(sum)) : 0.0f;
  RowConstants constants{max,
                         factor * (1 + of_z_loss) / sum,
                         factor * (eps / static_cast<float>(math.vocab_size)),
                         factor * (1 - eps),
                         a.target[row] < 0 ? -1 : a.target[row] - math.vocab_start,
                         0};
  if (a.entropy.grad) {
    const float tilt = quiet(tilt_of(a, row)), mean = std::log(sum) - quiet(a.entropy.entropy[row]);
    constants.softmax_factor = (factor - tilt * mean) / sum;
    constants.tilt = tilt / sum;
  }
  return constants;
}

// From this size in bytes, zeros of a gradient are written with stores that bypass the caches. An ordinary
// store first reads the line that it overwrites, and the cache cannot keep a gradient this large until it is
// read (measured: 8.5 ms -> 3.9 ms for 128 MiB on two cores).
constexpr int64_t kStreamed = int64_t{16} << 20;

void stream_zeros(char* begin, size_t bytes) {
#if defined(__SSE2__)
  const size_t head = std::min<size_t>(-reinterpret_cast<uintptr_t>(begin) % 16, bytes);
  std::memset(begin, 0, head);
  const size_t whole = (bytes - head) / 16 * 16;
  for (size_t i = head; i < head + whole; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(begin + i), _mm_setzero_si128());
  std::memset(begin + head + whole, 0, bytes - head - whole);
  _mm_sfence();
#else
  std::memset(begin, 0, bytes);
#endif
}

void zero(const Rows& rows, int64_t row, int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(end - begin) * bytes_of(rows.dtype);
  const int64_t total = rows.count() * rows.columns * static_cast<int64_t>(bytes_of(rows.dtype));
  if (total >= kStreamed) stream_zeros(at(rows, row, begin), bytes);
  else std::memset(at(rows, row, begin), 0, bytes);
}

// Claims the pages of a new gradient. The gradient must be dense, so that every byte will be written; its
// rows may lie in any order.
void claim_gradient(const GradArgs& a, int threads) {
  const Rows& rows = a.grad;
  if (rows.data == a.logits.data || a.stored || rows.count() == 0) return;
  const int64_t elements = rows.count() * rows.columns;
  const int64_t last = (rows.batch - 1) * rows.stride_b + (rows.seq - 1) * rows.stride_s + rows.columns;
  if (last == elements)
    claim_pages(rows.data, elements * static_cast<int64_t>(bytes_of(rows.dtype)), threads);
}

// Writes columns [part * width, part * width + width) of a row's gradient; the last part also zeroes the
// padding.
void write_grad(const GradArgs& a, const RowKernels& kernels, int64_t row, int64_t part, int64_t width) {
  const int64_t columns = a.logits.columns, valid = a.logits.valid;
  const float factor = factor_of(a.factor, row);
  if (a.stored && a.stored[row] == factor) return;
  if (factor == 0 && tilt_of(a, row) == 0) {
    if (part == 0) zero(a.grad, row, 0, columns);
    return;
  }
  const int64_t begin = part * width, end = std::min(begin + width, valid);
  kernels.grad(for_row(a, row), row_constants(a, row, factor), at(a.logits, row), at(a.grad, row), begin,
               end);
  if (end == valid) zero(a.grad, row, valid, columns);
}

}  // namespace

namespace cpu {

void row_stats(const StatsArgs& a, int threads) {
  const RowKernels& kernels = *chosen();
  const int64_t rows = a.logits.count(), chunks = chunks_of(a.logits);
  if (rows == 0) return;  // empty tensors have null addresses
  std::memset(a.stats, 0, sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(a.want));
  if (!too_few([&](int64_t row) { return a.weight[row]; }, rows, threads)) {
    parallel_for(rows, threads, [&](int64_t row) {
      if (a.weight[row] != 0) whole_row_stats(a, kernels, row);
    });
    return;
  }
  std::vector<int64_t> busy;
  for (int64_t row = 0; row < rows; ++row)
    if (a.weight[row] != 0) busy.push_back(row);
  std::vector<Partial> partials(busy.size() * static_cast<size_t>(chunks));
  parallel_for(static_cast<int64_t>(partials.size()), threads, [&](int64_t item) {
    const int64_t begin = item % chunks * kChunk;
    const int64_t end = std::min(begin + kChunk, a.logits.valid);
    const int64_t row = busy[item / chunks];
    kernels.stats(for_row(a, row), at(a.logits, row), begin, end, &partials[item]);
  });
  for (size_t i = 0; i < busy.size(); ++i) {
    Partial row;
    const float unit = for_row(a, busy[i]).math.unit();
    for (int64_t c = 0; c < chunks; ++c) kernels.merge(&row, partials[i * chunks + c], unit);
    write_stats(a, kernels, busy[i], row);
  }
}

void row_grad(const GradArgs& a, int threads) {
  const RowKernels& kernels = *chosen();
  const int64_t rows = a.logits.count(), valid = a.logits.valid;
  const bool split =
      valid > kChunk && too_few([&](int64_t row) { return has_gradient(a, row); }, rows, threads);
  const int64_t parts = split ? chunks_of(a.logits) : 1;
  const int64_t width = split ? kChunk : valid;
  claim_gradient(a, threads);
  parallel_for(rows * parts, threads, [&](int64_t item) {
    // Start with the last row: forward read it last, so the cache may still hold it.
    write_grad(a, kernels, rows - 1 - item / parts, item % parts, width);
  });
}

// One thread takes both passes over a row, so the second pass reads the core's own cache. If there are too
// few rows, threads share each row instead, and the second pass reads the last-level cache.
void row_stats_grad(const StatsGradArgs& a, int threads) {
  const RowKernels& kernels = *chosen();
  const GradArgs& g = a.grad;
  const int64_t rows = g.logits.count();
  const Want want = wanted_by(g.math);
  const int64_t statistics = static_cast<int64_t>(want);
  std::vector<float> scratch(static_cast<size_t>(rows * statistics));
  const StatsArgs stats{g.logits, g.math, g.target, a.weight, want, scratch.data()};
  const MergeArgs loss{scratch.data(), 1,        rows,   statistics, 0,
                       g.target,       a.weight, g.math, a.loss,     a.normalizer};
  if (too_few([&](int64_t row) { return a.weight[row]; }, rows, threads)) {
    row_stats(stats, threads);
    merge(loss);
    row_grad(g, threads);
    return;
  }
  claim_gradient(g, threads);
  parallel_for(rows, threads, [&](int64_t row) {
    if (a.weight[row] != 0) whole_row_stats(stats, kernels, row);
    merge_row(loss, row);
    write_grad(g, kernels, row, 0, g.logits.valid);
  });
}

void row_rescale(const RescaleArgs& a, int threads) {
  const RowKernels& kernels = *chosen();
  parallel_for(a.grad.count(), threads, [&](int64_t row) {
    const float factor = factor_of(a.factor, row), stored = a.stored[row];
    if (factor == stored) return;
    if (factor == 0) zero(a.grad, row, 0, a.grad.columns);
    else kernels.rescale(a.grad.dtype, at(a.grad, row), a.grad.valid, factor / stored);
  });
}

int loss(const LossArgs& a, int threads) {
  const Want want = wanted_by(a.math);
  const int64_t rows = a.logits.count(), statistics = static_cast<int64_t>(want);
  const bool reduced = a.reduction != Reduction::none;
  const TargetsArgs& t = a.targets;
  const int faults = row_targets(t);
  std::vector<float> stats(static_cast<size_t>(rows * statistics)), scratch(reduced ? rows : 0);
  float* losses = reduced ? scratch.data() : a.result;
  row_stats({a.logits, a.math, t.target, t.weight, want, stats.data()}, threads);
  merge({stats.data(), 1, rows, statistics, 0, t.target, t.weight, a.math, losses, a.normalizer});
  if (reduced) reduce({losses, rows, a.reduction == Reduction::mean ? t.weight_sum : nullptr, a.result});
  return faults;
}

void exp(const float* in, float* out, int64_t n, float unit_log2) { chosen()->exp(in, out, n, unit_log2); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kKernelSets; ++i)
    if (runs_here(all_kernels()[i].isa)) names.emplace_back(all_kernels()[i].isa);
  return names;
}

void use_isa(const std::string& name) {
  for (int i = 0; i < kKernelSets; ++i) {
    const RowKernels& kernels = all_kernels()[i];
    if (name == kernels.isa && runs_here(kernels.isa)) {
      chosen() = &kernels;
      return;
    }
  }
  std::string known;
  for (const std::string& isa : isas()) known += " " + isa;
  throw std::invalid_argument("expected an instruction set this processor runs (" + known.substr(1) +
                              "), got " + name);
}

std::string isa() { return chosen()->isa; }

std::string threading() { return loaded_openmp() ? "OpenMP runtime of this process" : "std::thread"; }

}  // namespace cpu
}  // namespace fsl
