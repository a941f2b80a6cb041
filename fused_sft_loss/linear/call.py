"""A call of `linear_sft_loss`: its checks, its rows, and the operators that it runs."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import agreement, checks, groups, shards
from ..api import LossTerms, TokenMetrics
from ..backends import selection
from ..one_read import expected_gradient
from ..options import Options
from ..rowmath import RowMath
from ..scoring import Scoring
from ..targets import Targets, weighted_mean
from . import declared_gradient, function, inputs, products, tiles
from .rows import ScoredRows, poisoned, scored_rows
from .sequence_parallel import flattened, gathered
from .sharded_weight import whole


class Sizes(NamedTuple):
    """How many logits and rows a call computes; see `linear_sft_loss`."""

    chunk_rows: int | None = None
    rows: int | None = None
    multiple: int = 1

    def check(self) -> None:
        """Raise ValueError for a number that is no integer from 1 on, and for a `multiple` of a
        fixed number of rows."""
        for name, value in self._asdict().items():
            whole_number = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole_number or value < 1):
                raise ValueError(f"expected {name} to be an integer >= 1, got {value!r}")
        if self.rows is not None and self.multiple != 1:
            raise ValueError("expected multiple or rows, got both: rows is a fixed number")


class Call(NamedTuple):
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
    sizes: Sizes
    name: str
    group_name: str
    reduce_name: str  # of the group that sums the gradient of hidden
    backend: str
    declared: bool | float | Tensor  # grad_in_forward
    into_main_grad: bool

    def loss(self, reduction: str) -> Tensor:
        if reduction == "none":
            return self.terms().losses
        return self._result(*self._rows(), reduction)

    def terms(self) -> LossTerms:
        """The losses in the labels' shape, with a graph."""
        targets, rows = self._rows()
        losses = self._everywhere(self._result(targets, rows, "none"), rows)
        return LossTerms(losses, targets.weight_sum, targets.count)

    def loss_and_metrics(self) -> tuple[LossTerms, TokenMetrics]:
        """:meth:`terms`, and figures without a graph, from the same logits."""
        targets, rows = self._rows()
        found = function.differentiable_loss_and_metrics(*self._arguments(targets, rows, "none"))
        losses, _normalizer, *figures = found
        losses = self._everywhere(poisoned(losses, rows), rows)
        metrics = (self._everywhere(figure.detach(), rows) for figure in figures)
        return LossTerms(losses, targets.weight_sum, targets.count), TokenMetrics(*metrics)

    def _result(self, targets: Targets, rows: ScoredRows, reduction: str) -> Tensor:
        """The loss, 0-d or `[R]`, by the schedule that the options ask for."""
        if self._in_forward:
            result = self._with_gradients(targets, rows, reduction)
        else:
            result = function.differentiable_loss(*self._arguments(targets, rows, reduction))[0]
        return poisoned(result, rows)

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
        return targets, scored_rows(targets, self.sizes.rows, self.sizes.multiple)

    def _described(self) -> str:
        """What the ranks of a group must agree on, beside the row math and the labels: all that
        decides which collectives they run, and on which shapes."""
        if not self.group_name:
            return self.name
        return (
            f"{self.name} with {self.sizes}, sequence_parallel={self.sequence_parallel}, "
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


def prepared(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor | None,
    options: Options,
    name: str,
    sizes: Sizes,
    sequence_parallel: bool,
    into_main_grad: bool = False,
    per_sample: bool = False,
) -> Call:
    """Check the arguments. Wrong ones raise, and ranks that share the vocabulary are told."""
    try:
        options.validate(per_sample)
        weight = whole(weight, options.tp_group)
        hidden, weight, bias = products.as_autocast(hidden, weight, bias)
        math, group_name, backend = _validated(
            hidden, weight, bias, labels, loss_mask, options, sizes, sequence_parallel
        )
    except Exception as error:
        agreement.tell(error, options.tp_group, hidden)
        raise
    ignored = int(options.ignore_index)
    scoring = Scoring(labels, loss_mask, options.cu_seqlens, options.shift, ignored, per_sample)
    group = groups.process_group(options.tp_group)
    ranks = 1 if group is None else group.size()
    columns = tiles.columns_everywhere(len(weight), options, math, ranks)
    return Call(
        hidden,
        weight,
        bias,
        options.layout,
        sequence_parallel and ranks > 1,
        scoring,
        math,
        tiles.size_of(sizes.chunk_rows, len(weight), hidden),
        tiles.chunk_height(sizes.chunk_rows, columns, hidden),
        sizes,
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
    sizes: Sizes,
    sequence_parallel: bool,
) -> tuple[RowMath, str, str]:
    """(row math, group name, backend). Raises if this rank's arguments are wrong."""
    sizes.check()
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
