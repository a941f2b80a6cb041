"""Random calls of token_logprobs, as hypothesis strategies, and their results in float64."""

from dataclasses import dataclass

import torch
from cases import LAYOUTS, Case, cases, storage_grad
from closeness import assert_grad
from hypothesis import strategies as st
from oracle import scored_on
from torch import Tensor

import fused_sft_loss as fsl

#: Autograd adds the gradients of expanded rows in 16 bits, where those of either sign cancel.
VIEWS = [view for view in LAYOUTS if view != "batch_expanded"]
OPTIONS = ("shift", "vocab_size", "ignore_index", "cu_seqlens")
TEMPERATURES = ("none", "number", "0-d", "tokens", "sequences", "wide")


@dataclass
class Wanted:
    log_probs: Tensor  # [N] float64; this and the next are 0 where not scored
    entropies: Tensor
    scored: Tensor  # [N] bool
    grad: Tensor  # [N, v] float64, of sum(upstream * log_probs + upstream_entropy * entropies)
    size: Tensor  # [N]: fp32 numbers as large as this are added, so errors are relative to it


def temperature_of(kind: str, labels: Tensor, seed: int = 0) -> float | Tensor | None:
    """A temperature; those of tokens are useless where a label is ignored or never scored."""
    g = torch.Generator().manual_seed(seed)
    if kind in ("none", "number"):
        return None if kind == "none" else 0.7
    if kind == "0-d":
        return torch.tensor(1.6)
    if kind == "sequences":
        first = labels if labels.dim() == 1 else labels[:, :1]
        return (torch.rand(first.shape, generator=g) + 0.5).expand_as(labels)
    given = torch.rand(labels.shape, generator=g) * 2 + 0.3
    return given.double() if kind == "wide" else given


def oracle(
    case: Case, temperature, upstream: Tensor, upstream_entropy: Tensor | None = None
) -> Wanted:
    """Row by row from the definitions; autograd over them gives the gradient."""
    labels, mask, v = case.labels2d, case.loss_mask, case.columns
    mask = mask.view(labels.shape) if mask is not None else None
    options = {"shift": True, "cu_seqlens": None, "ignore_index": -100} | case.options
    shift = options["shift"]
    target, weight = scored_on(labels, mask, shift, options["cu_seqlens"], options["ignore_index"])
    size = options.get("vocab_size") or v
    given = torch.as_tensor(1.0 if temperature is None else temperature, dtype=torch.float64)
    given = given.expand(case.labels.shape).reshape(labels.shape)
    leaf = case.full().double().view(-1, v).requires_grad_()
    zero = torch.zeros((), dtype=torch.float64)
    rows = []
    for n, y in enumerate(target):
        if weight[n] == 0:
            rows.append((zero, zero, zero + 1))
            continue
        b, t = divmod(n, labels.shape[1])
        z = leaf[n, :size] / given[b, t + shift]
        log_p = z - torch.logsumexp(z, 0)
        there = log_p > -torch.inf  # p log p is 0 where p is 0
        finite = torch.where(there, log_p, 0.0)
        entropy = -(finite.exp() * finite * there).sum()
        magnitude = 1 + log_p[y].detach().abs() + torch.logsumexp(z, 0).detach().abs()
        rows.append((log_p[y], entropy, magnitude))
    log_probs, entropies, sizes = map(torch.stack, zip(*rows, strict=True))
    total = (log_probs * upstream).sum()
    if upstream_entropy is not None:
        total = total + (entropies * upstream_entropy).sum()
    grad = torch.zeros_like(leaf)
    if total.requires_grad:
        (grad,) = torch.autograd.grad(total, leaf)
    return Wanted(log_probs.detach(), entropies.detach(), weight != 0, grad, sizes)


def call(case: Case, temperature, backend: str, leaf: Tensor, **more):
    """(log-probabilities, entropies) of the package."""
    options = {name: value for name, value in case.call_options().items() if name in OPTIONS}
    layout = {"layout": "sbv"} if case.view == "sbv" else {}
    return fsl.token_logprobs(
        case.logits(leaf),
        case.labels,
        case.loss_mask,
        temperature=temperature,
        return_entropy=True,
        backend=backend,
        **{**options, **layout, **more},
    )


def assert_agrees(case: Case, temperature, backend: str, upstream, upstream_entropy, **more):
    """Both results and the gradient of the storage agree with the oracle."""
    want = oracle(case, temperature, upstream, upstream_entropy)
    leaf = case.storage.clone().requires_grad_()
    log_probs, entropies = call(case, temperature, backend, leaf, **more)
    assert_figures(log_probs, entropies, want, case.labels.shape)
    shaped = (u.view(case.labels.shape) for u in (upstream, upstream_entropy))
    torch.autograd.backward((log_probs, entropies), tuple(shaped))
    given = torch.as_tensor(1.0 if temperature is None else temperature)
    largest = (upstream.abs() + 2 * upstream_entropy.abs()).max().item() / given.min().item()
    assert_grad(leaf.grad, storage_grad(case, want.grad), case.storage.dtype, largest)


def assert_figures(log_probs: Tensor, entropies: Tensor, want: Wanted, shape) -> None:
    for got, wanted, close in (
        (log_probs, want.log_probs, 1e-6),
        (entropies, want.entropies, 2e-6),
    ):
        assert got.dtype == torch.float32 and got.shape == shape
        error = got.flatten().double() / want.size - wanted / want.size
        assert error.abs().max() <= close, (error.abs().max(), close)
        assert (got.flatten()[~want.scored] == 0).all()
    assert (entropies >= -1e-6).all()


@st.composite
def calls(draw, **kinds):
    """(case, temperature, upstream gradients of both results `[N]`)."""
    case = draw(cases(views=VIEWS, **kinds))
    temperature = temperature_of(draw(st.sampled_from(TEMPERATURES)), case.labels)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    upstreams = torch.randn(2, case.labels.numel(), generator=g)
    return case, temperature, *upstreams
