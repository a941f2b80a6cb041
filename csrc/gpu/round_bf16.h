// Rounding to bf16 by integer arithmetic, for a platform without an instruction for it. The platform defines
// FSL_DEVICE before it includes this.
#pragma once

#include <cstdint>

namespace fsl::gpu {

FSL_DEVICE uint32_t upper_half_rounded(uint32_t bits) { return bits + 0x7fffu + (bits >> 16 & 1u); }

// The bits of two floats, rounded to nearest even. A NaN stays one only if its low half is clear, as it is in
// those that arithmetic makes of bf16 logits and of quiet row constants.
FSL_DEVICE uint32_t pack_bf16_bits(uint32_t low, uint32_t high) {
  return upper_half_rounded(low) >> 16 | (upper_half_rounded(high) & 0xffff0000u);
}

}  // namespace fsl::gpu
