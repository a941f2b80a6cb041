"""Whether a compiled module runs on the GPUs of this machine, from what it was compiled for.

A module holds machine code for the targets of its build ("8.0 9.0a 10.0+PTX"; "gfx90a gfx942"), and
_cuda a CUDA runtime that needs a driver as new as itself. A launch anywhere else fails.

The answer is one for all GPUs that the process sees: torch.compile makes the backend a constant of
the graph, which then runs on any of them.
"""

import ctypes
import re
from functools import cache

import torch


def reason_against(name: str, info: dict[str, str]) -> str | None:
    """Why "cuda" or "hip", of this build_info(), cannot run here, or None when it can."""
    if name == "cuda" and (reason := _reason_against_driver(info["toolkit"])):
        return reason
    targets = info["targets"].split()
    for index in range(torch.cuda.device_count()):
        device = architecture(index)
        if not any(_RUNS[name](target, device, info["toolkit"]) for target in targets):
            return (
                f"its compiled module has code for {' '.join(targets)}, and cuda:{index} "
                f"({torch.cuda.get_device_name(index)}) is {device}; {_advice(name, device)}, or "
                f"hide that device from this process with {_HIDING[name]}"
            )
    return None


def _advice(name: str, device: str) -> str:
    if name == "cuda" and int(device.partition(".")[0]) < 8:
        return "its kernels need 8.0 or newer: use another"
    return f"build it with {_VARIABLES[name]}={device.partition(':')[0]}"


def architecture(index: int) -> str:
    """A device in the words of the targets: "9.0", "gfx942:sramecc+:xnack-"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


# --- NVIDIA ---------------------------------------------------------------------------------------


def _runs_cuda(target: str, device: str, toolkit: str) -> bool:
    """Machine code runs on its major version from its minor one on; "9.0a" on 9.0 alone. The driver
    compiles PTX for anything newer, if it is as new as the toolkit that wrote it."""
    known = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", target)
    if known is None:
        raise ValueError(f"expected a target like 9.0a or 10.0+PTX in build_info(), got {target!r}")
    major, minor, kind, ptx = known.groups()
    made_for, found = (int(major), int(minor)), tuple(map(int, device.split(".")))
    if kind == "a":
        return found == made_for
    if found[0] == made_for[0] and found >= made_for:
        return True
    driver, needed = driver_version(), _version(toolkit)
    as_new = driver is None or needed is None or driver >= needed
    return bool(ptx) and kind == "" and found > made_for and as_new


def _reason_against_driver(toolkit: str) -> str | None:
    """A runtime runs with any driver of its own major version, and with newer ones."""
    driver, needed = driver_version(), _version(toolkit)
    if driver is None or needed is None or driver[0] >= needed[0]:
        return None
    return (
        f"its compiled module is made by CUDA {needed[0]}.{needed[1]}, and this driver is for CUDA "
        f"{driver[0]}.{driver[1]} at most; update the driver, or install a wheel +cu{driver[0]}"
    )


@cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver runs, or None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()  # 13000 is 13.0; asked without initialising anything
    if driver.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _version(toolkit: str) -> tuple[int, int] | None:
    """Of "nvcc 13.0.88"; None when the compiler did not tell."""
    found = re.search(r"(\d+)\.(\d+)", toolkit)
    return (int(found[1]), int(found[2])) if found else None


# --- AMD ------------------------------------------------------------------------------------------


def _runs_hip(target: str, device: str, _toolkit: str) -> bool:
    """Machine code runs on its own processor alone. A feature that the target names must be the
    device's; one that it leaves open runs with either setting."""
    processor, *features = target.split(":")
    found, *settings = device.split(":")
    return processor == found and set(features) <= set(settings)


_RUNS = {"cuda": _runs_cuda, "hip": _runs_hip}
_VARIABLES = {"cuda": "TORCH_CUDA_ARCH_LIST", "hip": "PYTORCH_ROCM_ARCH"}
_HIDING = {"cuda": "CUDA_VISIBLE_DEVICES", "hip": "HIP_VISIBLE_DEVICES"}
