"""The mask of `fused_cross_entropy`, given as a tensor or as a function."""

from torch import Tensor
from torch.distributed import ProcessGroup

from . import preconditions
from .protocols import LossMask


def mask_now(loss_mask: LossMask, labels: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """The mask, on the labels' device if a function returns it.

    The function may fail on one rank. Then all ranks of `group`, which share the vocabulary, raise.
    """
    if loss_mask is None or isinstance(loss_mask, Tensor):
        return loss_mask

    def called() -> Tensor | None:
        mask = loss_mask()
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"loss_mask(): expected a mask [b, s] or None, got {type(mask).__name__}"
            )
        return mask.to(labels.device, non_blocking=True)

    return preconditions.agreed(called, group, lambda mask: {"loss_mask": mask})
