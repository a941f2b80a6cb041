"""linear_sft_loss: the loss of hidden states and an output layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import agreement, checks, groups, shards
from ..backends import selection
from ..backends.contract import REDUCTIONS
from ..one_read import expected_gradient
from ..options import Options, expect
from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets, weighted_mean
from . import declared_gradient, function, inputs, products, tiles
from .rows import ScoredRows, poisoned, scored_rows
from .sequence_parallel import flattened, gathered
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

    Besides inputs and gradients, memory holds one tile, the R x h scored rows and their gradient in
    fp32, a tile's c columns of the weight's gradient in fp32 unless one tile has all rows, three or
    four numbers for each row and tile, and vectors of the N rows. A CPU without 16-bit products
    also converts c x h of a 16-bit weight at a time. With ``grad_in_forward`` the gradients of
    weight and hidden are held from forward to backward, that of the weight, v x h, in fp32; under
    tensor parallelism there are two tiles. The gradient of the weight is a sum in fp32, rounded
    once.

    Args:
        hidden: `[b, s, h]`, `[s, b, h]` with ``layout="sbv"``, or `[n, h]`; bf16, fp16 or fp32, h
            contiguous. With ``sequence_parallel`` this rank's part of s (or n).
        weight: `[v, h]`, in the dtype of hidden. `v` is this rank's shard of the vocabulary. If it
            does not require a gradient, none is computed. A DTensor that FSDP shards is gathered
            once, and its gradient is averaged over the ranks, as FSDP does.
        labels, loss_mask: as in :func:`sft_loss`, of the whole sequence on every rank.
        bias: `[v]`, or None.
        reduction: as in :func:`sft_loss`.
        chunk_rows: a tile has as many logits as this many rows. None: 4 MiB on a CPU, 128 MiB on a
            GPU.
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


class _Call(NamedTuple):
    """A call whose arguments are checked."""

    hidden: Tensor  # as given: with sequence_parallel this rank's part
    weight: Tensor
    bias: Tensor | None
    layout: str
    sequence_parallel: bool
    scoring: Scoring
    math: RowMath
    size: int  # logits of a tile
    height: int  # rows of a chunk, the same on all ranks
    chunk_rows: int | None
    rows: int | None
    multiple: int
    name: str
    group_name: str
    reduce_name: str  # of the group that sums the gradient of hidden
    backend: str
    declared: bool | float | Tensor  # grad_in_forward
    into_main_grad: bool

    def loss(self, reduction: str) -> Tensor:
        targets, rows = self._rows()
        if self._in_forward:
            result = self._with_gradients(targets, rows, reduction)
        else:
            result = function.differentiable_loss(*self._arguments(targets, rows, reduction))[0]
        result = poisoned(result, rows)
        return result if reduction != "none" else self._everywhere(result, rows)

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
            *inputs, stored, self.math, self.height, self._wanted, self.group_name, self.backend
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
            self._described(),
            self.group_name,
            self.backend,
        )
        targets = Targets(*found)
        return targets, scored_rows(targets, self.rows, self.multiple)

    def _described(self) -> str:
        """What the ranks of a group must agree on, beside the row math and the labels: all that
        decides which collectives they run, and on which shapes."""
        if not self.group_name:
            return self.name
        return (
            f"{self.name} with chunk_rows={self.chunk_rows}, rows={self.rows}, "
            f"multiple={self.multiple}, sequence_parallel={self.sequence_parallel}, "
            f"grad_in_forward={'yes' if self._in_forward else 'no'}, h={self.weight.shape[1]}, "
            f"a gradient of hidden: {'yes' if self._wanted[0] else 'no'}"
        )

    def _inputs(self, targets: Targets, rows: ScoredRows) -> function.Inputs:
        """The tensors that go through the layer. Ranks gather their parts of the sequence here,
        after they have agreed on the call."""
        hidden = self.hidden
        if self.sequence_parallel:
            hidden = gathered(hidden, self.layout, groups.by_name(self.group_name))
        hidden, by_sequence = flattened(hidden, self.layout)
        return function.Inputs(
            hidden,
            self.weight,
            self.bias,
            self._positions(rows, by_sequence),
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

    def _positions(self, rows: ScoredRows, by_sequence: bool) -> Tensor:
        """Of the rows, in flattened hidden states."""
        if not by_sequence:
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
    group = groups.process_group(options.tp_group)
    chunk_rows, ranks = sizes["chunk_rows"], 1 if group is None else group.size()
    columns = tiles.columns_everywhere(len(weight), options, math, ranks)
    return _Call(
        hidden,
        weight,
        bias,
        options.layout,
        sequence_parallel and ranks > 1,
        Scoring(labels, loss_mask, options.cu_seqlens, options.shift, int(options.ignore_index)),
        math,
        tiles.size_of(chunk_rows, len(weight), hidden),
        tiles.chunk_height(chunk_rows, columns, hidden),
        chunk_rows,
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
    inputs.check_bool(sequence_parallel=sequence_parallel)
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
