"""Finds CUDA and ROCm toolkits, and the targets that each can compile for.

A machine may have several: CUDA 12 beside CUDA 13, or ROCm as pip wheels beside Debian's headers. A
build takes the first one. `make wheel` (wheels.py) also looks into the folders where toolkits are
usually installed, and takes the best one of each major version.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import without
from .variables import given, named_targets, refuse, say

#: 10.0+PTX also runs on newer GPUs, after the driver has compiled it; 12.0 saves that wait.
CUDA_TARGETS = "8.0;9.0a;10.0+PTX;12.0"
ROCM_TARGETS = "gfx90a;gfx942;gfx950"
#: Variables that name a toolkit's folder. The first one that is set is used, and no other folder.
CUDA_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
ROCM_VARIABLES = ("ROCM_PATH", "ROCM_HOME")
ROCM_PLACES = ("/opt/rocm", "/usr")
#: Where `make wheel` looks too.
FURTHER_CUDA = ("/usr/local/cuda*", "/opt/cuda*")
FURTHER_ROCM = ("/opt/rocm*",)

CXX_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden".split()
# The kernels need no device libraries, and a distribution may lack those of a target.
HIP_FLAGS = ["-x", "hip", "-nogpulib", "-O3", "-ffp-contract=off", *CXX_FLAGS]

HIP_VERSION_H = "include/hip/hip_version.h"
INSTALL_HIP = (
    "install ROCm and set ROCM_PATH, or Debian's clang-19 clang-tools-19 lld-19 libamdhip64-dev"
)


class Missing(Exception):
    """Raised if a backend's toolchain is missing; the message says what to install."""


@dataclass(frozen=True)
class Toolkit:
    """A compiler for GPUs."""

    backend: str  # "cuda" or "hip"
    command: tuple[str, ...]
    name: str  # like "nvcc 13.0.88"
    number: tuple[int, ...]  # of CUDA or HIP
    label: str  # its name in the version of a wheel: cu13, rocm7
    variables: tuple[tuple[str, str], ...]  # a build with these takes this toolkit

    def refusal(self, target: str) -> str:
        """Why the toolkit cannot compile for a target; empty if it can."""
        return (cuda_refusal if self.backend == "cuda" else hip_refusal)(self.command, target)

    def targets(self) -> list[str]:
        """The wanted targets that the toolkit can compile for. It says which ones it cannot.

        A failing target that a variable names ends the build. A failing default target is left out.
        """
        variable, default = wanted(self.backend)
        named = named_targets(variable)
        targets = named or default.split(";")
        refused = {target: reason for target in targets if (reason := self.refusal(target))}
        for target, reason in refused.items():
            if named:
                refuse(variable, f"{self.name} cannot make {target!r}: {reason}")
            say(f"warning: {self.name} cannot make {target}, which is left out: {reason}")
        if len(refused) == len(targets):
            raise Missing(f"{self.name} makes none of {default}; install a newer one")
        return [target for target in targets if target not in refused]


def wanted(backend: str) -> tuple[str, str]:
    """The variable that names a backend's targets, and its default."""
    if backend == "cuda":
        return "TORCH_CUDA_ARCH_LIST", CUDA_TARGETS
    return "PYTORCH_ROCM_ARCH", ROCM_TARGETS


def folders(patterns: Iterable[str], inside: Iterable[str]) -> list[str]:
    """The folders that match patterns like /opt/rocm*, and the folders inside some folders."""
    found = [path for pattern in patterns for path in Path("/").glob(pattern.lstrip("/"))]
    found += [path for folder in inside for path in Path(folder).absolute().glob("*")]
    return [str(path) for path in sorted(found, key=str) if path.is_dir()]


@cache
def version(*command: str) -> str:
    """The version that a compiler prints, like 12.2.0."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return next(iter(re.findall(r"\d+\.\d+\.\d+", said)), "of unknown version")


@cache
def refusal(*command: str, stdin: str = "") -> str:
    """The first line of a failing command's error message; empty if the command succeeds."""
    run = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace")
    return "" if run.returncode == 0 else (run.stderr.strip() or "it fails").splitlines()[0]


# --- CUDA -----------------------------------------------------------------------------------------


def cudas(further: Iterable[str] = ()) -> Iterator[Toolkit]:
    """The CUDA toolkits: the named one, or nvcc on PATH and those in further folders."""
    if reason := without.absent("nvcc"):
        raise Missing(f"no nvcc: {reason}")
    for variable in CUDA_VARIABLES:
        if root := given(variable):
            yield nvcc_in(root) or refuse(
                variable,
                f"there is no {root}/bin/nvcc; name the CUDA toolkit's folder, unset {variable}, "
                "or leave cuda out of FUSED_SFT_LOSS_BUILD",
            )
            return
    on_path = shutil.which("nvcc")
    others = [toolkit for root in further if (toolkit := nvcc_in(root))]
    if on_path:
        yield nvcc_toolkit(on_path)
    yield from others
    if not on_path and not others:
        raise Missing("no nvcc; install the CUDA toolkit and put nvcc on PATH or set CUDA_HOME")


def nvcc_in(root: str) -> Toolkit | None:
    """The CUDA toolkit in a folder, or None."""
    nvcc = shutil.which("nvcc", path=f"{root}/bin")
    return nvcc_toolkit(nvcc, ("CUDA_HOME", root)) if nvcc else None


