"""FUSED_SFT_LOSS_WITHOUT: the optional tools that this checkout treats as absent.

It tests a machine without them:

    make test FUSED_SFT_LOSS_WITHOUT=all            without any of them
    make test FUSED_SFT_LOSS_WITHOUT=boost,triton   without these two

The build, the tests and the Makefile read it; the installed package does not.
`python csrc/toolchains/without.py` prints the tools that it names.
"""

import os
import re
import sys

VARIABLE = "FUSED_SFT_LOSS_WITHOUT"

TOOLS = {
    "boost": "Boost.Context, which executes GPU kernels on the CPU",
    "nvcc": "NVIDIA's compiler",
    "clang": "clang or hipcc, which compile for AMD",
    "liger": "Liger in build/peers",
    "megatrons": "further versions of megatron-core in build/megatron",
    "transformers": "Hugging Face's transformers and accelerate",
    "triton": "Triton; the Makefile puts tests/support/without_triton into PYTHONPATH for it",
}


def tools() -> list[str]:
    """The tools that are treated as absent.

    Ends the process if the variable names anything else.
    """
    text = os.environ.get(VARIABLE, "")
    names = re.findall(r"[^,\s]+", text)
    if not set(names) <= {"all", *TOOLS}:
        sys.exit(f"{VARIABLE}: expected names from all, {', '.join(TOOLS)}, got {text!r}")
    return [tool for tool in TOOLS if "all" in names or tool in names]


def absent(tool: str) -> str | None:
    """Why `tool` must not be used, or None."""
    return f"{VARIABLE}={os.environ[VARIABLE]}" if tool in tools() else None


if __name__ == "__main__":
    print(*tools())
