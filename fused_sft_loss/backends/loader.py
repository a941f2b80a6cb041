"""Import the compiled modules.

``_cuda`` contains NVIDIA's runtime and loads on any machine. ``_hip`` contains no runtime. It must
use the copy that torch has loaded, because a stream of one copy is not valid in another.
"""

import ctypes
import importlib.util
import os
from pathlib import Path
from types import ModuleType

PACKAGE = __package__.partition(".")[0]


def load(backend: str) -> ModuleType:
    """The compiled module of "cpu", "cuda" or "hip".

    Raises:
        ImportError: it was not built, or (hip) no HIP runtime is loaded, or more than one.
    """
    name = f"{PACKAGE}._{backend}"
    if backend == "hip" and importlib.util.find_spec(name):
        share_hip_runtime()
    return importlib.import_module(name)


def loaded_hip_runtimes() -> list[str]:
    """A path of every libamdhip64 in this process. There must not be more than one.

    Two names of one file, like hard links, are one runtime.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux, where there is no HIP either
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "libamdhip64" in line}
    paths = {path for path in paths if Path(path).name.startswith("libamdhip64.so")}
    return sorted({_file(path): path for path in sorted(paths, reverse=True)}.values())


def _file(path: str) -> tuple[int, int] | str:
    """Device and inode. They are the same for all names of a file."""
    try:
        status = os.stat(path)
    except OSError:  # deleted since it was loaded
        return path
    return status.st_dev, status.st_ino


def share_hip_runtime() -> None:
    """Let modules that are loaded later find the symbols of the HIP runtime that torch loaded."""
    runtimes = loaded_hip_runtimes()
    if not runtimes:
        raise ImportError("no HIP runtime is loaded: torch is not a ROCm build")
    if len(runtimes) > 1:
        raise ImportError(
            f"expected one HIP runtime in the process, the one torch brings, got "
            f"{' and '.join(runtimes)}; find what loads the other (LD_PRELOAD, LD_LIBRARY_PATH, "
            "a package that bundles its own)"
        )
    ctypes.CDLL(runtimes[0], mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD | os.RTLD_NOW)
