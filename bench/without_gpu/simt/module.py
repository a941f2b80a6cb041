"""The CUDA and HIP backends on a CPU: csrc's device files, launchers and bindings on the shim."""

import fcntl
import importlib.util
import sysconfig
from functools import cache

import pybind11

from fused_sft_loss.backends.gpu import Gpu

from .build import COMPILER, OBJECTS, ROOT, compile_object, device_objects, run

#: Lanes of a warp, and the simulated chip as (generation, multiprocessors). With many
#: multiprocessors every row is split over blocks; with none no row is split.
CHIPS = {"cuda": (32, (90, 132)), "hip": (64, (0x942, 0))}


@cache
def backend(name, chip=None):
    """The backend "cuda" or "hip" on the shim."""
    warp, usual = CHIPS[name]
    return Gpu(module(warp), lambda device: chip or usual)


@cache
def module(warp):
    """The compiled module for `warp` lanes. Objects are reused while their sources are the same."""
    name = f"_simt{warp}"
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with open(OBJECTS / f"{name}.lock", "w") as lock:  # one of several test processes compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = build(name, warp, OBJECTS / f"{name}.so")
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def build(name, warp, output, flags=()):
    bindings = (
        "-O1",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
        f"-DFSL_MODULE={name}",
        '-DFSL_VERSION="0"',
        '-DFSL_TOOLKIT="the SIMT shim"',
        '-DFSL_TARGETS="simt"',
        "-DFSL_TEST_HOOKS",
        *flags,
    )
    objects = device_objects(sorted((ROOT / "csrc/gpu").glob("*.cu")), warp, flags)
    objects.append(compile_object(ROOT / "csrc/gpu/bindings.cpp", bindings))
    unfinished = output.with_suffix(".unfinished")
    run([COMPILER, "-shared", *objects, "-o", unfinished, *flags, "-lboost_context"])
    unfinished.replace(output)
    return output
