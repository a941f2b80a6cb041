"""The environment variables of a build.

An empty variable counts as unset. A variable that names something wrong ends the build, even if
another tool would work, because the user asked for that one.
"""

import os
import re
import sys

BACKENDS = ("cpu", "cuda", "hip")


def given(variable: str) -> str | None:
    """The value of a variable, or None if it is unset or blank."""
    return os.environ.get(variable, "").strip() or None


def say(text: str) -> None:
    """Tell what a build does or leaves out. stdout is for results."""
    print(f"fused_sft_loss: {text}", file=sys.stderr, flush=True)


def refuse(variable: str, text: str):
    """End the build with an error message."""
    sys.exit(f"{variable}: {text}")


def named_targets(variable: str) -> list[str]:
    """The targets in TORCH_CUDA_ARCH_LIST or PYTORCH_ROCM_ARCH, split as torch splits them."""
    return re.findall(r"[^;,\s]+", given(variable) or "")


def named_backends() -> set[str] | None:
    """The backends in FUSED_SFT_LOSS_BUILD, or None if it is unset: then all that can be built."""
    named = given("FUSED_SFT_LOSS_BUILD")
    chosen = set(re.findall(r"[^,\s]+", named or ""))
    if named and chosen != {"none"} and not (chosen and chosen <= set(BACKENDS)):
        refuse(
            "FUSED_SFT_LOSS_BUILD", f"expected names from cpu, cuda, hip, or none, got {named!r}"
        )
    return chosen - {"none"} if named else None


def jobs() -> int:
    """The number of parallel compilations."""
    text = given("MAX_JOBS") or str(os.cpu_count())
    if not re.fullmatch(r"[1-9][0-9]*", text):
        refuse("MAX_JOBS", f"expected a whole number, 1 or more, got {text!r}; or unset it")
    return int(text)
