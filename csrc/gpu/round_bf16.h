// Rounding to bf16 by integer arithmetic, for platforms without an instruction for it. The platform defines
// FSL_DEVICE before it includes this file.
#pragma once

#include <cstdint>

namespace fsl::gpu {

FSL_DEVICE uint32_t upper_half_rounded(uint32_t bits) { return bits + 0x7fffu + (bits >> 16 & 1u); }

// Rounds the bits of two floats to nearest even. A NaN stays a NaN only if its low half is clear. That holds
// for every NaN that arithmetic produces from bf16 logits and quiet row constants.
FSL_DEVICE uint32_t pack_bf16_bits(uint32_t low, uint32_t high) {
  return upper_half_rounded(low) >> 16 | (upper_half_rounded(high) & 0xffff0000u);
}

}  // namespace fsl::gpu
