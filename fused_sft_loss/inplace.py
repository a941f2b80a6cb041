"""Whether the gradient may overwrite the logits.

Overwriting is safe if nobody reads the old values afterwards. Other operators may have saved the
logits for their own backward. Autograd's version counter makes such a backward raise. The rule is
therefore: in place only where the version counter works, and only in memory that belongs to the
logits.

    the version counter is off                   what happens
    inside a graph (torch.compile, export)       the gradient is a new tensor: see `traced`
    saved_tensors_hooks around the loss          refused; non-reentrant checkpointing, save_on_cpu
                                                 and activation offloading are such hooks
    hooks that saved the logits for the          refused
    operator that made them
    torch.func transforms                        refused

    the memory is not the logits' own            refused: a leaf, a view of a leaf, overlapping rows
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

ADVICE = "pass inplace_backward=False"


def traced(tensor: Tensor) -> bool:
    """Whether a compiler is tracing the operators on this tensor.

    A graph has no version counters: a write would change values that other operators of the graph
    saved. The compiler plans the graph's memory, so the gradient is a new tensor.
    """
    return torch.compiler.is_compiling() or isinstance(tensor, (FunctionalTensor, FakeTensor))


def prepare(logits: Tensor) -> None:
    """Raise ValueError unless the logits' memory may be overwritten; call once, before the loss."""
    if traced(logits) or not (logits.requires_grad and torch.is_grad_enabled()):
        return  # nothing will be overwritten
    _rows_apart(logits)
    _not_a_parameter(logits)
    _no_hooks(logits)
    _keep_place_in_graph(logits)


def _rows_apart(logits: Tensor) -> None:
    """Raise ValueError if rows overlap: sorted by stride, no dimension may reach into the next."""
    span = logits.shape[-1]
    rows = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    for stride, size in sorted((stride, size) for stride, size in rows if size > 1):
        if stride < span:
            raise ValueError(
                "expected logits whose rows do not share memory for inplace_backward, got strides "
                f"{list(logits.stride())} for shape {list(logits.shape)}; {ADVICE}"
            )
        span += (size - 1) * stride


def _not_a_parameter(logits: Tensor) -> None:
    owner = _owner(logits)
    if owner.is_leaf and owner.requires_grad:
        view = "" if owner is logits else "a view of "
        raise ValueError(
            f"expected non-leaf logits for inplace_backward, got {view}a leaf that requires grad: "
            f"its value would be replaced by its gradient. Pass a model's output, or {ADVICE}"
        )


def _no_hooks(logits: Tensor) -> None:
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"expected no inplace_backward under torch.func transforms, got one active; {ADVICE}"
        )
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise ValueError(
            "expected no inplace_backward under saved_tensors_hooks, got hooks around the loss "
            "(torch.utils.checkpoint with use_reentrant=False, save_on_cpu and activation "
            "offloading set them): autograd would not notice that saved logits are overwritten. "
            f"Compute the loss outside of them, or {ADVICE}"
        )
    maker = _owner(logits).grad_fn
    if maker is not None and any(_shares_memory(kept, logits) for kept in _saved(maker)):
        raise ValueError(
            "expected logits that nobody needs after the loss for inplace_backward, got logits "
            f"that {maker.name()} saved for its backward under saved_tensors_hooks, where autograd "
            f"would not notice that they are overwritten; {ADVICE}"
        )


def _owner(logits: Tensor) -> Tensor:
    """The tensor that the logits are a view of, or the logits themselves."""
    return logits if logits._base is None else logits._base


def _saved(maker: Node) -> Iterator[Tensor]:
    """The results of operator `maker` that it saved through hooks; torch 2.6 does not show them."""
    for name in ("_raw_saved_result", "_raw_saved_output", "_raw_saved_tensors"):
        saved = getattr(maker, name, ())
        for entry in saved if isinstance(saved, tuple) else (saved,):
            if getattr(entry, "unpack_hook", None) is not None:
                yield from (kept for kept in tree_leaves(entry.data) if isinstance(kept, Tensor))


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and _address(a) == _address(b)


def _address(tensor: Any) -> int:
    """Of the tensor's memory; for a DTensor that of its local part."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.detach().to_local()
    return tensor.untyped_storage().data_ptr()


def _keep_place_in_graph(logits: Tensor) -> None:
    """Make sure that hooks registered after the loss see the gradient.

    When memory is written to, autograd makes a new grad_fn for each view of it. No gradient passes
    through the new grad_fn, and `register_hook` on such a view crashes the process (torch 2.13). A
    view that already has a dictionary of hooks, even an empty one, keeps it at its old grad_fn.
    Later hooks are added to that dictionary.
    """
    if logits._is_view():
        logits.register_hook(lambda grad: None).remove()
