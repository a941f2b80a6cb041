"""The modules that this machine's compilers can build, and the commands that build them.

cpu(), cuda() and hip() return the commands and the files that they run on. They raise Missing if
there is no toolchain. FUSED_SFT_LOSS_BUILD chooses among them; toolkits.py finds the compilers for
GPUs. The docstring of setup.py lists the other variables.
"""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from . import without
from .toolkits import CXX_FLAGS, HIP_FLAGS, Missing, cudas, gencode, hips, version
from .variables import BACKENDS, given, jobs, named_backends, refuse, say

CSRC = Path(__file__).parent.parent.absolute()

# Fastest first: cpu/backend.cpp uses the first one that the processor supports. `baseline` is the
# compiler's default.
ISAS = {
    "x86_64": {
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx2": ["-march=x86-64-v3"],
        "baseline": [],
    }
}.get(platform.machine().replace("AMD64", "x86_64"), {"baseline": []})

WARNINGS = "-Wall -Wextra -Werror=return-type".split()
# Without errno and traps, the compiler may turn a select into a masked instruction. -ffast-math
# would break NaN and -inf.
CPU_FLAGS = "-O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
# The kernels call fma where they want it. Other fused multiply-adds would give different bits with
# different compilers.
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden".split()


@dataclass
class Module:
    """One extension module, `fused_sft_loss._<backend>`."""

    toolchain: str
    targets: list[str]
    label: str  # its name in the version of a wheel
    commands: dict[str, list[str]]  # name -> command that makes $out from $in; one is "link"
    objects: dict[str, tuple[str, str, list[str]]]  # name -> (command, source, further flags)


def modules() -> dict[str, Module]:
    """The modules to build, by backend. Prints the toolchain of each, or why it is left out."""
    named, chosen = given("FUSED_SFT_LOSS_BUILD"), named_backends()
    jobs(), without.tools()  # each ends the build if its variable is wrong
    made = {}
    for backend, plan in zip(BACKENDS, (cpu, cuda, hip), strict=True):
        if chosen is not None and backend not in chosen:
            say(f"_{backend} is left out: FUSED_SFT_LOSS_BUILD is {named!r}")
            continue
        try:
            module = made[backend] = plan()
            say(f"_{backend}: {module.toolchain}, for {' '.join(module.targets)}")
        except Missing as missing:
            if named is not None:
                sys.exit(f"FUSED_SFT_LOSS_BUILD={named}: {missing}")
            say(f"_{backend} is left out: {missing}")
    return made


# --- the three backends ---------------------------------------------------------------------------


def cpu():
    names = " ".join(f"F({isa})" for isa in ISAS)
    objects = {
        "bindings": ("cxx", "cpu/bindings.cpp", ["-O2", "-DFSL_COMPILER=__VERSION__"]),
        "targets_and_merge": ("cxx", "cpu/targets_and_merge.cpp", ["-O2"]),
        "backend": ("cxx", "cpu/backend.cpp", ["-O2", f"'-DFSL_ISAS(F)={names}'"]),
    }
    for isa, flags in ISAS.items():
        flags = [*CPU_FLAGS, *flags, f"-DFSL_ISA={isa}"]
        objects[f"row_kernels_{isa}"] = ("cxx", "cpu/row_kernels.cpp", flags)
    commands = {"cxx": cxx_compile(), "link": cxx_link()}
    return Module(f"{cxx()[0]} {version(*cxx())}", list(ISAS), "cpu", commands, objects)


def cuda():
    host, toolkit = cxx(), next(cudas())
    targets = toolkit.targets()
    (nvcc,) = toolkit.command
    compiler = [nvcc, *NVCC_FLAGS, *(flag for target in targets for flag in gencode(target))]
    if given("CXX") and len(host) == 1:
        compiler += ["-ccbin", *host]
    # With the runtime linked statically, the module also loads without a driver or a toolkit.
    link = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "$in -o $out"]
    return gpu(toolkit, targets, compiler, link)


def hip():
    toolkit = next(hips())
    targets = toolkit.targets()
    compiler = [*toolkit.command, *HIP_FLAGS, *(f"--offload-arch={target}" for target in targets)]
    # No HIP library is linked: the module uses the runtime that torch has loaded
    # (backends/loader.py).
    return gpu(toolkit, targets, compiler, cxx_link())


def gpu(toolkit, targets, compiler, link):
    """A module of all csrc/gpu/*.cu and the bindings, which compile without the toolkit."""
    about = {"FSL_TOOLKIT": toolkit.name, "FSL_TARGETS": " ".join(targets)}
    defines = [define(name, text) for name, text in about.items()]  # a new toolkit recompiles all
    objects = {path.stem: ("gpu", f"gpu/{path.name}", defines) for path in gpu_sources()}
    flags = ["-O2", f"-DFSL_MODULE=_{toolkit.backend}", *defines]
    objects["bindings"] = ("cxx", "gpu/bindings.cpp", flags)
    compiler = [*compiler, "$flags", "-c $in -o $out"]
    commands = {"cxx": cxx_compile(), "gpu": compiler, "link": link}
    return Module(toolkit.name, targets, toolkit.label, commands, objects)


def gpu_sources():
    return sorted((CSRC / "gpu").glob("*.cu"))


def define(name, text):
    return f"'-D{name}=\"{text}\"'"


# --- the C++ compiler -----------------------------------------------------------------------------


def cxx():
    command = (given("CXX") or "c++").split()
    if shutil.which(command[0]):
        return command
    if given("CXX"):
        refuse("CXX", f"there is no command {command[0]!r}; name a C++ compiler, or unset CXX")
    raise Missing("no C++ compiler c++; install g++ or clang, or set CXX")


def cxx_flags():
    return os.environ.get("CXXFLAGS", "").split()


def cxx_compile():
    return [*cxx(), *CXX_FLAGS, *WARNINGS, "$flags", *cxx_flags(), "-c $in -o $out"]


def cxx_link():
    mac = sys.platform == "darwin"
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared"]
    return [*cxx(), *cxx_flags(), *shared, "$in -o $out", *([] if mac else ["-ldl", "-pthread"])]
