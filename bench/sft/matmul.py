"""bf16 matrix products on CPUs that have no instruction for them."""

import time

import torch

#: Where bf16 takes more than this times as long as fp32, products are computed in fp32.
SLOWER = 4


def compute_in_fp32_if_faster() -> None:
    """Replace torch.matmul for bf16 tensors on a CPU, for the rest of this process.

    Without AVX-512 PyTorch multiplies bf16 matrices up to 400 times slower than fp32 ones, and a
    step of a small model takes a minute. The sum of products is fp32 in both cases.
    """
    if _seconds(torch.bfloat16) < SLOWER * _seconds(torch.float32):
        return
    plain = torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor, **options) -> torch.Tensor:
        if a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and not options:
            return plain(a.float(), b.float()).bfloat16()
        return plain(a, b, **options)

    torch.matmul = torch.Tensor.matmul = torch.Tensor.__matmul__ = matmul


def _seconds(dtype: torch.dtype) -> float:
    """Of a product like that of an output layer's backward; the faster of two."""
    grad, weight = torch.ones(64, 2048, dtype=dtype), torch.ones(2048, 64, dtype=dtype)
    taken = []
    for _ in range(2):
        begin = time.perf_counter()
        torch.matmul(grad, weight)
        taken.append(time.perf_counter() - begin)
    return min(taken)
