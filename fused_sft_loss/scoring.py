"""The inputs that decide each row's label and weight, as one record from the API to the kernels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import flags, samples, targets
from .targets import Targets


def may_synchronise(tensor: Tensor) -> bool:
    """Whether tensor values may be read on the host: always on a CPU; on an accelerator only with
    FUSED_SFT_LOSS_CHECK=1, because it synchronises."""
    return flags.enabled(flags.CHECK) or tensor.device.type == "cpu"


#: The fields of Scoring in an operator's schema.
SCHEMA = (
    "Tensor labels, Tensor? loss_mask, Tensor? cu_seqlens, bool shift, int ignore_index, "
    "bool per_sample"
)


class Scoring(NamedTuple):
    """The arguments of :func:`.targets.row_targets`, except for the size of the vocabulary, and
    whether every sample weighs alike; see :mod:`.samples`."""

    labels: Tensor
    loss_mask: Tensor | None
    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    per_sample: bool = False

    @property
    def checked(self) -> bool:
        """Whether the values are checked; see :func:`may_synchronise`."""
        return may_synchronise(self.labels)

    def packed(self) -> tuple:
        """The fields as SCHEMA takes them."""
        return self

    def read(self) -> "Scoring":
        """The record in the dtypes that all backends read; see :func:`.targets.readable`."""
        labels, loss_mask, cu_seqlens = self[:3]
        given = targets.readable(labels, loss_mask, cu_seqlens)
        return self._replace(labels=given[0], loss_mask=given[1], cu_seqlens=given[2])

    def found_by(
        self, row_targets: Callable[["Scoring", int], Targets], vocab_size: int
    ) -> Targets:
        """The targets, computed by a backend's `row_targets`.

        Raises:
            ValueError: a wrong weight, boundary or scored label, if the values are `checked`.
        """
        checked = self.checked
        if checked:
            self.check_values()
        found = row_targets(self.read(), vocab_size)
        if self.per_sample:
            found = samples.weighed_alike(found, self.labels, self.cu_seqlens)
        if checked:
            self.check_labels(found.target, vocab_size)
        return found

    def check_values(self) -> None:
        """Raise ValueError for a wrong weight or document boundary."""
        targets.check_values(self.loss_mask, self.cu_seqlens, self.labels.numel())

    def check_labels(self, target: Tensor, vocab_size: int) -> None:
        """Raise ValueError for a scored label outside the vocabulary."""
        targets.check_labels(target, self.labels, self.shift, vocab_size)
