// Selects and launches a row_grad kernel.
#include "row_grad.cuh"

#include "dispatch.h"
#include "launch_table.h"

namespace fsl::gpu {

void row_grad(const GradArgs& a, const Chip& chip, void* stream) {
  check_rows(a.logits);
  const Line& line = line_for(chip, Kernel::row_grad, a.logits.columns);
  const int64_t segments = (a.logits.columns + line.segment - 1) / line.segment;
  const int parts = splits(chip, a.logits.count(), segments);
  const Grid grid{a.logits.count() * parts, line.threads};
  with_dtype(a.logits.dtype, [&](auto dtype) {
    with_bool(!same_skew(a.logits, a.grad), [&](auto shifted) {
      const auto run = [&](auto softcap, auto entropy) {
        launch("row_grad", row_grad_kernel<decltype(dtype), softcap(), shifted(), entropy()>, grid, stream, a,
               units_of(a.math), Divisor(parts), columns_of_part(segments, parts, line));
      };
      // There is no kernel with both; bindings.h has refused such a call.
      if (a.entropy.grad || a.scale) run(std::integral_constant<int, kNoCap>{}, std::true_type{});
      else with_cap(a.math, [&](auto softcap) { run(softcap, std::false_type{}); });
    });
  });
}

}  // namespace fsl::gpu
