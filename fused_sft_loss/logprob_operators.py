"""Log-probabilities, entropies and their gradient as torch.library operators.

They use the kernels of the loss. A log-probability is a loss with the other sign. The entropy comes
from the statistics of token_metrics, and its gradient from the same read as that of the
log-probability; see "The entropy" in docs/design.md.
"""

from typing import Any

import torch
from torch import Tensor

from . import agreement, temperature
from .backends import composed, selection
from .backends.contract import LOSS, METRICS, EntropyGrad, RowFactor, normalizer_like
from .inplace import traced
from .operators import differentiable, first_order, operator
from .rowmath import RowMath
from .scoring import Scoring
from .targets import Targets

RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_ARGUMENTS = (
    "(Tensor logits, Scoring scoring, RowMath math, Tensor? temperature, bool entropy, str call, "
    "str group_name, str backend"
)


def _like(scoring: Scoring, entropy: bool) -> tuple[Tensor, ...]:
    """Uninitialised results of :func:`logprobs`."""
    target, weight = Targets.empty(scoring.labels)[:2]
    entropies = torch.empty_like(weight) if entropy else weight.new_empty(0)
    return torch.empty_like(weight), entropies, target, weight, normalizer_like(weight)


def agreed_targets(
    scoring: Scoring,
    logits: Tensor,
    math: RowMath,
    rows: Tensor | None,
    call: str,
    group_name: str,
    backend: str,
) -> Targets:
    """The targets. Their weight is 1 where the token is scored: a mask selects, as in
    token_metrics. The ranks of a group compare their calls, temperatures included.

    rows: the temperature of each row, or None.
    """

    def find() -> Targets:
        found = scoring.found_by(selection.load(backend).row_targets, math.vocab_size)
        if rows is not None and scoring.checked:
            temperature.check_values(rows, found.weight, scoring.labels, scoring.shift)
        return found._replace(weight=(found.weight != 0).float())

    def of_scored(found: Targets) -> dict[str, Any]:
        used = None if rows is None else torch.where(found.weight != 0, rows, 1.0)
        return {"temperature": agreement.fingerprint(used)}

    return agreement.agreed_targets(find, scoring, logits, math, call, group_name, of_scored)


@operator(
    f"logprobs{_ARGUMENTS}) -> {RESULTS}",
    lambda logits, scoring, math, rows, entropy, *rest: _like(scoring, entropy),
)
def logprobs(
    logits: Tensor,
    scoring: Scoring,
    math: RowMath,
    rows: Tensor | None,
    entropy: bool,
    call: str,
    group_name: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """(log-probability, entropy, target, weight, normalizer) of each row, from one read.

    rows: the temperature of each row; None: math.logit_scale is its reciprocal. Without `entropy`
    that result has no elements.
    """
    math, kernels = temperature.read(math), selection.load(backend)
    targets = agreed_targets(scoring, logits, math, rows, call, group_name, backend)
    target, weight = targets.target, targets.weight
    scale = None if rows is None else temperature.reciprocal(rows)
    statistics = LOSS if scale is None and not entropy else METRICS
    gathered = composed.gathered_statistics(
        kernels, targets, logits, math, group_name, statistics, scale
    )
    merging = (gathered, target, weight, math, scale)
    losses, normalizer = kernels.merge(*merging)
    entropies = kernels.merge_metrics(*merging)[-1] if entropy else weight.new_empty(0)
    return 0.0 - losses, entropies, target, weight, normalizer  # a bare minus would give -0.0


_GRADIENT = (
    "Tensor? grad, Tensor? grad_entropy, Tensor target, Tensor weight, Tensor normalizer, "
    "Tensor entropies, Tensor? temperature, RowMath math, str backend"
)


@operator(
    f"logprob_grad(Tensor logits, {_GRADIENT}) -> Tensor",
    lambda logits, *rest: torch.empty_like(logits),
)
def logprob_grad(logits: Tensor, *rest: Any) -> Tensor:
    """Gradient of the logits, in their dtype, from one read.

    `grad` and `grad_entropy` are the upstream gradients of the log-probabilities and the entropies,
    `[N]` each, or None for 0.
    """
    out = torch.empty_like(logits)
    _write_grad(logits, *rest, out=out)
    return out


@operator(f"logprob_grad_(Tensor(a!) logits, {_GRADIENT}) -> ()", lambda *args: None, changes=0)
def logprob_grad_(logits: Tensor, *rest: Any) -> None:
    """:func:`logprob_grad`, written over the logits."""
    _write_grad(logits, *rest, out=logits)


def _write_grad(
    logits: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    target: Tensor,
    weight: Tensor,
    normalizer: Tensor,
    entropies: Tensor,
    rows: Tensor | None,
    math: RowMath,
    backend: str,
    *,
    out: Tensor,
) -> None:
    of_loss = weight.new_zeros(()) if grad is None else -grad
    selection.load(backend).row_grad(
        logits,
        normalizer,
        target,
        RowFactor(of_loss, weight),
        math.read(),
        out,
        scale=None if rows is None else temperature.reciprocal(rows),
        entropy=None if grad_entropy is None else EntropyGrad(grad_entropy, entropies),
    )


class Logprobs(torch.autograd.Function):
    """:func:`logprobs`; log-probabilities and entropies are differentiable in the logits."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return logprobs(*inputs[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        logits, _scoring, ctx.math, rows, entropy, _call, _group, ctx.backend, ctx.inplace = inputs
        _log_prob, entropies, target, weight, normalizer = output
        ctx.save_for_backward(logits, target, weight, normalizer, entropies, rows)
        constant = (target, weight, normalizer)
        ctx.mark_non_differentiable(*constant, *(() if entropy else (entropies,)))
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, *_of_figures: None
    ) -> tuple[Tensor | None, ...]:
        logits, *rest = ctx.saved_tensors
        args = (logits, grad, grad_entropy, *rest, ctx.math, ctx.backend)
        if ctx.inplace and not traced(logits):
            logprob_grad_(*args)
            grad_logits = logits.detach()
        else:
            grad_logits = logprob_grad(*args)
        return grad_logits, *[None] * 8


differentiable_logprobs = differentiable(
    f"differentiable_logprobs{_ARGUMENTS}, bool inplace_backward) -> {RESULTS}", Logprobs
)
