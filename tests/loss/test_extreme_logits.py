"""Logits of any finite size and targets of any probability: loss and gradient match float64."""

from dataclasses import dataclass

import pytest
import torch
from backends import ON_CPU, using
from oracle import transform

import fused_sft_loss as fsl
from fused_sft_loss import shards
from fused_sft_loss.backends import selection
from fused_sft_loss.backends.contract import RowFactor
from fused_sft_loss.rowmath import RowMath

INF, LOWEST = float("inf"), torch.finfo(torch.float32).min
COLUMNS = 20000  # three chunks on a CPU, two segments on a GPU, more than a tile of each thread
TRANSFORMS = [{}, {"logit_scale": 0.7}, {"logit_scale": 4.0}, {"softcap": 30.0}]
MAXIMA = [sign * 10.0**power for power in (0, 4, 6, 8, 9, 10, 20, 38) for sign in (1, -1)]
FAR = [sign * size for size in (2.0**29, 1.5e9, 3e38) for sign in (1, -1)]
EDGES = [sign * size for size in (2.0**29, 2.0**30, 1.5e9, 2.0**31) for sign in (1, -1)]


def near(maximum: float) -> torch.Tensor:
    """A row within a few units below its maximum; ties, if fp32 has no numbers that close."""
    row = maximum - torch.randn(COLUMNS).abs() * 3
    row[torch.randint(0, COLUMNS, (3,))] = maximum
    return row


def blocked(value: float) -> torch.Tensor:
    """A vocabulary whose first 17000 columns (tiles, chunks and a segment) are ruled out."""
    row = torch.randn(COLUMNS)
    row[:17000] = value
    return row


