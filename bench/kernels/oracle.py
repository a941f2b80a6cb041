"""The float64 result that every provider must match before it is timed.

It shares no code with fused_sft_loss.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .problem import UPSTREAM, attached

CHUNK = 2**22  # elements in float64 at a time

#: Largest relative errors (of the loss, of the gradient), by the precision that a provider computes
#: in and the dtype of the logits. "fp32": the gradient may be rounded to the logits' dtype twice.
TOLERANCE = {
    "fp32": {"bf16": (1e-5, 2**-7), "fp16": (1e-5, 2**-10), "fp32": (1e-5, 1e-4)},
    "logits": {"bf16": (2**-7, 2**-5), "fp16": (2**-10, 2**-8), "fp32": (1e-5, 1e-4)},
}


@dataclass(frozen=True)
class Check:
    """Errors of a provider against float64; `ok` if they are within its tolerance."""

    loss_error: float  # |loss - exact| / |exact|
    gradient_error: float  # see Oracle.check
    loss_tolerance: float
    gradient_tolerance: float
    unscored_is_zero: bool

    @property
    def ok(self):
        # NaN is not ok: all comparisons with it are false.
        return (
            self.loss_error <= self.loss_tolerance
            and self.gradient_error <= self.gradient_tolerance
            and self.unscored_is_zero
        )

    @property
    def reason(self):
        """Why it is not ok."""
        if not self.unscored_is_zero:
            return "wrong: the gradient of rows that are not scored is not 0"
        return (
            f"wrong: the loss is off by {self.loss_error:.1e} (at most {self.loss_tolerance:.1e}), "
            f"the gradient by {self.gradient_error:.1e} (at most {self.gradient_tolerance:.1e})"
        )


class Oracle:
    """Loss and gradient of a problem by the definition in float64, a few rows at a time."""

    def __init__(self, problem):
        self.problem, case = problem, problem.case
        self.rows = (problem.target >= 0).nonzero().view(-1)  # scored ones
        logits = problem.source.logits.view(case.rows, case.columns)
        column = problem.target[self.rows] - problem.first
        self.here = (column >= 0) & (column < case.columns)
        self.column = column.clamp(0, case.columns - 1)
        z_target = torch.zeros(len(self.rows), dtype=torch.float64, device=logits.device)
        lse = torch.empty_like(z_target)
        for part in self._parts():
            z, _ = self._transformed(logits[self.rows[part]])
            lse[part] = torch.logsumexp(z, -1)
            z_target[part] = z.gather(-1, self.column[part, None]).view(-1)
        z_target.masked_fill_(~self.here, 0.0)
        if problem.group is not None:
            lse, z_target = _over_ranks(lse, problem.group), _summed(z_target, problem.group)
        self.loss = (lse - z_target).mean()
        self.gradient = torch.empty(len(self.rows), case.columns, device=logits.device)  # fp32
        for part in self._parts():
            z, slope = self._transformed(logits[self.rows[part]])
            p = torch.exp(z - lse[part, None])
            p.scatter_add_(-1, self.column[part, None], -self.here[part, None].double())
            self.gradient[part] = p * slope * (UPSTREAM / len(self.rows))
        self.target_size, self.rest_squares = 0.0, 0.0
        for part in self._parts():
            exact = self.gradient[part]
            at_target = exact.gather(-1, self.column[part, None]) * self.here[part, None]
            self.target_size = max(self.target_size, at_target.abs().max().item())
            self.rest_squares += _squares(exact) - _squares(at_target)

    def _parts(self):
        height = max(1, CHUNK // self.problem.case.columns)
        return [slice(i, i + height) for i in range(0, len(self.rows), height)]

    def _transformed(self, logits):
        """z and dz/dx [rows, columns] in float64; z is -inf in padded columns."""
        case, z, slope = self.problem.case, logits.double(), 1.0
        if case.softcap:
            bent = torch.tanh(z / case.softcap)
            z, slope = case.softcap * bent, 1 - bent * bent
        true = case.vocab - self.problem.first
        if true < case.columns:
            z[:, max(true, 0) :] = -torch.inf
        return z, slope

    def check(self, loss, gradient, precision):
        """Check a provider's loss (0-d) and gradient [b, s, columns] on this rank.

        The gradient error is the larger of two errors. At the targets, where softmax - 1 is much
        larger than other values, it is the largest difference over the largest value. Everywhere
        else it is the norm of the difference over the norm of the gradient. So neither hides the
        other.
        """
        case = self.problem.case
        gradient = gradient.reshape(case.rows, case.columns)
        at_target, off = 0.0, 0.0
        for part in self._parts():
            difference = gradient[self.rows[part]].float().sub_(self.gradient[part])
            column, here = self.column[part, None], self.here[part, None]
            apart = difference.gather(-1, column) * here
            difference.scatter_add_(-1, column, -apart)
            at_target = _larger(at_target, apart.abs().max().item())
            off += _squares(difference)
        rest = torch.ones(case.rows, dtype=torch.bool, device=gradient.device)
        rest[self.rows] = False
        untouched = not gradient[rest].count_nonzero().item()
        target, rest = self.target_size, self.rest_squares
        error = _larger((off / rest) ** 0.5, at_target / target if target else 0.0)
        exact = self.loss.item()
        tolerance = TOLERANCE[precision][case.dtype]
        return Check(abs(loss.item() - exact) / abs(exact), error, *tolerance, untouched)


def run_once(function, problem):
    """(loss, gradient) of a provider on a fresh copy of the logits."""
    buffer = problem.source.take()
    problem.source.restore(buffer)
    logits = attached(buffer)
    loss = function(logits)
    (gradient,) = torch.autograd.grad(loss, logits, problem.upstream)
    return loss.detach(), gradient


def _larger(a, b):
    """max that keeps NaN."""
    return b if not b <= a else a


def _squares(rows):
    """Sum of the squares of fp32 [n, columns]."""
    return torch.linalg.vector_norm(rows, dim=-1).double().square().sum().item()


def _over_ranks(lse, group):
    parts = [torch.empty_like(lse) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, lse, group=group)
    return torch.logsumexp(torch.stack(parts), 0)


def _summed(tensor, group):
    dist.all_reduce(tensor, group=group)
    return tensor
