"""bf16 matrix products on CPUs that have no instruction for them."""

import torch

from fused_sft_loss.linear.products import dtype_of_products


def compute_in_fp32_without_instructions() -> None:
    """Replace torch.matmul for bf16 tensors, for the rest of this process, if this CPU has no
    instruction for bf16 products.

    Without AVX-512 PyTorch multiplies bf16 matrices up to 400 times slower than fp32 ones, and a
    step of a small model takes a minute. The sum of products is fp32 in both cases.
    """
    if dtype_of_products(torch.empty(0, dtype=torch.bfloat16)) == torch.bfloat16:
        return
    plain = torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor, **options) -> torch.Tensor:
        if a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and not options:
            return plain(a.float(), b.float()).bfloat16()
        return plain(a, b, **options)

    torch.matmul = torch.Tensor.matmul = torch.Tensor.__matmul__ = matmul
