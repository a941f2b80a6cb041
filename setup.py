"""Build the compiled backends that this machine has a toolchain for. Metadata lives in
pyproject.toml.

FUSED_SFT_LOSS_BUILD   cpu | none. Unset: what a toolchain is there for. A named backend whose
toolchain is
                       missing fails the build; an unnamed one is left out, and `env` says so at run
                       time.
CXX, MAX_JOBS          as everywhere.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")

# Fastest first: csrc/cpu.cpp takes the first that the processor runs. `baseline` is the compiler's
# default.
ISAS = {
    "x86_64": {
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx2": ["-march=x86-64-v3"],
        "baseline": [],
    }
}.get(platform.machine().replace("AMD64", "x86_64"), {"baseline": []})

# No errno and no traps: a select may become a masked instruction. Not -ffast-math: NaN and -inf
# matter here.
KERNEL_FLAGS = [
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
COMMON_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror=return-type",
]


def find_compiler():
    """The C++ compiler command as a list, or None."""
    command = os.environ.get("CXX", "").split() or ["c++"]
    return command if shutil.which(command[0]) else None


def backends_to_build():
    named = os.environ.get("FUSED_SFT_LOSS_BUILD")
    known = {"cpu", "none"}
    if named is None:
        return {"cpu"} if find_compiler() else set()
    wanted = {name.strip() for name in named.split(",") if name.strip()}
    if not wanted <= known:
        sys.exit(f"FUSED_SFT_LOSS_BUILD: expected names from {sorted(known)}, got {named!r}")
    if "cpu" in wanted and not find_compiler():
        sys.exit(
            "FUSED_SFT_LOSS_BUILD=cpu: no C++ compiler found; install g++ or clang, or set CXX"
        )
    return wanted - {"none"}


class NinjaBuild(build_ext):
    """Each extension is one ninja file: incremental, parallel, and readable after the fact."""

    def build_extension(self, ext):
        import pybind11
        from ninja import BIN_DIR, ninja_syntax

        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        build_dir = Path(self.build_temp).absolute()
        build_dir.mkdir(parents=True, exist_ok=True)
        includes = [
            pybind11.get_include(),
            sysconfig.get_path("include"),
            str((ROOT / CSRC).absolute()),
        ]
        extra = os.environ.get("CXXFLAGS", "").split()
        compiler = find_compiler()
        with open(build_dir / f"{ext.name}.ninja", "w") as file:
            self.write_rules(
                ninja_syntax.Writer(file), compiler, includes, extra, output, build_dir
            )
        print(f"{ext.name}: {' '.join(compiler)}, instruction sets {', '.join(ISAS)}", flush=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = [
            str(Path(BIN_DIR) / "ninja"),
            "-C",
            str(build_dir),
            "-f",
            f"{ext.name}.ninja",
            *jobs,
        ]
        subprocess.run(ninja, check=True)

    def write_rules(self, ninja, compiler, includes, extra, output, build_dir):
        flags = COMMON_FLAGS + [f"-I{path}" for path in includes]
        ninja.rule(
            "compile",
            [
                *compiler,
                *flags,
                "$flags",
                *extra,
                "-MMD",
                "-MF",
                "$out.d",
                "-c",
                "$in",
                "-o",
                "$out",
            ],
            depfile="$out.d",
            deps="gcc",
            description="$out",
        )
        shared = (
            ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        )
        libraries = ["-ldl", "-pthread"] if sys.platform.startswith("linux") else []
        ninja.rule("link", [*compiler, *extra, *shared, "$in", "-o", "$out", *libraries])
        isa_list = " ".join(f"F({isa})" for isa in ISAS)
        version = self.distribution.get_version()
        sources = {
            "bindings_cpu": ["-O2", f"-DFSL_VERSION='\"{version}\"'", "-DFSL_COMPILER=__VERSION__"],
            "cpu_vectors": ["-O2"],
            "cpu": ["-O2", f"'-DFSL_ISAS(F)={isa_list}'"],
        }
        objects = []
        for name, source_flags in sources.items():
            objects += ninja.build(
                str(build_dir / f"{name}.o"),
                "compile",
                str((ROOT / CSRC / f"{name}.cpp").absolute()),
                variables={"flags": source_flags},
            )
        for isa, isa_flags in ISAS.items():
            objects += ninja.build(
                str(build_dir / f"cpu_rows_{isa}.o"),
                "compile",
                str((ROOT / CSRC / "cpu_rows.cpp").absolute()),
                variables={"flags": [*KERNEL_FLAGS, *isa_flags, f"-DFSL_ISA={isa}"]},
            )
        ninja.build(str(output), "link", objects)


def extensions():
    wanted = backends_to_build()
    if not wanted:
        print(
            "fused_sft_loss: no compiled backend will be built (no C++ compiler, or asked not to)",
            flush=True,
        )
    return [Extension(f"fused_sft_loss._{name}", sources=[]) for name in sorted(wanted)]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
