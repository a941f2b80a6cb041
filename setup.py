"""Build the compiled backends that this machine has a toolchain for. Metadata is in pyproject.toml.

FUSED_SFT_LOSS_BUILD   any of cpu, cuda, hip, with commas between, or none. A toolchain that is
                       missing fails the build. Unset: what there are toolchains for; what is left
                       out, and why, is printed.
TORCH_CUDA_ARCH_LIST   "8.0;9.0a;10.0+PTX". A target named here or in PYTORCH_ROCM_ARCH that the
PYTORCH_ROCM_ARCH      toolchain cannot make fails the build; one of the defaults is left out.
CUDA_HOME, CUDA_PATH, ROCM_PATH, CXX, CXXFLAGS, MAX_JOBS   as everywhere. One that names something
                       wrong fails the build; an empty one counts as unset.

A wheel's version ends in what is inside (+cpu, +cu13, +rocm7); that of an sdist does not.

csrc/toolchains/ knows what compiles what; here it is written down for ninja, and run.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.absolute()
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True  # csrc/ holds sources alone

from csrc.toolchains import compilers, variables  # noqa: E402

MODULES = compilers.modules()


class NinjaBuild(build_ext):
    """Each module is one ninja file: incremental, parallel, and readable after the fact."""

    def run(self):
        # What an earlier build left must not slip into this wheel.
        package = Path(self.get_ext_fullpath("fused_sft_loss._")).parent
        for module in package.glob("_*.so"):
            if module.name.split(".")[0].removeprefix("_") not in MODULES:
                module.unlink()
        super().run()

    def build_extension(self, ext):
        from ninja import BIN_DIR

        backend = ext.name.rpartition("_")[2]
        folder = self.objects_folder() / backend
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.write(folder / "build.ninja", MODULES[backend], output)
        jobs = variables.jobs()
        ninja = [os.path.join(BIN_DIR, "ninja"), "-C", str(folder), "-j", str(jobs)]
        subprocess.run(ninja, env={**os.environ, **self.environment(jobs)}, check=True)

    def environment(self, jobs):
        """What compilers should know and ninja should not: what it knows, it compiles anew for."""
        import pybind11

        # With more cores than files, nvcc compiles a file's targets side by side.
        threads = max(1, jobs // max(1, len(compilers.gpu_sources())))
        # pip puts the build requirements somewhere else each time.
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        includes += filter(None, [os.environ.get("CPLUS_INCLUDE_PATH")])
        return {
            "NVCC_APPEND_FLAGS": f"--threads {threads} {os.environ.get('NVCC_APPEND_FLAGS', '')}",
            "CPLUS_INCLUDE_PATH": os.pathsep.join(includes),
        }

    def objects_folder(self):
        """An editable install compiles into a folder that is then thrown away; this one lasts."""
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
                flags = flags + [version] * (name == "bindings")
                ninja.build(
                    f"{name}.o", command, str(compilers.CSRC / source), variables={"flags": flags}
                )
            ninja.build(str(output), "link", [f"{name}.o" for name in module.objects])


class EggInfo(egg_info):
    """Names in the version what a wheel has inside."""

    def finalize_options(self):
        labels = [module.label for module in MODULES.values()]
        labels = [label for label in labels if label != "cpu"] or labels
        self.tag_build = ""
        if labels and "sdist" not in self.distribution.commands:
            self.tag_build = f"+{'.'.join(labels)}"
        super().finalize_options()


class Toolchains(Command):
    """Prints the backends that would be built; csrc/toolchains has said why not others."""

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
