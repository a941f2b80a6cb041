"""Optional tools that are missing on this machine, what is skipped, and how to install them.

`python -m csrc.toolchains.optional` prints them. `make system` runs it before it installs anything.
"""

import os
import subprocess
import sys

from . import compilers, toolkits, without

#: Tool -> (what it is, what is skipped without it, how to install it).
ABOUT = {
    "boost": (
        "Boost.Context",
        "tests that execute GPU kernels on the CPU",
        "apt-get install libboost-context-dev",
    ),
    "nvcc": (
        "nvcc",
        "the CUDA module and the tests of its machine code and PTX",
        "install the CUDA toolkit 12.8 or newer (Debian has none)",
    ),
    "clang": (
        "clang with HIP's headers",
        "the HIP module and the tests of its machine code",
        "apt-get install --no-install-recommends clang-19 clang-tools-19 lld-19 llvm-19 "
        "libamdhip64-dev",
    ),
}


def reason_without_boost() -> str | None:
    """Why programs cannot be compiled with Boost.Context, or None."""
    if reason := without.absent("boost"):
        return f"Boost.Context is absent: {reason}"
    program = "#include <boost/context/detail/fcontext.hpp>\nint main() {}"
    command = [*compilers.cxx(), "-x", "c++", "-", "-o", os.devnull, "-lboost_context"]
    if subprocess.run(command, input=program, text=True, capture_output=True).returncode:
        return f"Boost.Context is missing: {ABOUT['boost'][2]}"
    return None


def _is_found(find) -> bool:
    try:
        return bool(find())
    except toolkits.Missing:
        return False


def absent() -> list[str]:
    """The tools in ABOUT that are missing on this machine."""
    here = {
        "boost": _is_found(lambda: not reason_without_boost()),
        "nvcc": _is_found(lambda: next(toolkits.cudas())),
        "clang": _is_found(lambda: next(toolkits.hips())),
    }
    return [tool for tool in ABOUT if not here[tool]]


if __name__ == "__main__":
    for tool in absent():
        name, skipped, install = ABOUT[tool]
        print(f"optional, absent: {name}; {skipped} are skipped: {install}", file=sys.stderr)
