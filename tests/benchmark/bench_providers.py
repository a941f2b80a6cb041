"""Small cases, and bad providers. They are at module level so that processes can unpickle them."""

import os
import signal

import torch

from bench.kernels.cases import Model, model_case
from bench.kernels.problem import Problem, Source
from bench.kernels.provider import Provider
from fused_sft_loss import sft_loss

NOTHING = ((0, 0, 0), (0, 0, 0))
calls = []


def right(problem):
    def loss(logits):
        calls.append("right")
        return sft_loss(
            logits,
            problem.labels,
            problem.mask,
            vocab_size=problem.case.vocab_size,
            tp_group=problem.group,
        )

    return loss


def copying(problem):
    """Copies the logits once in forward; the gradient overwrites the copy."""
    return lambda logits: sft_loss(
        logits.clone(), problem.labels, problem.mask, inplace_backward=True
    )


class _Changed(torch.autograd.Function):
    """The identity, with a changed gradient."""

    @staticmethod
    def forward(ctx, logits, change):
        ctx.change = change
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def changing(problem, change):
    inner = right(problem)

    def loss(logits):
        calls.append("wrong")
        return inner(_Changed.apply(logits, change))

    return loss


def scaled(gradient):
    return gradient / 0.37  # as if the upstream gradient were ignored


def leaking(gradient):
    gradient = gradient.clone()
    gradient[0, 0, 0] += 1e-6  # in a row that is not scored
    return gradient


def nan(gradient):
    return gradient * torch.nan


def coarse(gradient):
    """The targets' entries are right; all others are off by 10%."""
    targets = gradient < 0
    return torch.where(targets, gradient, gradient * 1.1)


def biased(problem):
    inner = right(problem)
    return lambda logits: inner(logits) + 0.01 * logits.detach().float().abs().mean()


def greedy(problem):
    return lambda logits: torch.empty(2**50, dtype=torch.uint8).sum() + logits.sum()


def killed(problem):
    def loss(logits):
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out

    return loss


def raising(problem):
    raise RuntimeError("no such kernel")


def provider(build, name=None, **options):
    name = name or getattr(build, "__name__", "provider")
    return Provider(name, name, build, NOTHING, **options)


TINY = Model("tiny", 1003, 1003)


def case_of(model=TINY, tp=1, nproc=1, seq=16, dtype="bf16", scored=0.5):
    return model_case(model, tp, nproc, 2, seq, dtype, scored, seed=3)


def problem_of(case, copies=2):
    return Problem(case, Source(case.source, "cpu", copies))
