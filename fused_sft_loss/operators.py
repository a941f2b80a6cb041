"""Operators under ``torch.ops.fused_sft_loss``, with little between a call and its kernel.

torch.library.custom_op asks at every call what tests/test_compile.py asks once (opcheck): of
aliases and of defaults. That was a third of the time that a call took the host.
"""

from collections.abc import Callable

import torch

NAMESPACE = "fused_sft_loss"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, fake: Callable, changes: int | None = None) -> Callable:
    """Decorate a function to be the operator that `schema`, ``name(...) -> ...``, describes.

    It has no gradient. `fake` takes the same arguments and returns tensors of the right shapes
    without data; `changes` is the place of an argument that is written to.
    """

    def register(kernel: Callable) -> Callable:
        def change(*args):
            torch.autograd.graph.increment_version(args[changes])
            return kernel(*args)

        name, run = _define(schema), kernel if changes is None else change
        # Not for torch.compile to look into, when what it compiled calls the operator.
        _library.impl(name, torch.compiler.disable(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return getattr(torch.ops.fused_sft_loss, name).default

    return register


def differentiable(schema: str) -> Callable:
    """Decorate an autograd.Function over such operators to be one that `schema` describes, too."""

    def register(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        _library.impl(_define(schema), function.apply, "CompositeImplicitAutograd")
        return function

    return register


def _define(schema: str) -> str:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return schema.partition("(")[0]
