"""linear_sft_loss: the loss of hidden states and an output layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import agreement, checks, groups, shards
from ..api import LossTerms, TokenMetrics
from ..backends import selection
from ..backends.contract import REDUCTIONS
from ..one_read import expected_gradient
from ..options import Options, expect
from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets, weighted_mean
from . import declared_gradient, function, inputs, products, tiles
from .rows import ScoredRows, poisoned, scored_rows
from .sequence_parallel import Gathered
from .sharded_weight import whole


def linear_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    rows: int | None = None,
    multiple: int = 1,
    sequence_parallel: bool = False,
    **options: Any,
) -> Tensor:
    """:func:`sft_loss` of ``hidden @ weight.T + bias``, without the logits.

    Only scored rows are multiplied, and their logits exist one tile at a time, never as a whole.
    Backward computes them again: four matrix products of R x v x h for R scored rows, where a layer
    and a loss take three for all rows. With ``grad_in_forward`` it is three for R rows. Under
    torch.autocast hidden, weight and bias are cast as torch.nn.functional.linear casts them.

    Besides inputs and gradients, memory holds one tile, R x h in the dtype of hidden and in fp32,
    and vectors of the N rows. The gradient of the weight is a sum in fp32, rounded once.

    Args:
        hidden: `[b, s, h]`, `[s, b, h]` with ``layout="sbv"``, or `[n, h]`; bf16, fp16 or fp32, h
            contiguous. With ``sequence_parallel`` this rank's part of s (or n).
        weight: `[v, h]`, in the dtype of hidden. `v` is this rank's shard of the vocabulary. If it
            does not require a gradient, none is computed. A DTensor that FSDP shards is gathered
            once, and its gradient is averaged over the ranks, as FSDP does.
        labels, loss_mask: as in :func:`sft_loss`, of the whole sequence on every rank.
        bias: `[v]`, or None.
        reduction: as in :func:`sft_loss`.
        chunk_rows: a tile has at most as many logits as this many rows. None: 128 MiB; on a CPU
            4 MiB, which is also the most, or 128 MiB with `grad_in_forward`.
        rows: at least the number of scored rows. The host does not wait for that number then, and
            shapes are fixed, as torch.compile and CUDA graphs need. If more are scored, the loss is
            NaN; on a CPU, and with FUSED_SFT_LOSS_CHECK=1, a ValueError is raised.
        multiple: round the number of scored rows up to a multiple of this.
        sequence_parallel: the ranks of `tp_group` hold neighbouring parts of the sequence, in rank
            order. They are gathered, and the gradient is scattered again.
        **options: those of :func:`sft_loss` except `inplace_backward`.

    Returns:
        The loss, fp32: 0-d, or in the labels' shape with ``reduction="none"``. It is differentiable
        in hidden, weight and bias. Under tensor parallelism the gradient of hidden is summed over
        the ranks, in its own dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`sft_loss`.
    """
    expect(reduction in REDUCTIONS, f"reduction in {REDUCTIONS}", reduction)
    given = Options(**options)
    sizes = {"chunk_rows": chunk_rows, "rows": rows, "multiple": multiple}
    call = _prepared(
        hidden, weight, bias, labels, loss_mask, given, f"{reduction} linear loss", sizes,
        sequence_parallel,
    )  # fmt: skip
    return call.loss(reduction)


def linear_terms(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor | None,
    options: Options,
    sizes: dict[str, int | None],
    *,
    sequence_parallel: bool,
    into_main_grad: bool,
    metrics: bool,
) -> tuple[LossTerms, TokenMetrics | None]:
    """Unreduced losses with a graph, and with `metrics` the figures of `token_metrics`.

    sizes: chunk_rows, rows and multiple. into_main_grad: the gradient of the weight goes into its
    main_grad; see :mod:`.main_grad`.
    """
    call = _prepared(
        hidden, weight, bias, labels, loss_mask, options, "linear loss and metrics", sizes,
        sequence_parallel, into_main_grad,
    )  # fmt: skip
    return call.loss_and_metrics() if metrics else (call.terms(), None)


class _Call(NamedTuple):
    """A call whose arguments are checked."""

    hidden: Tensor  # [M, h]
    weight: Tensor
    bias: Tensor | None
    by_sequence: bool  # row (b, s) is row s * batch + b of hidden, not b * seq + s
    scoring: Scoring
    math: RowMath
    size: int  # logits of a tile
    rows: int | None
    multiple: int
    name: str
    group_name: str
    reduce_name: str  # of the group that sums the gradient of hidden
    backend: str
    declared: bool | float | Tensor  # grad_in_forward
    into_main_grad: bool

    def loss(self, reduction: str) -> Tensor:
        if reduction == "none":
            return self.terms().losses
        targets, rows = self._rows()
        if self._in_forward:
            result = self._with_gradients(targets, rows, reduction)
        else:
            result = function.differentiable_loss(*self._arguments(targets, rows, reduction))[0]
        return poisoned(result, rows)

    def terms(self) -> LossTerms:
        """The losses in the labels' shape, with a graph."""
        targets, rows = self._rows()
        if self._in_forward:
            losses = self._with_gradients(targets, rows, "none")
        else:
            losses = function.differentiable_loss(*self._arguments(targets, rows, "none"))[0]
        losses = self._everywhere(poisoned(losses, rows), rows)
        return LossTerms(losses, targets.weight_sum, targets.count)

    def loss_and_metrics(self) -> tuple[LossTerms, TokenMetrics]:
        """:meth:`terms`, and figures without a graph, from the same logits."""
        targets, rows = self._rows()
        found = function.differentiable_loss_and_metrics(*self._arguments(targets, rows, "none"))
        losses, _normalizer, *figures = found
        losses = self._everywhere(poisoned(losses, rows), rows)
        metrics = (self._everywhere(figure.detach(), rows) for figure in figures)
        return LossTerms(losses, targets.weight_sum, targets.count), TokenMetrics(*metrics)

    @property
    def _in_forward(self) -> bool:
        """Whether forward computes the gradients too."""
        return self.declared is not False and torch.is_grad_enabled() and any(self._wanted)

    @property
    def _wanted(self) -> list[bool]:
        """Whether hidden, weight and bias need gradients."""
        tensors = (self.hidden, self.weight, self.bias)
        return [tensor is not None and tensor.requires_grad for tensor in tensors]

    def _with_gradients(self, targets: Targets, rows: ScoredRows, reduction: str) -> Tensor:
        """The loss, its gradients computed in forward for the declared upstream gradient."""
        mean = reduction == "mean"
        declared = expected_gradient(self.declared, targets.weight_sum, mean)
        stored = declared_gradient.stored_for(declared.float())
        inputs = self._inputs(targets, rows)
        losses, *grads = declared_gradient.losses_and_gradients(
            *inputs, stored, self.math, self.size, self._wanted, self.group_name, self.backend
        )
        losses = declared_gradient.with_gradients(
            *inputs[:3], losses, inputs.positions, rows.weight, stored, *grads,
            self.reduce_name, self.into_main_grad,
        )  # fmt: skip
        if reduction == "none":
            return losses
        total = losses.sum()
        return weighted_mean(total, targets.weight_sum) if mean else total

    def _rows(self) -> tuple[Targets, ScoredRows]:
        found = function.targets(
            self.scoring,
            self.hidden,
            self.math,
            len(self.weight),
            self.name,
            self.group_name,
            self.backend,
        )
        targets = Targets(*found)
        return targets, scored_rows(targets, self.rows, self.multiple)

    def _inputs(self, targets: Targets, rows: ScoredRows) -> function.Inputs:
        return function.Inputs(
            self.hidden,
            self.weight,
            self.bias,
            self._positions(rows),
            rows.target,
            rows.weight,
            targets.weight_sum,
        )

    def _arguments(self, targets: Targets, rows: ScoredRows, reduction: str) -> tuple:
        """The arguments of the differentiable operators."""
        return (
            *self._inputs(targets, rows),
            self.math,
            self.size,
            reduction,
            self.group_name,
            self.backend,
            self.reduce_name,
            self.into_main_grad,
        )

    def _positions(self, rows: ScoredRows) -> Tensor:
        """Of the rows, in hidden."""
        if not self.by_sequence:
            return rows.at
        batch, seq = self.scoring.labels.shape
        return rows.at % seq * batch + rows.at // seq

    def _everywhere(self, result: Tensor, rows: ScoredRows) -> Tensor:
        """The rows' results `[R]` in the labels' shape, 0 in all other rows."""
        labels = self.scoring.labels
        zeros = result.new_zeros(labels.numel())
        return zeros.index_copy(0, rows.at, result).view(labels.shape)


