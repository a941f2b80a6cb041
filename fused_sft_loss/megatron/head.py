"""An output layer for the scored positions alone."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..scoring import may_synchronise


class Rows(NamedTuple):
    """The positions that go through the output layer, and what they are scored on, `[r]` each."""

    index: Tensor  # int64, into the s*b positions of hidden states [s, b, h]
    labels: Tensor
    mask: Tensor  # bool or loss_mask's dtype; 0 in rows that only fill up
    overflow: Tensor | None  # 0-d bool: more positions are scored than `rows` of the head


class ResponseOnlyHead:
    """Sends only the hidden states of scored positions through the output layer.

    Pass it to `make_forward_step(get_batch, head=ResponseOnlyHead())` or to
    `fused_cross_entropy(model, head=ResponseOnlyHead())`. Logits, their gradient and the matrix
    products of the output layer shrink to the scored fraction of the positions. Loss and gradients
    stay the same. Under sequence parallelism the hidden states are gathered first, as the output
    layer would do.

    The number of scored rows decides the shapes. With `rows=None` the host waits for that number
    once in each micro-batch, and the shape changes with it. A CUDA graph needs a fixed shape:
    capture the layers without the output layer, or give `rows`. `multiple` keeps the number of
    different shapes small, which helps allocators, autotuners and torch.compile.

    Args:
        multiple: round the number of rows up to a multiple of this, with rows that are not scored.
        rows: take exactly this many rows, without waiting. More scored positions than that make the
            loss NaN; on a CPU, and with FUSED_SFT_LOSS_CHECK=1, they raise a ValueError.
    """

    def __init__(self, *, multiple: int = 1, rows: int | None = None):
        for name, value in (("multiple", multiple), ("rows", rows)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if rows is not None and multiple != 1:
            raise ValueError("expected multiple or rows, got both: rows is a fixed number")
        self.multiple, self.rows = multiple, rows

    @staticmethod
    def check(config):
        """Raise NotImplementedError for a TransformerConfig that an output layer of rows breaks."""
        if getattr(config, "defer_embedding_wgrad_compute", False):
            raise NotImplementedError(
                "ResponseOnlyHead with defer_embedding_wgrad_compute=True: the deferred products "
                "need all positions of all micro-batches; set it to False, or leave the head out"
            )

    def select(self, labels: Tensor, loss_mask: Tensor | None, ignore_index: int) -> Rows:
        """The rows for shifted labels and mask [b, s]; at least one, so that shapes are never 0."""
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
                    "give ResponseOnlyHead more rows, or multiple= in place of rows="
                )
        else:
            wanted = max(1, int(scored.sum()))  # the host waits here
            count = min(-(-wanted // self.multiple) * self.multiple, positions)
            overflow = None
        # Scored positions first, both kinds in order: distinct ones, so no sum depends on an order.
        index = torch.argsort(~scored, stable=True)[:count]
        return Rows(index, labels[index], torch.where(scored, mask, 0)[index], overflow)

    @staticmethod
    def scatter(losses: Tensor, rows: Rows, shape) -> Tensor:
        """Losses [r] of the rows -> [b, s] for labels of that shape, 0 elsewhere."""
        if rows.overflow is not None:
            losses = torch.where(rows.overflow, torch.nan, losses)
        batch, seq = shape
        everywhere = losses.new_zeros(batch * seq).index_copy(0, rows.index, losses)
        return everywhere.view(seq, batch).transpose(0, 1).contiguous()


@contextmanager
def selected(output_layer, hidden_states: Tensor, rows: Rows):
    """Hidden states [r, 1, h] for `output_layer`, which is to be called inside.

    hidden_states: [s, b, h], or this rank's [s/tp, b, h] under sequence parallelism, which is off
    inside: the layer's own gather and reduce-scatter are of whole sequences.
    """
    parallel = output_layer.sequence_parallel
    if parallel:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        # The layer, no longer sequence-parallel, sums the gradient over the ranks itself.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states,
            tensor_parallel_output_grad=False,
            group=getattr(output_layer, "tp_group", None),
        )
    output_layer.sequence_parallel = False
    try:
        yield hidden_states.flatten(0, 1).index_select(0, rows.index).unsqueeze(1)
    finally:
        output_layer.sequence_parallel = parallel
