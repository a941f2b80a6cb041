"""Finds the compilers of this machine and the targets that they can compile for.

cpu(), cuda() and hip() return the commands that build a module and the files that they run on. They
raise Missing if there is no toolchain. FUSED_SFT_LOSS_BUILD chooses among them. The docstring of
setup.py lists the other variables.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import without
from .variables import given, jobs, named_targets, refuse

CSRC = Path(__file__).parent.parent.absolute()

ROCM_PLACES = ("/opt/rocm", "/usr")

CUDA_TARGETS = "8.0;9.0a;10.0+PTX"
ROCM_TARGETS = "gfx90a;gfx942;gfx950"

# Fastest first: cpu/backend.cpp uses the first one that the processor supports. `baseline` is the
# compiler's default.
ISAS = {
    "x86_64": {
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx2": ["-march=x86-64-v3"],
        "baseline": [],
    }
}.get(platform.machine().replace("AMD64", "x86_64"), {"baseline": []})

CXX_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden".split()
WARNINGS = "-Wall -Wextra -Werror=return-type".split()
# Without errno and traps, the compiler may turn a select into a masked instruction. -ffast-math
# would break NaN and -inf.
CPU_FLAGS = "-O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
# The kernels call fma where they want it. Other fused multiply-adds would give different bits with
# different compilers.
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden".split()
# The kernels need no device libraries, and a distribution may lack those of a target.
HIP_FLAGS = ["-x", "hip", "-nogpulib", "-O3", "-ffp-contract=off", *CXX_FLAGS]


class Missing(Exception):
    """Raised if a backend's toolchain is missing; the message says what to install."""


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
    backends = {"cpu": cpu, "cuda": cuda, "hip": hip}
    named = given("FUSED_SFT_LOSS_BUILD")
    chosen = set(re.findall(r"[^,\s]+", named or ""))
    if named and chosen != {"none"} and not (chosen and chosen <= set(backends)):
        refuse(
            "FUSED_SFT_LOSS_BUILD", f"expected names from cpu, cuda, hip, or none, got {named!r}"
        )
    jobs(), without.tools()  # each ends the build if its variable is wrong
    made = {}
    for backend, plan in backends.items():
        if named is not None and backend not in chosen:
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


def say(text):
    print(f"fused_sft_loss: {text}", file=sys.stderr, flush=True)


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
    host = cxx()
    nvcc = find_nvcc()
    toolchain = f"nvcc {version(nvcc)}"
    targets = makeable(
        "TORCH_CUDA_ARCH_LIST", CUDA_TARGETS, lambda target: cuda_refusal(nvcc, target), toolchain
    )
    compiler = [nvcc, *NVCC_FLAGS, *(flag for target in targets for flag in gencode(target))]
    if given("CXX") and len(host) == 1:
        compiler += ["-ccbin", *host]
    # With the runtime linked statically, the module also loads without a driver or a toolkit.
    link = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "$in -o $out"]
    return gpu("cuda", toolchain, targets, f"cu{version(nvcc).split('.')[0]}", compiler, link)


def hip():
    root, compiler = find_hip()
    header = Path(root, "include/hip/hip_version.h").read_text()
    major, minor = re.findall(r"define HIP_VERSION_M(?:AJ|IN)OR\s+(\d+)", header)
    toolchain = f"{compiler[0]} {version(compiler[0])} with HIP {major}.{minor}"
    targets = makeable(
        "PYTORCH_ROCM_ARCH", ROCM_TARGETS, lambda target: hip_refusal(compiler, target), toolchain
    )
    compiler = compiler + HIP_FLAGS + [f"--offload-arch={target}" for target in targets]
    # No HIP library is linked: the module uses the runtime that torch has loaded
    # (backends/loader.py).
    return gpu("hip", toolchain, targets, f"rocm{major}", compiler, cxx_link())


def gpu(backend, toolchain, targets, label, compiler, link):
    """A module of all csrc/gpu/*.cu and the bindings, which compile without the toolkit."""
    about = {"FSL_TOOLKIT": toolchain, "FSL_TARGETS": " ".join(targets)}
    defines = [define(name, text) for name, text in about.items()]  # a new toolkit recompiles all
    objects = {path.stem: ("gpu", f"gpu/{path.name}", defines) for path in gpu_sources()}
    flags = ["-O2", f"-DFSL_MODULE=_{backend}", *defines]
    objects["bindings"] = ("cxx", "gpu/bindings.cpp", flags)
    compiler = [*compiler, "$flags", "-c $in -o $out"]
    commands = {"cxx": cxx_compile(), "gpu": compiler, "link": link}
    return Module(toolchain, targets, label, commands, objects)


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


# --- toolkits and their targets -------------------------------------------------------------------


