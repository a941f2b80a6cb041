"""LinearHead: the output layer computes losses, and the logits never exist as a whole."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear.call import Sizes
from ..linear.loss import linear_terms
from ..options import Options
from . import preconditions
from .head import refuse_deferred
from .reports import Sums, figures


class HostCount:
    """A number on the device, on its way to the host.

    The copy starts at once. The host waits for it later, when it has given the device other work.
    """

    def __init__(self, count: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._count = count
        if count.is_cuda:
            self._count = torch.empty_like(count, device="cpu", pin_memory=True)
            self._count.copy_(count, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(count.device))

    def value(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._count)


class LinearHead:
    """Computes the losses in the output layer, from the hidden states of scored positions.

    Pass it to `make_forward_step(get_batch, head=LinearHead())` or to `fused_cross_entropy(model,
    head=LinearHead())`, like a `ResponseOnlyHead`. Logits exist one tile at a time, forward and
    backward; see `linear_sft_loss`. Loss and gradients stay the same. It takes a fourth matrix
    product for each scored position; with `grad_in_forward` of the step it takes three.

    The output layer is called as a module, so its hooks run. Its weight may be shared with the
    embedding, sharded, frozen, and its gradient added to main_grad by
    `gradient_accumulation_fusion`. Multi-token prediction uses the layer as before.

    The number of scored positions decides the shapes. The host copies it when the batch is there,
    and waits for it when the output layer runs.

    Args:
        chunk_rows: a tile has at most as many logits as this many rows; see `linear_sft_loss`.
        multiple: round the number of rows up to a multiple of this.
        rows: take exactly this many rows; the host does not wait. If more positions are scored, the
            loss is NaN; on a CPU, and with FUSED_SFT_LOSS_CHECK=1, a ValueError is raised.
    """

    def __init__(
        self, *, chunk_rows: int | None = None, multiple: int = 1, rows: int | None = None
    ) -> None:
        self.sizes = Sizes(chunk_rows, rows, multiple)
        self.sizes.check()

    @staticmethod
    def check(config: Any) -> None:
        """Raise NotImplementedError for a TransformerConfig that needs all positions' logits."""
        refuse_deferred(config, "LinearHead")

    def select(
        self, labels: Tensor, loss_mask: Tensor | None, ignore_index: int
    ) -> "LinearTargets":
        """Start to count the scored positions of shifted labels and mask [b, s]."""
        if self.sizes.rows is not None:
            return LinearTargets(self, labels, loss_mask, None)
        scored = labels != ignore_index
        if loss_mask is not None:
            scored = scored & (loss_mask != 0)
        return LinearTargets(self, labels, loss_mask, HostCount(scored.sum()))


class LinearTargets(NamedTuple):
    """Labels and mask `[b, s]` of a call, and the number of rows that go through the layer."""

    head: LinearHead
    labels: Tensor
    mask: Tensor | None
    scored: HostCount | None  # None: `rows` of the head

    def rows(self) -> int:
        """How many rows to take: at least one, so that no shape is 0."""
        if self.scored is None:
            return self.head.sizes.rows or 1
        multiple = self.head.sizes.multiple
        return max(1, -(-self.scored.value() // multiple) * multiple)

    def sums(
        self,
        layer: Any,
        hidden_states: Tensor,
        weight: Tensor | None,
        options: dict[str, Any],
        vocabulary: int | None,
        report: Sequence[str],
    ) -> Sums:
        """The losses [b, s] of hidden states [s, b, h], as the output layer's forward.

        weight: of a shared embedding, or None for the layer's own. options: of the loss.
        vocabulary: the model's padded vocabulary.
        """
        preconditions.plain_output_layer(layer)
        weight = layer.weight if weight is None else weight
        group = preconditions.vocab_group(options, len(weight), vocabulary)
        given = Options(**{**options, "tp_group": group, "layout": "sbv"})
        names = figures(report)
        if names and given.one_read:
            raise NotImplementedError(
                f"expected no grad_in_forward where {names} are reported, got "
                f"{given.grad_in_forward!r}; drop it, or report the loss alone"
            )
        terms = linear_terms(
            hidden_states,
            weight,
            None if layer.skip_bias_add else layer.bias,
            self.labels,
            self.mask,
            given,
            Sizes(self.head.sizes.chunk_rows, rows=self.rows()),
            sequence_parallel=layer.sequence_parallel,
            into_main_grad=layer.gradient_accumulation_fusion and weight.requires_grad,
            metrics=bool(names),
        )
        return Sums.of_terms(*terms, report)
