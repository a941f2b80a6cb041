"""Whether a compiled module can run on the GPUs of this machine.

A module holds machine code for the targets of its build ("8.0 9.0a 10.0+PTX"; "gfx90a gfx942").
_cuda also holds a CUDA runtime, which needs a driver of its own major version or newer. A launch on
any other GPU or driver fails.

The answer is the same for all GPUs that the process sees, because torch.compile makes the backend a
constant of the graph, and the graph may run on any of them.
"""

import ctypes
import re
from functools import cache

import torch


def reason_against(name: str, info: dict[str, str]) -> str | None:
    """Why "cuda" or "hip" with this build_info() cannot run here, or None if it can."""
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
    """A device's architecture, written as targets are: "9.0", "gfx942:sramecc+:xnack-"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


# --- NVIDIA ---------------------------------------------------------------------------------------


def _runs_cuda(target: str, device: str, toolkit: str) -> bool:
    """Whether code for `target` runs on `device`.

    Machine code runs on its own major version, with the same or a higher minor version. "9.0a" runs
    only on 9.0. The driver compiles PTX for any newer device, if the driver is at least as new as
    the toolkit that wrote the PTX.
    """
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
    """A CUDA runtime needs a driver of its own major version or newer."""
    driver, needed = driver_version(), _version(toolkit)
    if driver is None or needed is None or driver[0] >= needed[0]:
        return None
    return (
        f"its compiled module is made by CUDA {needed[0]}.{needed[1]}, and this driver is for CUDA "
        f"{driver[0]}.{driver[1]} at most; update the driver, or install a wheel +cu{driver[0]}"
    )


@cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver runs, or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()  # 13000 means 13.0; asking does not initialise CUDA
    if driver.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _version(toolkit: str) -> tuple[int, int] | None:
    """(13, 0) for "nvcc 13.0.88"; None if the text has no version."""
    found = re.search(r"(\d+)\.(\d+)", toolkit)
    return (int(found[1]), int(found[2])) if found else None


# --- AMD ------------------------------------------------------------------------------------------


def _runs_hip(target: str, device: str, _toolkit: str) -> bool:
    """Whether code for `target` runs on `device`.

    Machine code runs only on its own processor. If the target sets a feature, the device must have
    the same setting. If it does not, the code runs with either setting.
    """
    processor, *features = target.split(":")
    found, *settings = device.split(":")
    return processor == found and set(features) <= set(settings)


_RUNS = {"cuda": _runs_cuda, "hip": _runs_hip}
_VARIABLES = {"cuda": "TORCH_CUDA_ARCH_LIST", "hip": "PYTORCH_ROCM_ARCH"}
_HIDING = {"cuda": "CUDA_VISIBLE_DEVICES", "hip": "HIP_VISIBLE_DEVICES"}