def _prepared(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor | None,
    options: Options,
    name: str,
    sizes: dict[str, int | None],
    sequence_parallel: bool,
    into_main_grad: bool = False,
) -> _Call:
    """Check the arguments. Wrong ones raise, and ranks that share the vocabulary are told."""
    try:
        weight = whole(weight, options.tp_group)
        hidden, weight, bias = products.as_autocast(hidden, weight, bias)
        math, group_name, backend = _validated(
            hidden, weight, bias, labels, loss_mask, options, sizes, sequence_parallel
        )
    except Exception as error:
        agreement.tell(error, options.tp_group, hidden)
        raise
    layout = options.layout
    if sequence_parallel and group_name:
        sequence = 1 if hidden.dim() == 3 and layout == "bsv" else 0
        hidden = Gathered.apply(hidden, sequence, groups.by_name(group_name))
    by_sequence = hidden.dim() == 3 and layout == "sbv"
    if hidden.dim() == 3 and not hidden.is_contiguous():
        swapped = hidden.transpose(0, 1)
        if swapped.is_contiguous():  # flattened without a copy
            hidden, by_sequence = swapped, not by_sequence
    return _Call(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        by_sequence,
        Scoring(labels, loss_mask, options.cu_seqlens, options.shift, int(options.ignore_index)),
        math,
        tiles.size_of(sizes["chunk_rows"], len(weight), hidden, options.one_read),
        sizes["rows"],
        sizes["multiple"] or 1,
        name,
        group_name,
        "" if sequence_parallel else group_name,
        backend,
        options.grad_in_forward if options.one_read else False,
        into_main_grad,
    )


def _validated(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor | None,
    options: Options,
    sizes: dict[str, int | None],
    sequence_parallel: bool,
) -> tuple[RowMath, str, str]:
    """(row math, group name, backend). Raises if this rank's arguments are wrong."""
    options.validate()
    inputs.check_numbers(**sizes)
    if sizes["rows"] is not None and sizes["multiple"] not in (None, 1):
        raise ValueError("expected multiple or rows, got both: rows is a fixed number")
    if options.inplace_backward:
        raise ValueError(
            "expected no inplace_backward: there are no logits whose memory could be used"
        )
    group = groups.process_group(options.tp_group)
    if sequence_parallel and group is None:
        raise ValueError(
            "expected a tp_group with sequence_parallel=True, the ranks that hold the parts of "
            "the sequence, got None"
        )
    ranks = group.size() if sequence_parallel and group is not None else 1
    inputs.check(hidden, weight, bias, labels, loss_mask, options.cu_seqlens, options.layout, ranks)
    checks.constant_mask(loss_mask)
    start, size, group_name = shards.placed(len(weight), options)
    math = RowMath.of(options, start, size)
    if not torch.compiler.is_compiling():
        math = math.read()
    return math, group_name, selection.resolve(options.backend, hidden.device.type)
