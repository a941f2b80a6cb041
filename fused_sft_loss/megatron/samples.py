"""returns="per_sample": the mask whose weights make every sample count alike.

The weights are divided before the model runs, so the rest of a step only sums weight * loss, with
any head. A sample may be split over context-parallel ranks: one all-reduce adds up its weight.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, samples
from ..operators import watched
from ..scoring import may_synchronise
from ..targets import boundaries, check_values
from . import global_state
from .packing import document_bounds, one_row
from .protocols import PackedSeqParams


class Weighed(NamedTuple):
    """A mask [b, s] of w / W, and the number of samples to return, 0-d int32.

    Context-parallel ranks hold parts of the same samples, and Megatron adds up their numbers. So
    the first of them returns the number, and the others 0.
    """

    mask: Tensor
    number: Tensor


class Samples(NamedTuple):
    """The scored weights of shifted labels, and where samples end."""

    weight: Tensor  # [b, s] fp32, 0 where not scored
    bounds: Tensor | None  # [k+1] over this rank's positions; None: each row is a sample

    @classmethod
    def of(
        cls, labels: Tensor, loss_mask: Tensor | None, ignore_index: int, bounds: Tensor | None
    ) -> "Samples":
        """Read the mask. Raises TypeError or ValueError for a wrong mask or boundaries."""
        checks.targets(labels, loss_mask, bounds)
        if may_synchronise(labels) and not watched(labels):
            check_values(loss_mask, bounds, labels.numel())
        scored = labels != ignore_index
        weight = scored if loss_mask is None else torch.where(scored, loss_mask, 0)
        return cls(weight.float(), bounds)

    def weighed(self) -> Weighed:
        """Divide each weight by its sample's sum, over context parallelism too."""
        sums, first = samples.totals(self.weight, self.bounds), True
        parallel = global_state.parallel_state()
        if parallel is not None and global_state.context_parallel_size() > 1:
            group = parallel.get_context_parallel_group()
            dist.all_reduce(sums, group=group)
            first = dist.get_rank(group) == 0
        count = samples.scored_samples(sums)
        mask = samples.shares(self.weight, sums, self.bounds)
        return Weighed(mask, count if first else torch.zeros_like(count))


def sample_bounds(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    packed_seq_params: PackedSeqParams | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """Where samples end, from the documents of a batch; None: each row is a sample.

    Raises:
        ValueError: packed_seq_params or position_ids under context parallelism.
    """
    if cu_seqlens is not None:
        bounds = one_row("cu_seqlens", cu_seqlens)
    elif packed_seq_params is not None:
        _not_sliced("packed_seq_params")
        bounds = document_bounds(packed_seq_params, labels)
    else:
        bounds = None
    if position_ids is None:
        return bounds
    _not_sliced("position_ids")
    begins = torch.ones_like(labels, dtype=torch.bool)
    begins[..., 1:] = position_ids[..., 1:] != position_ids[..., :-1] + 1
    # Fixed shapes: a position where no document begins becomes an empty document at the end.
    end = labels.numel()
    position = torch.arange(end, dtype=torch.int64, device=labels.device)
    edges = [torch.where(begins.flatten(), position, end), position.new_full((1,), end)]
    if bounds is not None:
        edges.append(boundaries(bounds))
    return torch.cat(edges).sort().values


def _not_sliced(name: str) -> None:
    """Raise ValueError under context parallelism, where `name` does not tell a rank its samples."""
    cp = global_state.context_parallel_size()
    if cp > 1:
        raise ValueError(
            f"returns='per_sample' with {name} under context parallelism of size {cp}: expected "
            f"cu_seqlens of this rank's positions, because {name} does not say how sequences were "
            "sliced. Pass cu_seqlens [k+1] with the same k on all ranks: cu_seqlens_q_padded // cp "
            "if each document is sliced, as thd_get_partitioned_indices does. Slices of whole rows "
            "(get_batch_on_this_cp_rank) cut documents into parts that are not neighbours: use "
            "returns='per_token' there"
        )
