"""Liger's cross-entropy kernels, as Liger's own Python code launches them. Never a dependency.

No code is copied: Liger's wrapper runs on CPU tensors with its kernels replaced by recorders. The
recorded launches are then compiled.
"""

import importlib
import sys
from functools import cache
from itertools import product
from pathlib import Path

import torch

from ...errors import UserError
from .collect import Work

INSTALL = "pip install --no-deps --target {folder} liger-kernel"

#: The names of the chips in Liger's look-up.
ARCHITECTURES = {
    "sm_80": "ampere_ada",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "gfx90a": "cdna2",
    "gfx942": "cdna3",
    "gfx950": "gfx950",
}

ROWS = 2

#: An upstream gradient other than 1, so that Liger's backward rescales.
UPSTREAM = 0.5


class Recorder:
    """Replaces a kernel and records the arguments of `kernel[grid](...)`."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.calls = []

    def __getitem__(self, _grid):
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


@cache
def load(folder: str):
    """Liger's cross-entropy module, from `folder` or the installed one."""
    if Path(folder, "liger_kernel").is_dir() and folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module("liger_kernel.ops.cross_entropy")
    except ImportError as error:
        raise UserError(
            f"liger-kernel is needed for this comparison and cannot be imported ({error}); "
            f"install it with: {INSTALL.format(folder=folder)}"
        ) from error


@cache
def launches(target: str, folder: str, dtypes: tuple[str, ...]) -> list[Work]:
    """The launches of a training step with Liger for a target: mean reduction, no options.

    They use the widths of our launch table, because Liger's block size depends on the width.
    """
    from fused_sft_loss.triton_kernels import launch

    from .. import triton_offline

    module = load(folder)
    limits = sorted({shape.columns or 0 for shape in launch.lines(triton_offline.CHIPS[target])})
    work = []
    for dtype, limit in product(dtypes, limits):
        columns = limit or triton_offline.WIDEST
        logits = torch.zeros(ROWS, columns, dtype=getattr(torch, dtype), requires_grad=True)
        labels = torch.zeros(ROWS, dtype=torch.int64)
        forward, rescaling = _recorded(module, target, logits, labels)
        work.append(_work(target, f"cross_entropy {dtype}", limit or None, forward))
        work.append(_work(target, f"element_mul {dtype}", limit or None, rescaling))
    return work


def step(target: str, folder: str, logits: torch.Tensor, labels: torch.Tensor) -> list:
    """The two launches (loss with gradient, rescaling) of a step on `logits` `[N, V]`, in place."""
    logits.requires_grad_()
    recorders = _recorded(load(folder), target, logits, labels)
    return [_work(target, "", None, recorder).launch for recorder in recorders]


def _recorded(module, target: str, logits, labels):
    names = ("liger_cross_entropy_kernel", "element_mul_kernel")
    saved = {n: getattr(module, n) for n in (*names, "is_hip", "infer_device_arch")}
    recorders = [Recorder(saved[name]) for name in names]
    try:
        for name, recorder in zip(names, recorders, strict=True):
            setattr(module, name, recorder)
        module.is_hip = lambda: target.startswith("gfx")
        module.infer_device_arch = lambda *_: ARCHITECTURES[target]
        module.cross_entropy_forward(
            logits, labels, None, -100, 0.0, 0.0, "mean", None, return_z_loss=False
        )
        module.cross_entropy_backward(logits.detach(), torch.tensor(UPSTREAM))
    finally:
        for name, value in saved.items():
            setattr(module, name, value)
    return recorders


def _work(target, name, limit, recorder) -> Work:
    from fused_sft_loss.triton_kernels.launch import Launch

    ((args, kwargs),) = recorder.calls
    signature = recorder.kernel.signature.parameters
    arguments = {**dict(zip(signature, args, strict=False)), **kwargs}
    options = {k: arguments.pop(k) for k in list(arguments) if k not in signature}
    rows = arguments["X_ptr"].shape[0]
    return Work(target, name, limit, Launch(recorder.kernel, rows, arguments, options))
