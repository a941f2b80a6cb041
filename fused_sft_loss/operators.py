"""Register operators under ``torch.ops.fused_sft_loss``. Ordinary calls bypass the dispatcher.

torch.compile, opcheck and dispatch modes need operators: schemas, shapes, and which arguments are
written to. An ordinary call needs none of these. It calls the Python function itself, which saves
the host the time of the dispatcher. (torch.library.custom_op would also check aliases and defaults
in every call. test_compile.py checks them once.)

A schema may name a record, as in "RowMath math". The operator then takes the fields of the record
instead, and :class:`Layout` packs and unpacks them. Functions and callers see only the record.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack

from . import rowmath, scoring
from .rowmath import RowMath
from .scoring import Scoring

NAMESPACE = "fused_sft_loss"
#: The records that a schema may name, and their fields as the operator takes them.
RECORDS: dict[str, type[RowMath] | type[Scoring]] = {"RowMath": RowMath, "Scoring": Scoring}
FIELDS = {"RowMath": rowmath.SCHEMA, "Scoring": scoring.SCHEMA}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


def operator(schema: str, fake: Callable, changes: int | None = None) -> Callable:
    """Decorate a function: register it as the operator that `schema` describes.

    The schema is ``name(...) -> ...``. The operator has no gradient. Its first argument is a tensor
    or a Scoring. `fake` takes the same arguments and returns uninitialised tensors of the right
    shapes. `changes` is the index of an argument that the function writes to.

    Returns:
        A function that calls the operator if the call is `watched`, else the decorated function.
    """

    def register(kernel: Callable) -> Callable:
        layout, run = Layout(schema), kernel if changes is None else _counted(kernel, changes)
        # torch.compile must not trace the kernel when compiled code calls the operator.
        registered = layout.define(torch.compiler.disable(run), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"{NAMESPACE}::{layout.name}", layout.of_fields(fake), lib=_library
        )

        def call(*args: Any) -> Any:
            return registered(*layout.packed(args)) if watched(args[0]) else run(*args)

        return call

    return register


def _counted(kernel: Callable, changes: int) -> Callable:
    """The kernel; each call first bumps the version counter of the argument it writes to."""

    def change(*args: Any) -> Any:
        torch.autograd.graph.increment_version(args[changes])
        return kernel(*args)

    return change


def differentiable(schema: str, function: type[torch.autograd.Function]) -> Callable:
    """Register an autograd.Function that calls such operators as the operator of `schema`.

    The Function has separate methods `forward` and `setup_context`, because torch.func needs them.
    apply() of such a Function first binds the arguments by name, which takes the host longer than
    the rest of the call. All other calls therefore use AtOnce, which runs both in one method.

    Returns:
        A function to call instead of the operator. Under torch.func it applies the Function itself.
    """

    class AtOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(function.backward)

    AtOnce.__name__ = AtOnce.__qualname__ = function.__name__
    layout = Layout(schema)
    registered = layout.define(AtOnce.apply, "CompositeImplicitAutograd")

    def call(*inputs: Any) -> Any:
        if not watched(inputs[0]):
            return AtOnce.apply(*inputs)
        if not torch.compiler.is_compiling() and _are_functorch_transforms_active():
            return function.apply(*inputs)
        return registered(*layout.packed(inputs))

    return call


def watched(first: Tensor | Scoring) -> bool:
    """Whether a call must go through the dispatcher: it is traced, transformed or recorded."""
    tensor = first.labels if isinstance(first, Scoring) else first
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in _PLAIN
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
    )


class Layout:
    """Converts between arguments with records and the flat arguments of an operator's schema."""

    def __init__(self, schema: str):
        self.name, _, rest = schema.partition("(")
        arguments, _, results = rest.partition(") -> ")
        kinds = [argument.split()[0] for argument in arguments.split(", ")]
        self.records = [RECORDS.get(kind) for kind in kinds]
        self.schema = f"{self.name}({self._expanded(arguments)}) -> {results}"

    @staticmethod
    def _expanded(arguments: str) -> str:
        for name, fields in FIELDS.items():
            arguments = re.sub(rf"\b{name} \w+", fields, arguments)
        return arguments

    def define(self, function: Callable, dispatch_key: str) -> Callable:
        """Register the function, which takes records; returns the operator, which takes fields."""
        _library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self.of_fields(function), dispatch_key)
        return getattr(torch.ops.fused_sft_loss, self.name).default

    def packed(self, args: tuple) -> list:
        """Replace each record by its fields."""
        flat: list[Any] = []
        for value, record in zip(args, self.records, strict=True):
            flat += [value] if record is None else value.packed()
        return flat

    def of_fields(self, function: Callable) -> Callable:
        """Wrap a function that takes records into one that takes their fields."""

        @functools.wraps(function)
        def of_fields(*flat: Any) -> Any:
            args: list[Any] = []
            left = iter(flat)
            for record in self.records:
                if record is None:
                    args.append(next(left))
                else:
                    args.append(record(*(next(left) for _ in record._fields)))
            return function(*args)

        return of_fields


def first_order(backward: Callable) -> Callable:
    """Decorate a Function's backward so that a second derivative raises.

    The gradients that it returns have no gradient themselves. torch's once_differentiable raises
    only if the upstream gradient requires a gradient. The upstream gradient of a loss is a constant
    1, so with it a second derivative (create_graph=True, torch.func) would silently be 0.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        saved = ctx.saved_tensors  # read before backward may overwrite them
        kept = [saved[0], *(t for t in saved[1:] if t is not None and t.requires_grad), *grads]
        with torch.no_grad():
            found = backward(ctx, *grads)
        return tuple(grad if grad is None else _FirstOrder.apply(grad, *kept) for grad in found)

    return run


class _FirstOrder(torch.autograd.Function):
    """Returns the gradient, and keeps its inputs in the graph. Its own backward raises."""

    @staticmethod
    def forward(grad: Tensor, *kept: Tensor | None) -> Tensor:
        return grad.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError(
            "expected one derivative of the loss, got a second one (create_graph=True, hvp or "
            "nested torch.func.grad): its gradient has no gradient. Use torch's own cross_entropy "
            "where a second derivative is needed"
        )
