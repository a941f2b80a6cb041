"""Build the compiled backends that this machine has a toolchain for. Metadata is in pyproject.toml.

FUSED_SFT_LOSS_BUILD   some of cpu, cuda, hip, separated by commas, or none. A missing toolchain
                       fails the build. Unset: every backend that has a toolchain; the build prints
                       what it leaves out, and why.
TORCH_CUDA_ARCH_LIST   like "8.0;9.0a;10.0+PTX;12.0".
PYTORCH_ROCM_ARCH      like "gfx90a;gfx942". If the toolchain cannot compile for a target that is
                       named here or in TORCH_CUDA_ARCH_LIST, the build fails. If it cannot compile
                       for a default target, the build leaves that target out.
CUDA_HOME, CUDA_PATH, ROCM_PATH, ROCM_HOME, CXX, CXXFLAGS, MAX_JOBS   as usual. A variable that
                       names something wrong fails the build; an empty one counts as unset.

A wheel's version ends in the backends that it contains (+cpu, +cu13, +rocm7). An sdist's does not.
`make wheel` builds one of each (csrc/toolchains/wheels.py).

csrc/toolchains/ finds the compilers and their commands. This file writes them for ninja and runs
ninja.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.absolute()
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True  # keep __pycache__ out of csrc/

from csrc.toolchains import compilers, headers, variables  # noqa: E402

MODULES = compilers.modules()


class NinjaBuild(build_ext):
    """Builds each module with one ninja file: incremental and parallel, and the file stays."""

    def run(self):
        # A module of an earlier build must not get into this wheel.
        package = Path(self.get_ext_fullpath("fused_sft_loss._")).parent
        for module in package.glob("_*.so"):
            if module.name.split(".")[0].removeprefix("_") not in MODULES:
                module.unlink()
        self.in_checkout = bool(self.inplace or self.editable_mode)  # where tests run
        super().run()

    def build_extension(self, ext):
        from ninja import BIN_DIR

        module = MODULES[ext.name.rpartition("_")[2]]
        # Each toolkit has its own folder, so that building +cu12 and +cu13 in turn compiles once.
        # Ninja would not notice that the other one has overwritten a file, so it links in there.
        folder = self.objects_folder() / module.label
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.write(folder / "build.ninja", module, output.name)
        jobs = variables.jobs()
        ninja = [os.path.join(BIN_DIR, "ninja"), "-C", str(folder), "-j", str(jobs)]
        subprocess.run(ninja, env={**os.environ, **self.environment(jobs)}, check=True)
        output.unlink(missing_ok=True)  # a running process may have mapped the old file
        shutil.copy(folder / output.name, output)

    def environment(self, jobs):
        """Settings for the compilers that are kept from ninja: a change must not recompile."""
        # If there are more cores than files, nvcc compiles the targets of a file in parallel.
        threads = max(1, jobs // max(1, len(compilers.gpu_sources())))
        # pip installs the build requirements into a new folder each time.
        includes = [headers.pybind11(), sysconfig.get_path("include")]
        if includes[0] is None:
            sys.exit("expected pybind11 or torch, whose headers are needed: pip install pybind11")
        includes += filter(None, [os.environ.get("CPLUS_INCLUDE_PATH")])
        return {
            "NVCC_APPEND_FLAGS": f"--threads {threads} {os.environ.get('NVCC_APPEND_FLAGS', '')}",
            "CPLUS_INCLUDE_PATH": os.pathsep.join(includes),
        }

    def objects_folder(self):
        """A folder that lasts: an editable install compiles in a folder that is then deleted."""
        given = Path(self.build_temp).absolute()
        lasting = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        return given if given.is_relative_to(ROOT) else lasting

    def write(self, path, module, output):
        from ninja.ninja_syntax import Writer

        version = self.distribution.get_version().partition("+")[0]
        version = compilers.define("FSL_VERSION", version)
        with open(path, "w") as file:
            ninja = Writer(file)
            for name, command in module.commands.items():
                follow = {} if name == "link" else {"depfile": "$out.d", "deps": "gcc"}
                ninja.rule(name, command + ["-MMD -MF $out.d"] * bool(follow), **follow)
            for name, (command, source, flags) in module.objects.items():
                if name == "bindings":
                    flags = flags + [version] + ["-DFSL_TEST_HOOKS"] * self.in_checkout
                ninja.build(
                    f"{name}.o", command, str(compilers.CSRC / source), variables={"flags": flags}
                )
            ninja.build(output, "link", [f"{name}.o" for name in module.objects])


class EggInfo(egg_info):
    """Appends the backends that a wheel contains to its version."""

    def finalize_options(self):
        labels = [module.label for module in MODULES.values()]
        labels = [label for label in labels if label != "cpu"] or labels
        self.tag_build = ""
        if labels and "sdist" not in self.distribution.commands:
            self.tag_build = f"+{'.'.join(labels)}"
        super().finalize_options()


class Toolchains(Command):
    """Prints the backends that would be built. csrc/toolchains has printed why others would not."""

    description = "print the backends that would be built"
    user_options = []

    def initialize_options(self):
        pass

    finalize_options = initialize_options

    def run(self):
        print(*MODULES)


setup(
    ext_modules=[Extension(f"fused_sft_loss._{backend}", sources=[]) for backend in MODULES],
    cmdclass={"build_ext": NinjaBuild, "egg_info": EggInfo, "toolchains": Toolchains},
)
