"""All ways to compute the loss from hidden states and an output layer.

Each gets its best case: labels that are already shifted, masked labels as ignored labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fused_sft_loss import linear_sft_loss, sft_loss
from fused_sft_loss.linear.products import dtype_of_products

from ..clock import Clock
from ..kernels.provider import reason_against_peer
from ..reference import reference_loss
from .case import Case
from .products import operations_per_second

CHUNK_ROWS = 256  # of the chunked loss, if the case has none


@dataclass(frozen=True)
class Provider:
    """One way to compute the masked mean loss and the gradients of hidden and weight.

    name      for --provider
    build     build(problem) -> loss(hidden [1, s, h], weight [v, h]) -> 0-d, with a graph
    products  matrix products that it computes: 3, or 4 if it computes the logits again
    own       it multiplies in the dtype of hidden, also on a CPU without instructions for that
    devices, module, install: as in kernels/provider.py
    """

    name: str
    title: str
    build: Callable
    products: int = 3
    own: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str | None = None
    install: str | None = None
    reason: Callable[[], str | None] | None = None

    def reason_against(self, case: Case, device_type: str) -> str | None:
        """Why it cannot run this case on this device type, or None."""
        here = reason_against_peer(self, device_type) or (self.reason and self.reason())
        return here or (_too_slow(self, case) if device_type == "cpu" and self.own else None)

    def precision(self, problem):
        """A key of kernels.oracle.TOLERANCE: whether logits are rounded to 16 bits."""
        rounded = self.own or dtype_of_products(problem.hidden) != torch.float32
        return "logits" if rounded else "fp32"


def _too_slow(provider, case):
    """A reason if the products of all rows are predicted to exceed the case's limit."""
    speed = _cpu_speed(case.dtype)
    seconds = provider.products * case.operations * case.rows / case.scored_rows / speed
    if seconds <= case.limit:
        return None
    return (
        f"predicted {seconds:,.0f} s, --limit is {case.limit:g} s: this CPU multiplies "
        f"{case.dtype} at {speed / 1e9:.2g} GFLOP/s"
    )


@cache
def _cpu_speed(dtype):
    return operations_per_second(dtype, Clock("cpu"))


def ours(problem, in_forward):
    case = problem.case
    options = {"grad_in_forward": problem.upstream} if in_forward else {}

    def loss(hidden, weight):
        return linear_sft_loss(
            hidden, weight, problem.labels, problem.mask, chunk_rows=case.chunk_rows, **options
        )

    return loss


def logits_and_ours(problem, in_place):
    def loss(hidden, weight):
        logits = F.linear(hidden, weight)
        return sft_loss(logits, problem.labels, problem.mask, inplace_backward=in_place)

    return loss


def logits_and_reference(problem):
    return lambda hidden, weight: reference_loss(
        F.linear(hidden, weight), problem.labels, problem.mask
    )


def torch_linear(problem, chunked):
    """PyTorch's own: with options=None it holds the logits."""
    options = None
    if chunked:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=problem.case.chunk_rows)

    def loss(hidden, weight):
        return F.linear_cross_entropy(
            hidden[0], weight, problem.target, ignore_index=-100, options=options
        )

    return loss


def _reason_without_torch_linear():
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"needs torch >= 2.13, this is {torch.__version__}"


def chunked(problem):
    """Chunks of rows under activation checkpointing: backward computes the logits of each again.
    Scored rows are selected first."""
    at, rows = problem.at, problem.case.chunk_rows or CHUNK_ROWS
    target = problem.target[at].split(rows)

    def of_chunk(hidden, weight, target):
        return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")

    def loss(hidden, weight):
        parts = hidden[0].index_select(0, at).split(rows)
        total = sum(
            checkpoint(of_chunk, part, weight, labels, use_reentrant=False)
            for part, labels in zip(parts, target, strict=True)
        )
        return total / len(at)

    return loss


def liger(problem, accumulate):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight: liger_fused_linear_cross_entropy(
        hidden[0], weight, problem.target, ignore_index=-100, accum_dtype=accumulate
    )


def quack(problem):
    """Chunks with the logits' gradient in forward. Read in the wheel of quack-kernels 0.6.5."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    chunk = {} if problem.case.chunk_rows is None else {"chunk_size": problem.case.chunk_rows}
    return lambda hidden, weight: chunked_linear_cross_entropy(
        hidden[0], weight, problem.target, ignore_index=-100, **chunk
    )


LIGER = {"devices": ("cuda",), "module": "liger_kernel", "install": "liger-kernel"}
TORCH = {"reason": _reason_without_torch_linear}

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours-linear", "ours (linear)", partial(ours, in_forward=False), 4, own=False),
        Provider(
            "ours-linear-in-forward",
            "ours (linear, grad in forward)",
            partial(ours, in_forward=True),
            own=False,
        ),
        Provider(
            "torch-linear", "F.linear_cross_entropy", partial(torch_linear, chunked=False), **TORCH
        ),
        Provider(
            "torch-linear-chunked",
            "F.linear_cross_entropy, chunked",
            partial(torch_linear, chunked=True),
            **TORCH,
        ),
        Provider("liger-linear", "Liger fused linear", partial(liger, accumulate=None), **LIGER),
        Provider(
            "liger-linear-fp32",
            "Liger fused linear, fp32 sum",
            partial(liger, accumulate=torch.float32),
            **LIGER,
        ),
        Provider(
            "quack-linear",
            "quack linear",
            quack,
            devices=("cuda",),
            module="quack",
            install="quack-kernels",
        ),
        Provider("chunked", "checkpointed chunks", chunked, 4),
        Provider(
            "logits-ours-inplace",
            "F.linear + ours, in place",
            partial(logits_and_ours, in_place=True),
        ),
        Provider("logits-ours", "F.linear + ours", partial(logits_and_ours, in_place=False)),
        Provider("logits-reference", "F.linear + reference", logits_and_reference),
    )
}
