"""The environment variables that steer a build.

An empty variable counts as unset. One that names something wrong ends the build, also where another
tool would do: whoever set it wants that one.
"""

import os
import re
import sys


def given(variable: str) -> str | None:
    """What a variable says, or None when it is unset or blank."""
    return os.environ.get(variable, "").strip() or None


def refuse(variable: str, text: str):
    """End the build."""
    sys.exit(f"{variable}: {text}")


def named_targets(variable: str) -> list[str]:
    """The targets that TORCH_CUDA_ARCH_LIST or PYTORCH_ROCM_ARCH names, split as torch does."""
    return re.findall(r"[^;,\s]+", given(variable) or "")


def jobs() -> int:
    """Compilations at a time."""
    text = given("MAX_JOBS") or str(os.cpu_count())
    if not re.fullmatch(r"[1-9][0-9]*", text):
        refuse("MAX_JOBS", f"expected a whole number, 1 or more, got {text!r}; or unset it")
    return int(text)