def nvcc_toolkit(nvcc: str, *variables: tuple[str, str]) -> Toolkit:
    text = version(nvcc)
    number = tuple(map(int, re.findall(r"\d+", text)))
    return Toolkit("cuda", (nvcc,), f"nvcc {text}", number, f"cu{text.split('.')[0]}", variables)


def gencode(target: str) -> list[str]:
    """nvcc's flags for a target in torch's notation: 8.0, 9.0a, 10.0+PTX."""
    chip = target.replace(".", "").removesuffix("+PTX")
    kinds = ["sm", "compute"] if target.endswith("+PTX") else ["sm"]
    return [f"-gencode=arch=compute_{chip},code={kind}_{chip}" for kind in kinds]


def cuda_refusal(command: tuple[str, ...], target: str) -> str:
    chip = re.fullmatch(r"(\d+)\.\d[af]?(\+PTX)?", target)
    if not chip:
        return f"expected something like {CUDA_TARGETS}"
    if int(chip[1]) < 8:
        return "the kernels need 8.0 or newer"
    return refusal(*command, *gencode(target), "--dryrun", "-c", "-x", "cu", os.devnull)


# --- HIP ------------------------------------------------------------------------------------------


def hips(further: Iterable[str] = ()) -> Iterator[Toolkit]:
    """The ROCm toolkits: the named one, or those in the usual and in further folders."""
    if reason := without.absent("clang"):
        raise Missing(f"no HIP compiler: {reason}")
    usual = rocm_roots()
    roots = [usual[0]] if named_rocm() else [*usual, *further]
    with_headers = [root for root in roots if Path(root, HIP_VERSION_H).exists()]
    if not with_headers:
        raise Missing(f"no HIP headers in {' or '.join(usual)}; {INSTALL_HIP}")
    os.environ["HIP_PLATFORM"] = "amd"  # otherwise some hipcc use an nvcc if they find one
    found = False
    for root in with_headers:
        if compiler := hip_compiler(root):
            found = True
            yield hip_toolkit(root, compiler)
    if not found:
        raise Missing(f"no hipcc and no clang++; {INSTALL_HIP}")


def named_rocm() -> str | None:
    """The variable that names ROCm's folder, or None. That folder must hold HIP's headers."""
    for variable in ROCM_VARIABLES:
        if root := given(variable):
            if not Path(root, HIP_VERSION_H).exists():
                refuse(
                    variable,
                    f"there is no {root}/{HIP_VERSION_H}; name ROCm's folder, unset {variable}, "
                    "or leave hip out of FUSED_SFT_LOSS_BUILD",
                )
            return variable
    return None


def rocm_roots() -> list[str]:
    """The folders in which a build looks for ROCm, the first one first."""
    if variable := named_rocm():
        return [os.environ[variable].strip()]
    return [*pip_rocm_roots(), *ROCM_PLACES]


def pip_rocm_roots() -> tuple[str, ...]:
    """The folder of ROCm that was installed by pip, as its command `rocm-sdk` tells."""
    command = shutil.which("rocm-sdk")
    if not command:
        return ()
    said = subprocess.run([command, "path", "--root"], capture_output=True, text=True)
    return tuple(said.stdout.splitlines()[:1]) if said.returncode == 0 else ()


def hip_compiler(root: str) -> tuple[str, ...] | None:
    """The compiler that makes most of the wanted targets with the headers of a folder, or None."""
    clangs = ["clang++", *(f"clang++-{release}" for release in range(30, 16, -1))]
    inside = [f"{root}/llvm/bin/clang++", f"{root}/lib/llvm/bin/clang++"]
    names = [f"{root}/bin/hipcc", *inside, "hipcc", *clangs]
    # clang looks into --rocm-path last, after HIP's headers that a distribution put into /usr.
    headers = [] if root == "/usr" else ["-isystem", f"{root}/include"]
    flags = [f"--rocm-path={root}", *headers]
    compilers = [(name, *flags) for name in names if shutil.which(name)]
    variable, default = wanted("hip")
    targets = named_targets(variable) or default.split(";")

    def makes(command):
        return sum(not hip_refusal(command, target) for target in targets)

    return max(compilers, key=makes, default=None)


def hip_toolkit(root: str, command: tuple[str, ...]) -> Toolkit:
    header = Path(root, HIP_VERSION_H).read_text()
    major, minor = re.findall(r"define HIP_VERSION_M(?:AJ|IN)OR\s+(\d+)", header)
    # Without the folder: the name is compiled into the wheel.
    name = f"{Path(command[0]).name} {version(command[0])} with HIP {major}.{minor}"
    number = (int(major), int(minor))
    return Toolkit("hip", command, name, number, f"rocm{major}", (("ROCM_PATH", root),))


def hip_refusal(command: tuple[str, ...], target: str) -> str:
    """Why a target cannot be compiled for; empty if it can.

    Compiles two lines. That needs the whole chain of tools, and a clang with the builtins that
    gpu/platform_hip.h uses.
    """
    code = """__attribute__((device)) float f(float x) {
        return static_cast<float>(static_cast<__bf16>(__builtin_amdgcn_exp2f(x))); }"""
    flags = ["-nogpuinc", *HIP_FLAGS, f"--offload-arch={target}", "-c", "-o", os.devnull, "-"]
    return refusal(*command, *flags, stdin=code).split(";")[0]
