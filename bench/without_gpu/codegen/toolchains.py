"""Find this machine's CUDA and HIP compilers and compile csrc/ for a chip."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from csrc.toolchains import toolkits, without
from csrc.toolchains.variables import given

from ...errors import UserError
from ..chips import AMD, CHIPS, NVIDIA
from . import compiled_cache
from .instances import FOLDER

CLANGS = ("clang++", *(f"clang++-{version}" for version in range(22, 16, -1)))
INSTALL = {
    "cuda": "install the CUDA toolkit 12.8 or newer and set CUDA_HOME, or put nvcc on PATH",
    "hip": "apt-get install --no-install-recommends clang-19 libamdhip64-dev",
}
#: Compiler names of the chips. sm_90a as in wheels: kernels may use Hopper-only instructions.
TARGETS = {
    "cuda": {
        name: f"sm_{CHIPS[name].build.removesuffix('+PTX').replace('.', '')}" for name in NVIDIA
    },
    "hip": {name: CHIPS[name].build for name in AMD},
}
# The build's flags that affect device code. No contraction: it would create FMAs.
FLAGS = {
    "cuda": ("-std=c++17", "-O3", "-fmad=false"),
    "hip": (
        *("-x", "hip", "-std=c++17", "-O3", "-ffp-contract=off"),
        *("--offload-device-only", "-nogpulib"),
    ),
}
OUTPUT = {"cuda": "-cubin", "hip": "-S"}


@dataclass(frozen=True)
class Toolchain:
    backend: str
    compiler: str
    version: str

    def command(self, target: str, output: str | None = None) -> list[str]:
        option = "-arch" if self.backend == "cuda" else "--offload-arch"
        name = TARGETS[self.backend][target]
        output = output or OUTPUT[self.backend]
        return [self.compiler, *FLAGS[self.backend], f"{option}={name}", output]

    def refusal(self, target: str) -> str | None:
        """Why the compiler cannot compile for a target it should know; None if it can."""
        extra = ("-nogpuinc",) if self.backend == "hip" else ("-x", "cu")
        done = _run([*self.command(target), *extra, "-", "-o", os.devnull], "")
        if not done.returncode:
            return None
        return f"{Path(self.compiler).name}: {_first_error(done.stderr)}"

    def compile(
        self, targets: list[str], folder: Path, jobs: int, output: str | None = None
    ) -> dict[str, list[bytes]]:
        """Code of every device file for each target, cached in `folder` by a hash of the inputs.

        `output` is the compiler's output option, such as "-ptx".
        """
        sources = sorted(FOLDER.glob("*.cu"))
        tasks = [(target, source) for target in targets for source in sources]
        # Largest source first: it takes longest.
        tasks.sort(key=lambda task: -task[1].stat().st_size)
        with ThreadPoolExecutor(jobs) as pool:
            codes = list(pool.map(lambda task: self._one(*task, output, folder), tasks))
        made: dict[str, list[bytes]] = {target: [] for target in targets}
        for (target, _), code in zip(tasks, codes, strict=True):
            made[target].append(code)
        return made

    def _one(self, target: str, source: Path, output: str | None, folder: Path) -> bytes:
        command = self.command(target, output)
        made_of = (self.version, " ".join(command), source.name, _text(source))
        path = folder / self.backend / compiled_cache.digest(*(part.encode() for part in made_of))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            done = _run([*command, str(source), "-o", str(partial)])
            if done.returncode:
                raise UserError(f"{source.name} for {target}: {_first_error(done.stderr)}")
            partial.replace(path)
        return path.read_bytes()


@cache
def find(backend: str) -> Toolchain | None:
    """The compiler for `cuda` or `hip`, or None."""
    if _left_out(backend):
        return None
    for compiler in _candidates(backend):
        path = shutil.which(compiler)
        if path and (backend == "cuda" or _makes_hip(path)):
            return Toolchain(backend, path, _run([path, "--version"]).stdout)
    return None


def need(backend: str) -> Toolchain:
    if found := find(backend):
        return found
    raise UserError(f"no compiler for --backend {backend} here: {advice(backend)}")


def advice(backend: str) -> str:
    """How to install a compiler, or the switch that disables it."""
    return _left_out(backend) or INSTALL[backend]


def _left_out(backend: str) -> str | None:
    return without.absent({"cuda": "nvcc", "hip": "clang"}[backend])


def _candidates(backend: str) -> list[str]:
    if backend == "cuda":
        for variable in toolkits.CUDA_VARIABLES:
            if home := given(variable):
                return [f"{home}/bin/nvcc"]
        return ["nvcc", "/usr/local/cuda/bin/nvcc"]
    inside = [f"{root}/llvm/bin/clang++" for root in toolkits.rocm_roots()]
    return [*inside, *CLANGS]


def _makes_hip(clang: str) -> bool:
    """Whether clang has the AMDGPU target and finds HIP's headers."""
    command = [clang, *FLAGS["hip"], "--offload-arch=gfx90a", "-fsyntax-only", "-"]
    return _run(command, "#include <hip/hip_runtime.h>\n").returncode == 0


def _run(command: list[str], text: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command, input=text, capture_output=True, text=True)


def _first_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "error" in line] or stderr.splitlines()
    first = lines[0] if lines else "no reason given"
    return (first.partition("error: ")[2] or first).partition(";")[0]


def _text(source: Path) -> str:
    """A device file and the csrc/ files it includes, without comments: they change no code."""
    pending, texts = [source], {}
    while pending:
        path = pending.pop()
        if path not in texts and path.exists():
            texts[path] = re.sub(r"//[^\n]*", "", path.read_text())
            pending += [
                (path.parent / n).resolve() for n in re.findall(r'#include "([^"]+)"', texts[path])
            ]
    return "\n".join(texts[path] for path in sorted(texts))
