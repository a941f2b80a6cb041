"""Matrix products that add up in fp32 and round at most once."""

from functools import cache

import torch
from torch import Tensor


def dtype_of_products(tensor: Tensor) -> torch.dtype:
    """The dtype in which this tensor is multiplied.

    A CPU without instructions for 16-bit products multiplies fp32 matrices faster: on AVX2 up to
    400 times. Tiles are then fp32 too, so a logit is not rounded to 16 bits.
    """
    if tensor.device.type == "cpu" and not _cpu_multiplies(tensor.dtype):
        return torch.float32
    return tensor.dtype


@torch.compiler.assume_constant_result  # torch.compile cannot trace the functions below
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of this dtype."""
    asked = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }.get(dtype)
    if asked is None:
        return True
    # Private functions of torch.cpu, absent from some versions of torch.
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = a @ b + bias, rounded once to the dtype of `out`."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    elif bias is None and _widens(a, out):
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif bias is None and out.dtype == torch.float32:
        torch.mm(a.float(), b.float(), out=out)
    else:
        product = torch.mm(a.float(), b.float())
        out.copy_(product if bias is None else product + bias)


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, with the arguments of :func:`accumulate`."""
    multiply(a, b, out)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, where `out` is fp32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif _widens(a, out):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.addmm_(a.float(), b.float())


def _widens(a: Tensor, out: Tensor) -> bool:
    """Whether PyTorch has a product of such 16-bit matrices that writes fp32."""
    return a.is_cuda and out.dtype == torch.float32 and _device_widens(a.dtype)


@torch.compiler.assume_constant_result
@cache
def _device_widens(dtype: torch.dtype) -> bool:
    """Whether a product of two 16-bit matrices can write fp32: on GPUs, from torch 2.8 on.

    It is tried once, because a build for another GPU may have the operator without a kernel.
    """
    ones = torch.ones(16, 16, dtype=dtype, device="cuda")
    out = torch.ones(16, 16, dtype=torch.float32, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(out, ones, ones, torch.float32, out=out)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the dtypes they are given."""
    return torch.autocast(tensor.device.type, enabled=False)


def as_autocast(*tensors: Tensor | None) -> list:
    """The tensors as torch.nn.functional.linear would take them under torch.autocast."""
    return [_cast(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def _cast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    casts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if casts else tensor
