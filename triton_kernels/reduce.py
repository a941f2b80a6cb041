"""The sum or the mean of N losses. One program adds them in a fixed order."""

import torch
import triton
import triton.language as tl

from .launch import Chip, Launch, targets_options

#: Losses that the program loads at once.
BLOCK = 2048


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(
    losses,  # [N] fp32
    weight_sum,  # [1] fp32 divisor of the mean, where 0 counts as 1; None: the sum
    result,  # [1] fp32
    rows,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, BLOCK):
        sums += tl.load(losses + first + lane, mask=first + lane < rows, other=0.0)
    total = tl.sum(sums, 0)
    if weight_sum is not None:
        divisor = tl.load(weight_sum)
        total /= tl.where(divisor > 0.0, divisor, 1.0)
    tl.store(result, total)


def plan(
    chip: Chip, losses: torch.Tensor, weight_sum: torch.Tensor | None, result: torch.Tensor
) -> list[Launch]:
    """The launch that reduces the losses, in a list."""
    arguments = {
        "losses": losses,
        "weight_sum": weight_sum,
        "result": result,
        "rows": losses.numel(),
        "BLOCK": BLOCK,
    }
    return [Launch(reduce_kernel, 1, arguments, targets_options(chip))]
