"""Which backend runs on a device, and why the others cannot."""

import importlib
import os
from functools import cache
from typing import cast

import torch

from . import devices, loader
from .contract import CompiledBackend
from .gpu import Gpu

#: Every name the API accepts -> the module here that implements it.
MODULES = {"cpu": "cpu", "cuda": "gpu", "hip": "gpu", "triton": "triton", "eager": "eager"}

#: What ``backend=None`` tries on a device, best first. ROCm's torch calls its devices "cuda" too.
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "hip", "triton", "eager")}

#: Backends over a compiled module; see CompiledBackend.
COMPILED = ("cpu", "cuda", "hip")
#: Backends with the kernels of grad_in_forward.
ONE_READ = COMPILED

VARIABLE = "FUSED_SFT_LOSS_BACKEND"


@cache
def load(name: str) -> CompiledBackend:
    """The backend: a module or a :class:`.Gpu`. Names not in COMPILED give a Backend only.

    Call it only if `reason_against` gives None for the name.
    """
    if MODULES[name] == "gpu":
        return Gpu(loader.load(name))
    return cast(CompiledBackend, importlib.import_module(f".{MODULES[name]}", __package__))


@cache
def reason_against(name: str, device_type: str) -> str | None:
    """Why `name` cannot run on tensors of `device_type`, or None if it can.

    The answer is the same for all devices of a type, because `torch.compile` makes the choice a
    constant of the graph.
    """
    if name == "cpu":
        if device_type != "cpu":
            return f"runs on CPU tensors, not on {device_type}"
        try:
            load(name)
        except ImportError as error:
            return (
                f"its compiled module cannot be loaded ({error}); install a C++ compiler "
                "(g++ or clang), then reinstall fused_sft_loss"
            )
    if MODULES[name] == "gpu":
        return _reason_against_gpu(name, device_type)
    if name == "triton":
        return _reason_against_triton(device_type)
    return None


def _reason_against_gpu(name: str, device_type: str) -> str | None:
    vendor, version = {
        "cuda": ("NVIDIA", torch.version.cuda),
        "hip": ("AMD", torch.version.hip),
    }[name]
    if device_type != "cuda":  # ROCm's torch calls its devices "cuda" too
        return f"runs on {vendor} GPUs, not on {device_type}"
    if not version:
        return f"runs on {vendor} GPUs; this torch is built for others"
    try:
        info = loader.load(name).build_info()
    except ImportError as error:
        return (
            f"its compiled module cannot be loaded ({error}); install a wheel that has it, or "
            f"build one with FUSED_SFT_LOSS_BUILD=cpu,{name}"
        )
    return devices.reason_against(name, info)


def _reason_against_triton(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"runs on NVIDIA and AMD GPUs, not on {device_type}"
    try:
        module = load("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if device_type == "cpu" and not getattr(module, "INTERPRETED", False):
        return (
            "runs on NVIDIA and AMD GPUs; on CPU tensors only in Triton's interpreter, which is "
            "for tests: start Python with TRITON_INTERPRET=1"
        )
    return None


def best(device_type: str) -> str:
    """The backend that ``backend=None`` takes for a device type."""
    names = PREFERENCE.get(device_type, ("eager",))
    return next(name for name in names if reason_against(name, device_type) is None)


@torch.compiler.assume_constant_result
def resolve(name: str | None, device_type: str, one_read: bool = False) -> str:
    """The backend `name`, else the one in ``FUSED_SFT_LOSS_BACKEND``, else the best that can run.

    `one_read`: the backend must have the kernels of grad_in_forward.

    Raises:
        ValueError: there is no backend of that name.
        NotImplementedError: that backend cannot run here; the message says why and names one that
            can.
    """
    if name is not None:
        asked_by = f"backend={name!r}"
    elif name := os.environ.get(VARIABLE):
        asked_by = f"{VARIABLE}={name}"
    else:
        name = best(device_type)
        if not one_read:
            return name
        asked_by = f"the best backend here, {name!r},"
    if name not in MODULES:
        raise ValueError(f"expected one of {', '.join(MODULES)}, got {asked_by}")
    if reason := reason_against(name, device_type):
        raise NotImplementedError(
            f"{asked_by} cannot run on {device_type}: {reason}. Here "
            f"backend={best(device_type)!r} can."
        )
    if one_read and name not in ONE_READ:
        raise NotImplementedError(
            f"{asked_by} has no kernel for grad_in_forward; {', '.join(ONE_READ)} have. On "
            f"{device_type}: {_one_read_on(device_type)}"
        )
    return name


def _one_read_on(device_type: str) -> str:
    """Which backends of ONE_READ can run there. If none can: the reason for each."""
    reasons = {name: reason_against(name, device_type) for name in ONE_READ}
    able = [repr(name) for name, reason in reasons.items() if reason is None]
    if able:
        return f"backend={' or '.join(able)} can."
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
