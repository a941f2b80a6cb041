"""The scored rows: the only ones that go through the output layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import watched
from ..scoring import may_synchronise
from ..targets import Targets


class ScoredRows(NamedTuple):
    """R rows, all scored ones among them; the others have weight 0."""

    at: Tensor  # [R] int64: their places among the N rows, in order
    target: Tensor  # [R]
    weight: Tensor  # [R] fp32
    overflow: Tensor | None  # 0-d bool: not all scored rows are here; None: they are


def scored_rows(targets: Targets, rows: int | None, multiple: int) -> ScoredRows:
    """Select the scored rows. Without `rows` the host waits for their number.

    Raises:
        ValueError: more than `rows` are scored, and :func:`.may_synchronise`. A traced call does
            not know how many are.
    """
    scored, every = targets.weight != 0, targets.weight.numel()
    overflow = None
    if rows is None:
        wanted = int(targets.count)  # the host waits here
        count = min(-(-wanted // multiple) * multiple, every)
    else:
        count, overflow = min(rows, every), targets.count > rows
        if not watched(scored) and may_synchronise(scored) and overflow:
            raise ValueError(
                f"expected at most rows={rows} scored tokens, got {int(targets.count)}; pass a "
                "larger rows=, or none, and the host waits for the number"
            )
    # Scored rows first, both kinds in order. No row occurs twice, so nothing is added up when
    # results are put back.
    at = torch.argsort(scored.logical_not(), stable=True)[:count]
    return ScoredRows(at, targets.target[at], targets.weight[at], overflow)


def poisoned(result: Tensor, rows: ScoredRows) -> Tensor:
    """The result, or NaN if scored rows were left out."""
    return result if rows.overflow is None else torch.where(rows.overflow, torch.nan, result)
