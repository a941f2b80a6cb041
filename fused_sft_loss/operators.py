"""Operators under ``torch.ops.fused_sft_loss``, with little between a call and its kernel.

torch.library.custom_op asks at every call what tests/loss/test_compile.py asks once (opcheck): of
aliases and of defaults. That was a third of the time that a call took the host.
"""

import functools
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


def differentiable(schema: str, function: type[torch.autograd.Function]) -> Callable:
    """Register an autograd.Function over such operators as the operator that `schema` describes.

    The Function has `forward` and `setup_context` apart, as torch.func needs them. Elsewhere both
    run in one call, because apply() of such a class first binds the arguments by name, which takes
    the host longer than all the rest.

    Returns:
        What to call in place of the operator: torch.func must be given the Function itself.
    """

    class AtOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(function.backward)

    AtOnce.__name__ = AtOnce.__qualname__ = function.__name__
    name = _define(schema)
    _library.impl(name, AtOnce.apply, "CompositeImplicitAutograd")
    registered = getattr(torch.ops.fused_sft_loss, name).default

    def call(*inputs):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        return registered(*inputs)

    return call


def first_order(backward: Callable) -> Callable:
    """Decorate a Function's backward: its first result is a gradient that has no gradient itself.

    torch's once_differentiable looks at the upstream gradient alone. That of a loss is a constant
    1, so a second derivative (create_graph=True, torch.func) would silently be 0.
    """

    @functools.wraps(backward)
    def run(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        logits = ctx.saved_tensors[0]  # before they may be overwritten
        with torch.no_grad():
            grad_logits, *others = backward(ctx, *grads)
        return (_FirstOrder.apply(grad_logits, logits, *grads), *others)

    return run


class _FirstOrder(torch.autograd.Function):
    """The gradient; it depends on the other inputs, in a way that is not implemented."""

    @staticmethod
    def forward(grad_logits, logits, *grads):
        return grad_logits.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            "expected one derivative of the loss, got a second one (create_graph=True, hvp or "
            "nested torch.func.grad): its gradient has no gradient. Use torch's own cross_entropy "
            "where a second derivative is needed"
        )


def _define(schema: str) -> str:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return schema.partition("(")[0]