def stairs() -> torch.Tensor:
    """Rises from the lowest number to the largest: each tile has a new maximum, of any size."""
    up = torch.logspace(0, 38.5, COLUMNS // 2)
    return torch.cat([-up.flip(0), up])


def two_sizes(first: float, second: float) -> torch.Tensor:
    """All columns but the maxima vanish; the maxima may come first or last."""
    row = torch.full((COLUMNS,), first)
    row[COLUMNS // 3 :] = second
    return row


ROWS = {
    **{f"near {maximum:g}": (near, maximum) for maximum in [*MAXIMA, 3e38, -3e38]},
    **{f"{value:g} blocked": (blocked, value) for value in (-INF, LOWEST, -1e10, -65504.0)},
    "all lowest": (two_sizes, LOWEST, LOWEST),
    "stairs": (stairs,),
    **{f"{a:g}, {b:g}": (two_sizes, a, b) for a in FAR for b in FAR},
    **{f"{a:g} and next": (two_sizes, a, a * (1 + 2**-23)) for a in EDGES},
    **{f"{a:g} and before": (two_sizes, a * (1 - 2**-24), a) for a in EDGES},
}


def rows(dtype=torch.float32) -> torch.Tensor:
    """`[1, s, COLUMNS]`; numbers beyond the dtype's range become its largest."""
    most = torch.finfo(dtype).max
    made = [make(*arguments) for make, *arguments in ROWS.values()]
    made = [row if row.isinf().any() else row.clamp(-most, most) for row in made]
    return torch.stack(made).to(dtype).unsqueeze(0)


def targets_of(logits: torch.Tensor) -> torch.Tensor:
    """The maximum for odd rows, the last column for even ones; no target is -inf."""
    labels = logits.argmax(-1)
    labels[:, ::2] = COLUMNS - 1
    return labels


@dataclass
class Exact:
    losses: torch.Tensor  # [s] float64, like the fields below
    grad: torch.Tensor  # [s, COLUMNS]
    log_prob: torch.Tensor
    lse: torch.Tensor
    correct: torch.Tensor  # bool
    entropy: torch.Tensor


def exact(logits, labels, softcap=None, logit_scale=1.0) -> Exact:
    """Uses torch's log_softmax in float64. oracle.py's log-sum-exp is a single float64 number; from
    1e17 on it cannot hold the logarithm of the sum."""
    leaf = logits[0].double().requires_grad_()
    z = transform(leaf, softcap, logit_scale)
    log_p = torch.log_softmax(z, -1)
    losses = torch.nn.functional.nll_loss(log_p, labels[0], reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    z, log_p, losses = z.detach(), log_p.detach(), losses.detach()
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    return Exact(losses, grad, -losses, z.logsumexp(-1), z.argmax(-1) == labels[0], entropy)


def step(logits, labels, backend, **options):
    leaf = logits.clone().requires_grad_()
    losses = fsl.sft_loss(leaf, labels, shift=False, reduction="none", backend=backend, **options)
    losses.sum().backward()
    return losses.detach()[0], leaf.grad[0]


def assert_right(losses, grad, logits, labels, **options):
    want = exact(logits, labels, **options)
    # A loss beyond the range of fp32 is infinite.
    torch.testing.assert_close(losses, want.losses.float(), rtol=1e-6, atol=2e-6)
    assert (losses >= 0).all()
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[logits.dtype]
    smallest = 2**-24 if logits.dtype == torch.float16 else 0.0
    atol = 1e-6 * options.get("logit_scale", 1.0) + smallest
    torch.testing.assert_close(grad.double(), want.grad, rtol=rounding, atol=atol)


@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("name", ON_CPU)
def test_maxima_of_any_finite_size(name, options):
    logits = rows()
    labels = targets_of(logits)
    with using(name) as backend:
        losses, grad = step(logits, labels, backend, **options)
    assert_right(losses, grad, logits, labels, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ON_CPU)
def test_the_lowest_number_of_sixteen_bits(name, dtype):
    logits = rows(dtype)
    labels = targets_of(logits)
    with using(name) as backend:
        losses, grad = step(logits, labels, backend)
    assert_right(losses, grad, logits, labels)


@pytest.mark.parametrize("name", [n for n in ON_CPU if n.partition("-")[0] in selection.ONE_READ])
def test_maxima_of_any_finite_size_from_one_read(name):
    logits = rows()
    labels = targets_of(logits)
    with using(name) as backend:
        losses, grad = step(logits, labels, backend, logit_scale=0.7, grad_in_forward=True)
    assert_right(losses, grad, logits, labels, logit_scale=0.7)


@pytest.mark.parametrize("name", ON_CPU)
def test_metrics_of_maxima_of_any_finite_size(name):
    logits = rows()
    labels = targets_of(logits)
    with using(name) as backend:
        metrics = fsl.token_metrics(logits, labels, shift=False, logit_scale=0.7, backend=backend)
    want = exact(logits, labels, logit_scale=0.7)
    for field in ("log_prob", "lse"):
        got = getattr(metrics, field)[0]
        torch.testing.assert_close(got, getattr(want, field).float(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(metrics.entropy[0].double(), want.entropy, rtol=0, atol=2e-5)
    assert torch.equal(metrics.correct[0], want.correct)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}], ids=str)
@pytest.mark.parametrize("name", ON_CPU)
def test_shards_of_any_finite_size(name, options):
    """Merges statistics of three shards as ranks do; some shards are ruled out completely."""
    logits = rows()
    labels, weight = targets_of(logits), torch.ones(len(ROWS))
    edges = [0, 6000, 13000, COLUMNS]
    cap, scale = options.get("softcap", 0.0), options.get("logit_scale", 1.0)
    with using(name) as backend:
        kernels, parts = selection.load(backend), []
        for start, stop in zip(edges, edges[1:], strict=False):
            math = RowMath(start, COLUMNS, softcap=cap, logit_scale=scale)
            shard = logits[..., start:stop]
            parts.append(kernels.row_stats(shard, labels[0], weight, math, 3))
        losses, normalizer = kernels.merge(torch.stack(parts), labels[0], weight, math)
        by_torch = shards.merge(torch.stack(parts), labels[0], weight, math)
        grad = torch.empty_like(logits)
        for start, stop in zip(edges, edges[1:], strict=False):
            math = RowMath(start, COLUMNS, softcap=cap, logit_scale=scale)
            there = (logits[..., start:stop], normalizer, labels[0], RowFactor(weight), math)
            kernels.row_grad(*there, grad[..., start:stop])
    assert_right(losses, grad[0], logits, labels, **options)
    torch.testing.assert_close(losses, by_torch[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_probabilities_of_ties_sum_to_1(name):
    """1000 equal maxima of 1e8. A log-sum-exp in fp32 would be off by up to 4."""
    logits = torch.zeros(1, 2, COLUMNS)
    logits[..., :1000] = torch.tensor([1e8, -1e8])[:, None]
    logits[0, 1, 1000:] = -3e8
    labels = torch.tensor([[5, 7]])
    with using(name) as backend:
        losses, grad = step(logits, labels, backend)
    torch.testing.assert_close(losses, torch.tensor([1000.0, 1000.0]).log(), rtol=1e-6, atol=0)
    grad.scatter_add_(-1, labels.T, torch.ones(2, 1))
    torch.testing.assert_close(grad[:, :1000], torch.full((2, 1000), 1e-3), rtol=1e-6, atol=6e-8)
    assert not grad[:, 1000:].count_nonzero()


@pytest.mark.parametrize("scale", [0.7, 1.0, 1 / 3, 3.0, 1.1])
@pytest.mark.parametrize("name", ON_CPU)
def test_loss_of_sure_tokens(name, scale):
    """The target is the maximum; the others are 0 to 40 below. p is 1 to within 1 part in 10^17, or
    less certain. d = 1 + (sum of the others' exponentials). Each of about 20 sums (of lanes,
    chunks, threads) rounds once and loses what is below 2^-24 of its terms: 2^-24 while d is near
    1.
    """
    top = torch.tensor([3.0, 700.0, 1400.0, 1e4, -1e4, 1e6]) / scale
    gap = torch.tensor([40.0, 16.0, 20.0, 14.0, 12.5, 30.0]) / scale
    logits = (top - gap)[:, None] - torch.rand(6, COLUMNS) * 50 / scale
    labels = torch.tensor([[9000, 3, 70, 16500, 19999, 12000]])
    logits.scatter_(-1, labels.T, top[:, None])
    logits = logits.unsqueeze(0)
    with using(name) as backend:
        losses, grad = step(logits, labels, backend, logit_scale=scale)
    want = exact(logits, labels, logit_scale=scale)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses.double(), want.losses, rtol=1e-6, atol=20 * 2**-24)
    torch.testing.assert_close(grad.double(), want.grad, rtol=0, atol=1e-6 * scale)
