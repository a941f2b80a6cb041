"""ResponseOnlyHead: only the hidden states of scored positions go through the output layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..scoring import may_synchronise
from .protocols import OutputLayer


class Rows(NamedTuple):
    """The positions that go through the output layer, with their labels and weights, `[r]` each."""

    positions: Tensor  # int64, into the s*b positions of hidden states [s, b, h]
    labels: Tensor
    mask: Tensor  # bool or loss_mask's dtype; 0 in rows that only pad the number of rows
    overflow: Tensor | None  # 0-d bool: more positions are scored than the head's fixed `rows`


def refuse_deferred(config: Any, head: str) -> None:
    """Raise NotImplementedError for a TransformerConfig that needs all positions' logits."""
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise NotImplementedError(
            f"{head} with defer_embedding_wgrad_compute=True: the deferred products need all "
            "positions of all micro-batches. Set it to False, or leave the head out"
        )


class ResponseOnlyHead:
    """Sends only the hidden states of scored positions through the output layer.

    Pass it to `make_forward_step(get_batch, head=ResponseOnlyHead())` or to
    `fused_cross_entropy(model, head=ResponseOnlyHead())`. Logits, their gradient and the matrix
    products of the output layer shrink to the scored fraction of the positions. Loss and gradients
    stay the same. Under sequence parallelism the hidden states are gathered first, as the output
    layer would do.

    The number of scored rows decides the shapes. With `rows=None` the host waits for that number
    once in each micro-batch, and the shapes change with it. A CUDA graph needs fixed shapes:
    capture the layers without the output layer, or give `rows`. `multiple` keeps the number of
    different shapes small, which helps allocators, autotuners and torch.compile.

    Args:
        multiple: round the number of rows up to a multiple of this, with rows that are not scored.
        rows: take exactly this many rows; the host does not wait. If more positions are scored, the
            loss is NaN; on a CPU, and with FUSED_SFT_LOSS_CHECK=1, a ValueError is raised.
    """

    def __init__(self, *, multiple: int = 1, rows: int | None = None) -> None:
        for name, value in (("multiple", multiple), ("rows", rows)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if rows is not None and multiple != 1:
            raise ValueError("expected multiple or rows, got both: rows is a fixed number")
        self.multiple, self.rows = multiple, rows

    @staticmethod
    def check(config: Any) -> None:
        """Raise NotImplementedError for a TransformerConfig that needs all positions' logits."""
        refuse_deferred(config, "ResponseOnlyHead")

    def select(self, labels: Tensor, loss_mask: Tensor | None, ignore_index: int) -> Rows:
        """Select the rows of shifted labels and mask [b, s]: at least one, so no shape is 0."""
        if loss_mask is not None and loss_mask.shape != labels.shape:
            raise ValueError(
                f"expected loss_mask of the labels' shape {list(labels.shape)}, got "
                f"{list(loss_mask.shape)}"
            )
        labels = labels.long().transpose(0, 1).reshape(-1)  # hidden states are [s, b, h]
        scored = labels != ignore_index
        mask = scored
        if loss_mask is not None:
            mask = loss_mask.transpose(0, 1).reshape(-1)
            scored = scored & (mask != 0)
        positions = labels.numel()
        if self.rows is not None:
            count, overflow = min(self.rows, positions), scored.sum() > self.rows
            if may_synchronise(labels) and overflow:
                raise ValueError(
                    f"expected at most rows={self.rows} scored positions, got {int(scored.sum())}; "
                    "give ResponseOnlyHead more rows, or pass multiple= in place of rows="
                )
        else:
            wanted = max(1, int(scored.sum()))  # the host waits here
            count = min(-(-wanted // self.multiple) * self.multiple, positions)
            overflow = None
        # Scored positions first, both kinds in order. No position occurs twice, so the gradient's
        # scatter adds nothing up, and its bits do not depend on an order.
        first = torch.argsort(~scored, stable=True)[:count]
        return Rows(first, labels[first], torch.where(scored, mask, 0)[first], overflow)

    @staticmethod
    def scatter(losses: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
        """Put the rows' losses [r] at their positions in [b, s], the labels' shape; 0 elsewhere."""
        if rows.overflow is not None:
            losses = torch.where(rows.overflow, torch.nan, losses)
        batch, seq = shape
        everywhere = losses.new_zeros(batch * seq).index_copy(0, rows.positions, losses)
        return everywhere.view(seq, batch).transpose(0, 1).contiguous()


@contextmanager
def selected(output_layer: OutputLayer, hidden_states: Tensor, rows: Rows) -> Iterator[Tensor]:
    """Hidden states [r, 1, h] of the rows; call `output_layer` on them inside this context.

    hidden_states: [s, b, h], or this rank's [s/tp, b, h] under sequence parallelism. The context
    gathers them and switches the layer's sequence parallelism off, because the layer gathers and
    reduce-scatters whole sequences only.
    """
    parallel = output_layer.sequence_parallel
    if parallel:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        # Without sequence parallelism the layer itself sums the gradient over the ranks.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states,
            tensor_parallel_output_grad=False,
            group=getattr(output_layer, "tp_group", None),
        )
    output_layer.sequence_parallel = False
    try:
        yield hidden_states.flatten(0, 1).index_select(0, rows.positions).unsqueeze(1)
    finally:
        output_layer.sequence_parallel = parallel
