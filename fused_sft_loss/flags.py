"""Switches in the environment, all parsed by `enabled`."""

import os

ON = ("1", "true", "yes", "on")
OFF = ("", "0", "false", "no", "off")

#: Check values and compare ranks on a GPU too, where that synchronises with the host.
CHECK = "FUSED_SFT_LOSS_CHECK"


def enabled(name: str) -> bool:
    """Whether the environment variable `name` is on; unset or empty is off.

    Raises:
        ValueError: its value is neither in ON nor in OFF.
    """
    value = os.environ.get(name, "")
    word = value.strip().lower()
    if word not in ON + OFF:
        raise ValueError(
            f"expected {name} to be one of {', '.join(ON)} (on) or {', '.join(OFF[1:])} (off), got "
            f"{value!r}; set one of these or unset it"
        )
    return word in ON
