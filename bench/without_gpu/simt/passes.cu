// Runs csrc/'s launchers on one small problem and prints a hash of each result, for sanitizers and random
// thread orders. Arguments: multiprocessors of the chip (0: no row is split over blocks), seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "launch.h"
#include "row_math.cuh"

namespace {

using namespace fsl;
constexpr int kColumns = 40001;

// Where the rows lie: `offset` elements past a multiple of 16 bytes, `stride` elements apart.
struct Layout {
  int rows, offset, stride;
};
constexpr Layout kShiftedRows{3, 3, 40007}, kAlignedRows{4, 0, 40008};

template <class T>
void print(const char* name, const std::vector<T>& values) {
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}

struct Problem {
  int n, offset, stride;  // of Layout
  std::vector<uint16_t> logits = std::vector<uint16_t>(n * stride + offset);
  std::vector<int64_t> labels{21, 40000, 17, 3}, target = std::vector<int64_t>(n);
  std::vector<float> mask{1, 0.5f, 0, 2}, weight = std::vector<float>(n);
  std::vector<int32_t> count{0};
  std::vector<float> weight_sum{0};
  gpu::Chip chip;

  Rows rows(std::vector<uint16_t>& memory) {
    return {memory.data() + offset, Dtype::bf16, 1, n, kColumns, kColumns, 0, stride};
  }

  Problem(const Layout& layout, int multiprocessors)
      : n(layout.rows),
        offset(layout.offset),
        stride(layout.stride),
        chip{FSL_SIMT == 32 ? 90 : 0x942, multiprocessors} {
    uint32_t state = 1;
    for (uint16_t& x : logits) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<uint16_t>(state >> 16 & 0x80ffu) | 0x3f00u;  // either sign, from 1/2 to 4
    }
    gpu::row_targets({labels.data(), mask.data(), nullptr, 1, n, 0, n, 1, n, 1, false, -100, kColumns,
                      target.data(), weight.data(), count.data(), weight_sum.data()},
                     nullptr);
    print("count", count);
    print("weight_sum", weight_sum);
  }

  // The upstream gradient: each row's loss times its weight.
  RowFactor factor() const { return {weight.data(), 1, nullptr, nullptr}; }

  void run(Want want, float softcap, float smoothing) {
    const int columns = static_cast<int>(want);
    const RowMath math{0, kColumns, smoothing, 0, softcap};
    std::vector<float> stats(n * columns), loss(n), normalizer(n * kNormalizer), lse(n), log_prob(n),
        entropy(n);
    std::vector<uint8_t> correct(n);
    const StatsArgs args{rows(logits), math, target.data(), weight.data(), want, stats.data()};
    std::vector<float> parts(gpu::row_stats_parts(args, chip));
    gpu::row_stats(args, parts.data(), chip, nullptr);
    print("stats", stats);
    const bool metrics = want == Want::metrics;
    gpu::merge(
        {stats.data(), 1, n, columns, 0, target.data(), weight.data(), math, loss.data(), normalizer.data()},
        {lse.data(), metrics ? log_prob.data() : nullptr, correct.data(), entropy.data()}, nullptr);
    print("loss", loss);
    print("entropy", entropy);
    if (metrics) return tokens(args);
    std::vector<uint16_t> apart(logits.size() + 1),
        same = logits;  // out of place, with another alignment; and in place
    Rows grad = rows(apart);
    grad.data = apart.data() + offset + 1;
    const auto args_to = [&](const Rows& in, const Rows& out) {
      return GradArgs{in, out, math, target.data(), normalizer.data(), factor(), nullptr};
    };
    gpu::row_grad(args_to(rows(logits), grad), chip, nullptr);
    gpu::row_grad(args_to(rows(same), rows(same)), chip, nullptr);
    apart.erase(apart.begin());
    for (int row = 0; row < n; ++row)  // copy the padding between rows, which no kernel writes
      for (int i = kColumns; i < stride; ++i)
        apart[offset + row * stride + i] = same[offset + row * stride + i];
    for (int i = 0; i < offset; ++i) apart[i] = same[i];
    print("grad", same);
    if (same != apart) std::printf("in place is another gradient\n");
    one_read(math, same, loss);
  }

  // Statistics and gradient of rows with their own scale and the gradient of their entropy.
  void tokens(StatsArgs args) {
    std::vector<float> scale{0.5f, 1.5f, 0, 1}, loss(n), normalizer(n * kNormalizer), entropy(n), lse(n),
        log_prob(n), of_entropy{0.25f, -2, 1, 0};
    std::vector<uint8_t> correct(n);
    std::vector<uint16_t> same = logits;
    args.scale = scale.data();
    std::vector<float> parts(gpu::row_stats_parts(args, chip));
    gpu::row_stats(args, parts.data(), chip, nullptr);
    gpu::merge({args.stats, 1, n, static_cast<int>(args.want), 0, target.data(), weight.data(), args.math,
                loss.data(), normalizer.data(), scale.data()},
               {lse.data(), log_prob.data(), correct.data(), entropy.data()}, nullptr);
    print("entropy of tokens", entropy);
    gpu::row_grad({rows(same),
                   rows(same),
                   args.math,
                   target.data(),
                   normalizer.data(),
                   factor(),
                   nullptr,
                   scale.data(),
                   {of_entropy.data(), 1, entropy.data()}},
                  chip, nullptr);
    print("grad of tokens", same);
  }

  // The same by row_stats_grad, then rescaled to twice the factor, which is exact for a power of two.
  void one_read(const RowMath& math, std::vector<uint16_t> wanted, const std::vector<float>& wanted_loss) {
    if (!gpu::one_read_gains(math)) return;
    std::vector<float> loss(n), normalizer(n * kNormalizer), twice(n);
    std::vector<uint16_t> same = logits;
    const GradArgs args{rows(same), rows(same), math, target.data(), normalizer.data(), factor(), nullptr};
    gpu::row_stats_grad({args, weight.data(), loss.data(), normalizer.data()}, chip, nullptr);
    print("one read", same);
    int far = 0;
    for (size_t i = 0; i < same.size(); ++i) far += std::abs(same[i] - wanted[i]) > 1;
    for (int row = 0; row < n; ++row) far += std::abs(loss[row] - wanted_loss[row]) > 4e-6f;
    if (far) std::printf("one read is another gradient or loss, at %d places\n", far);
    for (int row = 0; row < n; ++row) twice[row] = 2 * weight[row];
    gpu::row_rescale({rows(same), {twice.data(), 1, nullptr, nullptr}, weight.data()}, chip, nullptr);
    print("rescaled", same);
  }
};

}  // namespace

int main(int, char** arguments) {
  simt::set_seed(std::atoi(arguments[2]));
  const int multiprocessors = std::atoi(arguments[1]);
  Problem problem(kShiftedRows, multiprocessors);
  problem.run(Want::loss, 0, 0);
  problem.run(Want::smoothing, 20.0f, 0.1f);
  problem.run(Want::loss, 40.0f, 0);
  problem.run(Want::metrics, 0, 0);
  Problem(kAlignedRows, multiprocessors).run(Want::smoothing, 0, 0.1f);
}