@cache
def version(*command):
    """The version that a compiler prints, like 12.2.0."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return next(iter(re.findall(r"\d+\.\d+\.\d+", said)), "of unknown version")


@cache
def refusal(*command, stdin=""):
    """The first line of a failing command's error message; empty if the command succeeds."""
    run = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace")
    return "" if run.returncode == 0 else (run.stderr.strip() or "it fails").splitlines()[0]


def makeable(variable, default, why_not, toolchain):
    """The wanted targets that the toolchain can compile for.

    A failing target that `variable` names ends the build. A failing default target is left out.
    """
    named = named_targets(variable)
    targets = named or default.split(";")
    refused = {target: reason for target in targets if (reason := why_not(target))}
    for target, reason in refused.items():
        if named:
            refuse(variable, f"{toolchain} cannot make {target!r}: {reason}")
        say(f"warning: {toolchain} cannot make {target}, which is left out: {reason}")
    if len(refused) == len(targets):
        raise Missing(f"{toolchain} makes none of {default}; install a newer one")
    return [target for target in targets if target not in refused]


def find_nvcc():
    if reason := without.absent("nvcc"):
        raise Missing(f"no nvcc: {reason}")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := given(variable):
            return shutil.which("nvcc", path=f"{root}/bin") or refuse(
                variable,
                f"there is no {root}/bin/nvcc; name the CUDA toolkit's folder, unset {variable}, "
                "or leave cuda out of FUSED_SFT_LOSS_BUILD",
            )
    if nvcc := shutil.which("nvcc"):
        return nvcc
    raise Missing("no nvcc; install the CUDA toolkit and put nvcc on PATH or set CUDA_HOME")


def gencode(target):
    """nvcc's flags for a target in torch's notation: 8.0, 9.0a, 10.0+PTX."""
    chip = target.replace(".", "").removesuffix("+PTX")
    kinds = ["sm", "compute"] if target.endswith("+PTX") else ["sm"]
    return [f"-gencode=arch=compute_{chip},code={kind}_{chip}" for kind in kinds]


def cuda_refusal(nvcc, target):
    chip = re.fullmatch(r"(\d+)\.\d[af]?(\+PTX)?", target)
    if not chip:
        return f"expected something like {CUDA_TARGETS}"
    if int(chip[1]) < 8:
        return "the kernels need 8.0 or newer"
    return refusal(nvcc, *gencode(target), "--dryrun", "-c", "-x", "cu", os.devnull)


def find_hip():
    """The folder of HIP, and the compiler that can compile for most of the wanted targets."""
    if reason := without.absent("clang"):
        raise Missing(f"no HIP compiler: {reason}")
    advice = (
        "install ROCm and set ROCM_PATH, or Debian's clang-19 clang-tools-19 lld-19 libamdhip64-dev"
    )
    named = given("ROCM_PATH")
    places = [named] if named else ROCM_PLACES
    root = next((root for root in places if Path(root, "include/hip/hip_version.h").exists()), None)
    if named and not root:
        refuse(
            "ROCM_PATH",
            f"there is no {named}/include/hip/hip_version.h; name ROCm's folder, unset ROCM_PATH, "
            "or leave hip out of FUSED_SFT_LOSS_BUILD",
        )
    if not root:
        raise Missing(f"no HIP headers in {' or '.join(places)}; {advice}")
    os.environ["HIP_PLATFORM"] = "amd"  # otherwise some hipcc use an nvcc if they find one
    clangs = ["clang++", *(f"clang++-{release}" for release in range(30, 16, -1))]
    names = [f"{root}/bin/hipcc", "hipcc", f"{root}/llvm/bin/clang++", *clangs]
    compilers = [[name, f"--rocm-path={root}"] for name in names if shutil.which(name)]
    if not compilers:
        raise Missing(f"no hipcc and no clang++; {advice}")
    targets = named_targets("PYTORCH_ROCM_ARCH") or ROCM_TARGETS.split(";")
    return root, max(
        compilers, key=lambda compiler: sum(not hip_refusal(compiler, gfx) for gfx in targets)
    )


def hip_refusal(compiler, target):
    """Why a target cannot be compiled for; empty if it can.

    Compiles two lines. That needs the whole chain of tools, and a clang with the builtins that
    gpu/platform_hip.h uses.
    """
    code = """__attribute__((device)) float f(float x) {
        return static_cast<float>(static_cast<__bf16>(__builtin_amdgcn_exp2f(x))); }"""
    flags = ["-nogpuinc", *HIP_FLAGS, f"--offload-arch={target}", "-c", "-o", os.devnull, "-"]
    return refusal(*compiler, *flags, stdin=code).split(";")[0]
