"""What a micro-batch is reported and returned as, once its losses are known."""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..api import loss_terms, loss_terms_and_metrics, weighted_mean
from ..options import Options
from . import versions

#: What can be reported beside "lm loss" -> its sum over scored tokens, from `TokenMetrics` and the
#: number of scored tokens. All are 0 where a token is not scored.
FIGURES = {
    "accuracy": lambda metrics, count: metrics.correct.sum(),
    "entropy": lambda metrics, count: metrics.entropy.sum(),
    "nll": lambda metrics, count: -metrics.log_prob.sum(),
    "perplexity": lambda metrics, count: torch.expm1(-metrics.log_prob).sum() + count,
}
SPIKY_LOSS_FACTOR = 10  # as in Megatron-LM's pretrain_gpt.py


@dataclass(frozen=True)
class Sums:
    """One micro-batch of this rank."""

    losses: Tensor  # [b, s] fp32 with a graph: weight * loss
    weight_sum: Tensor  # 0-d fp32
    count: Tensor  # 0-d int32
    figures: dict = field(default_factory=dict)  # name of FIGURES -> 0-d fp32

    @classmethod
    def of(cls, logits, labels, loss_mask, options: Options, report) -> "Sums":
        """Of logits and what `loss_terms` takes; figures cost no further read of the logits."""
        figures = [name for name in report if name != "lm loss"]
        if not figures:
            terms = loss_terms(logits, labels, loss_mask, options)
            return cls(terms.losses, terms.weight_sum, terms.count)
        terms, metrics = loss_terms_and_metrics(logits, labels, loss_mask, options)
        sums = {name: FIGURES[name](metrics, terms.count).float() for name in figures}
        return cls(terms.losses, terms.weight_sum, terms.count, sums)


@dataclass(frozen=True)
class Convention:
    """How `Sums` become the tuple that Megatron's schedules expect; see `sft_loss_func`."""

    returns: str = "per_token"
    report: tuple = ("lm loss",)
    num_tokens: Tensor | None = None
    check_for_nan: bool | None = None
    check_for_spiky: bool | None = None

    def tuple_of(self, sums: Sums) -> tuple:
        """(loss_sum, num_tokens, reports) or (mean loss, reports)."""
        loss_sum = sums.losses.sum()
        if self.returns == "mean":
            loss, reports = _mean(loss_sum, sums)
            rest = ()
        else:
            count = sums.count if self.num_tokens is None else self.num_tokens
            # stack copies: a report in the loss's memory would be divided along with it.
            reports = {"lm loss": torch.stack([loss_sum.detach(), count.to(loss_sum.dtype)])}
            for name, figure in sums.figures.items():
                reports[name] = torch.stack([figure, sums.count.to(figure.dtype)])
            loss, rest = loss_sum, (count,)
        self._validate(loss)
        return (loss, *rest, {name: reports[name] for name in self.report})

    def _validate(self, loss):
        """The checks of Megatron-LM's own loss_func, by its rerun state machine: they read the
        loss on the host, and where a run asks for none of them nothing is read."""
        args = versions.training_args()
        nan, spiky = self.check_for_nan, self.check_for_spiky
        if nan is None:
            nan = getattr(args, "check_for_nan_in_loss_and_grad", False)
        if spiky is None:
            spiky = getattr(args, "check_for_spiky_loss", False)
        machine = versions.rerun_state_machine() if nan or spiky else None
        if machine is None:
            return
        found = "found {} in local forward loss calculation"
        checks = []
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
                tolerance=0.0,  # the loss has the same bits, run after run
                fatal=fatal,
            )


def _mean(loss_sum: Tensor, sums: Sums) -> tuple[Tensor, dict]:
    """(mean loss, its reports): means over data (and context) parallelism, by one all-reduce."""
    parallel = versions.parallel_state()
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


def _all_reduce(tensor, group):
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
