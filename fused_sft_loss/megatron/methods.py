"""Replacing a method of one object for a while."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def replace_method(stack: ExitStack, owner: object, name: str, method: Callable[..., Any]) -> None:
    """`owner.name(...)` calls method(base, ...) until the stack unwinds.

    base is the owner's own method, also if an outer context has replaced it already.
    """
    current = getattr(owner, name)
    base = getattr(current, "fused_sft_loss_base", current)

    @functools.wraps(base)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return method(base, *args, **kwargs)

    replacement.fused_sft_loss_base = base  # type: ignore[attr-defined]
    own, missing = vars(owner), object()
    before = own.get(name, missing)

    def restore() -> None:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    stack.callback(restore)
    setattr(owner, name, replacement)
