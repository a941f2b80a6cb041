// The units of a row that has its own scale: 1 / its temperature.
#pragma once

#include "row_math.cuh"

namespace fsl::gpu {

// The same as units_of, on the device and without a softcap. `scale` is null or holds one number per row.
FSL_DEVICE Units units_of_row(const Units& z, const float* scale, uint32_t n) {
  if (!scale) return z;
  const float unit = scale[n], unit_log2 = unit * kLog2e;
  const int power =
      284 - static_cast<int>(bits(unit_log2) >> 23);  // the exponent of far, as a float holds it
  const int held = power < 33 ? 33 : power > 255 ? 255 : power;
  return {unit, unit_log2, from_bits(static_cast<uint32_t>(held) << 23), 0.0f, 0.0f, unit};
}

}  // namespace fsl::gpu
