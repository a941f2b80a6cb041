"""Turns a micro-batch's losses into the tuple and the log entries that Megatron expects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..api import LossTerms, TokenMetrics, loss_terms, loss_terms_and_metrics
from ..options import Options
from ..targets import weighted_mean
from . import global_state

#: What a loss_func may return; see `sft_loss_func`.
RETURNS = ("per_token", "mean", "per_sample")
#: (loss_sum, count, reports) of returns="per_token" and "per_sample", or (loss, reports) of "mean".
LossTuple = tuple[Tensor, Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor]]

#: The reports besides "lm loss": name -> sum over the scored tokens, from `TokenMetrics` and the
#: number of scored tokens. Tokens that are not scored add 0.
FIGURES: dict[str, Callable[[TokenMetrics, Tensor], Tensor]] = {
    "accuracy": lambda metrics, count: metrics.correct.sum(),
    "entropy": lambda metrics, count: metrics.entropy.sum(),
    "nll": lambda metrics, count: -metrics.log_prob.sum(),
    "perplexity": lambda metrics, count: torch.expm1(-metrics.log_prob).sum() + count,
}
SPIKY_LOSS_FACTOR = 10  # as in Megatron-LM's pretrain_gpt.py


def figures(report: Sequence[str]) -> list[str]:
    """The names in a report that are in FIGURES."""
    return [name for name in report if name != "lm loss"]


@dataclass(frozen=True)
class Sums:
    """Losses and sums of one micro-batch on this rank."""

    losses: Tensor  # [b, s] fp32 with a graph: weight * loss
    weight_sum: Tensor  # 0-d fp32
    count: Tensor  # 0-d int32: scored tokens
    figures: dict[str, Tensor] = field(default_factory=dict)  # name in FIGURES -> 0-d fp32
    samples: Tensor | None = None  # 0-d int32, of returns="per_sample"; see .samples.Weighed

    @classmethod
    def of(
        cls,
        logits: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        options: Options,
        report: Sequence[str],
    ) -> "Sums":
        """Compute them with `loss_terms`. Figures need no second read of the logits."""
        if not figures(report):
            return cls.of_terms(loss_terms(logits, labels, loss_mask, options), None, report)
        return cls.of_terms(*loss_terms_and_metrics(logits, labels, loss_mask, options), report)

    @classmethod
    def of_terms(
        cls, terms: LossTerms, metrics: TokenMetrics | None, report: Sequence[str]
    ) -> "Sums":
        """The sums of known losses. `metrics` may be None if `report` has no figures."""
        sums = {}
        if metrics is not None:
            sums = {n: FIGURES[n](metrics, terms.count).float() for n in figures(report)}
        return cls(terms.losses, terms.weight_sum, terms.count, sums)


@dataclass(frozen=True)
class Convention:
    """How `Sums` become the tuple that Megatron's schedules expect; see `sft_loss_func`."""

    returns: str = "per_token"
    report: tuple[str, ...] = ("lm loss",)
    num_tokens: Tensor | None = None
    check_for_nan: bool | None = None
    check_for_spiky: bool | None = None

    @property
    def per_sample(self) -> bool:
        return self.returns == "per_sample"

    def tuple_of(self, sums: Sums) -> LossTuple:
        """(loss_sum, count, reports) or (mean loss, reports)."""
        loss_sum = sums.losses.sum()
        if self.returns == "mean":
            loss, reports = _mean(loss_sum, sums)
            self._validate(loss)
            return loss, self._chosen(reports)
        given = sums.samples if self.per_sample else self.num_tokens
        count = sums.count if given is None else given
        # stack copies: Megatron divides the loss in place, and would divide a view of it as well.
        reports = {"lm loss": torch.stack([loss_sum.detach(), count.to(loss_sum.dtype)])}
        for name, figure in sums.figures.items():
            reports[name] = torch.stack([figure, sums.count.to(figure.dtype)])
        self._validate(loss_sum)
        return loss_sum, count, self._chosen(reports)

    def _chosen(self, reports: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: reports[name] for name in self.report}

    def _validate(self, loss: Tensor) -> None:
        """Run the checks of Megatron-LM's own loss_func, through its rerun state machine.

        They read the loss on the host. If a run asks for none of them, nothing is read.
        """
        args = global_state.training_args()
        nan, spiky = self.check_for_nan, self.check_for_spiky
        if nan is None:
            nan = getattr(args, "check_for_nan_in_loss_and_grad", False)
        if spiky is None:
            spiky = getattr(args, "check_for_spiky_loss", False)
        machine = global_state.rerun_state_machine() if nan or spiky else None
        if machine is None:
            return
        found = "found {} in local forward loss calculation"
        checks: list[tuple[Callable[[Tensor], Any], str, bool]] = []
        if nan:
            checks += [(torch.isnan, found.format("NaN"), True)]
            checks += [(torch.isinf, found.format("Inf"), True)]
        if spiky:
            large = partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            )
            checks.append((large, "Spiky loss", False))
        for rejects, message, fatal in checks:
            machine.validate_result(
                result=loss.detach(),
                rejection_func=rejects,
                message=message,
                tolerance=0.0,  # every run computes the same bits
                fatal=fatal,
            )


def _mean(loss_sum: Tensor, sums: Sums) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean loss, reports).

    One all-reduce over data and context parallelism gives the reports. One over context parallelism
    gives the weights of whole sequences, which divide this shard's loss.
    """
    parallel = global_state.parallel_state()
    weight_sum = sums.weight_sum.clone()
    totals = torch.stack(
        [loss_sum.detach(), weight_sum, sums.count.to(loss_sum.dtype), *sums.figures.values()]
    )
    if parallel is not None:
        _all_reduce(totals, parallel.get_data_parallel_group(with_context_parallel=True))
        _all_reduce(weight_sum, parallel.get_context_parallel_group())
    total, weights, count, *figures = totals
    reports = {"lm loss": weighted_mean(total, weights)}
    reports |= {n: weighted_mean(f, count) for n, f in zip(sums.figures, figures, strict=True)}
    return weighted_mean(loss_sum, weight_sum), reports


def _all_reduce(tensor: Tensor, group: ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
