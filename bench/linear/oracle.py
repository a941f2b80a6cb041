"""The float64 result that every provider must match before it is timed.

The loss is that of all rows. Gradients are compared on at most ROWS rows of hidden and COLUMNS rows
of weight, so a large case takes seconds, and a small one is compared as a whole. It shares no code
with fused_sft_loss.
"""

import torch

from ..kernels.oracle import TOLERANCE, Check
from ..kernels.problem import UPSTREAM

CHUNK = 2**24  # float64 numbers of logits or weight at a time
ROWS = 64
COLUMNS = 2048


class Oracle:
    """Loss and gradients of a problem by the definition, a part of the vocabulary at a time."""

    def __init__(self, problem):
        self.problem, at = problem, problem.at
        inputs = problem.flat.detach()[at].double()
        target = problem.target[at]
        lse = torch.full((len(at),), -torch.inf, dtype=torch.float64, device=at.device)
        for _, weight in self._parts():
            lse = torch.logaddexp(lse, torch.logsumexp(inputs @ weight.t(), -1))
        own = (inputs * problem.weight.detach()[target].double()).sum(-1)
        self.loss = (lse - own).mean().item()
        scale = UPSTREAM / len(at)
        self._hidden(inputs, lse, target, scale)
        self._weight(inputs, lse, target, scale)

    def _parts(self):
        case = self.problem.case
        height = max(1, CHUNK // max(case.hidden, case.scored_rows))
        for begin in range(0, case.vocab, height):
            yield begin, self.problem.weight.detach()[begin : begin + height].double()

    def _hidden(self, inputs, lse, target, scale):
        """The gradient of some rows of hidden."""
        some = _spread(len(inputs), ROWS, inputs.device)
        self.rows = self.problem.at[some]
        self.hidden = -self.problem.weight.detach()[target[some]].double()
        for _, weight in self._parts():
            p = torch.exp(inputs[some] @ weight.t() - lse[some, None])
            self.hidden += p @ weight
        self.hidden *= scale

    def _weight(self, inputs, lse, target, scale):
        """The gradient of some rows of weight: half of them targets, if there are so many."""
        vocab = self.problem.case.vocab
        of_targets = target.unique()[: COLUMNS // 2]
        others = _spread(vocab, COLUMNS - len(of_targets), target.device)
        self.columns = torch.cat((of_targets, others)).unique()
        weight = self.problem.weight.detach()[self.columns].double()
        g = torch.exp(inputs @ weight.t() - lse[:, None])
        g -= (target[:, None] == self.columns).double()
        self.weight = g.t() @ inputs * scale
        self.is_target = torch.isin(self.columns, target)

    def check(self, loss, hidden, weight, precision):
        """Check a provider's loss and gradients; `precision` is a key of TOLERANCE.

        The gradient error is the largest of three: the norm of the difference over the norm, of
        hidden, of weight for targets, and of weight for all others, whose gradients are smaller.
        """
        case = self.problem.case
        here = weight[self.columns].double()
        kinds = [(hidden[self.rows].double(), self.hidden)]
        kinds += [(here[kind], self.weight[kind]) for kind in (self.is_target, ~self.is_target)]
        errors = [_relative(got, exact) for got, exact in kinds if len(exact)]
        rest = torch.ones(case.rows, dtype=torch.bool, device=hidden.device)
        rest[self.problem.at] = False
        untouched = not hidden[rest].count_nonzero().item()
        off = abs(loss.item() - self.loss) / abs(self.loss)
        # max would lose a NaN.
        worst = torch.tensor(errors).amax().item()
        return Check(off, worst, *TOLERANCE[precision][case.dtype], untouched)


def _spread(count, most, device):
    """At most `most` of `count` indices, evenly spread."""
    return torch.linspace(0, count - 1, min(most, count), device=device).long().unique()


def _relative(got, exact):
    return (torch.linalg.vector_norm(got - exact) / torch.linalg.vector_norm(exact)).item()
