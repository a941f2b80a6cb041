"""Random problems for linear_sft_loss, and its loss and gradients in float64."""

from dataclasses import dataclass, field
from unittest import mock

import torch
from cases import draw_options, make_mask
from hypothesis import strategies as st
from oracle import Expected, evaluate
from torch import Tensor

import fused_sft_loss as fsl

#: One, two and three tiles of 1024 columns, and vocabularies that no tile divides.
VOCABULARIES = (1, 2, 33, 1000, 1100, 2500)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The arguments' shapes: batch first, sequence first, rows alone, and views of the first two.
VIEWS = ("bsv", "sbv", "nv", "transposed", "transposed sbv", "sliced", "batch_expanded")
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class LinearCase:
    """One call: a storage that holds the hidden states in `view`, and the other arguments.

    All logits are multiples of 1/16 below 16, so 16 bits hold them exactly.
    """

    storage: Tensor
    view: str
    weight: Tensor
    bias: Tensor | None
    labels: Tensor  # [b, s]
    loss_mask: Tensor | None
    options: dict = field(default_factory=dict)

    def hidden(self, leaf: Tensor) -> Tensor:
        """The hidden states that the call receives: a view of `leaf`, shaped like `storage`."""
        (b, s), h = self.labels.shape, self.weight.shape[1]
        if self.view in ("transposed", "transposed sbv"):
            return leaf.transpose(0, 1)
        if self.view == "sliced":
            return leaf[:, 1 : s + 1, 3 : h + 3]
        if self.view == "batch_expanded":
            return leaf.expand(b, s, h)
        return leaf.view(b * s, h) if self.view == "nv" else leaf

    def batch_first(self, hidden: Tensor) -> Tensor:
        """`[b, s, h]`, from the hidden states of a call or their gradient."""
        if "sbv" in self.view:
            return hidden.transpose(0, 1)
        return hidden.reshape(*self.labels.shape, -1)

    def call(self, storage: Tensor, weight: Tensor, bias: Tensor | None, **more) -> Tensor:
        """The loss of these leaves."""
        flat = self.view == "nv"
        mask = self.loss_mask
        layout = {"layout": "sbv"} if "sbv" in self.view else {}
        return fsl.linear_sft_loss(
            self.hidden(storage),
            weight,
            self.labels[0] if flat else self.labels,
            mask[0] if flat and mask is not None else mask,
            bias=bias,
            **{**self.options, **layout, **more},
        )


def build(view, dtype, b, s, h, v, seed, mask_kind, options, with_bias=True) -> LinearCase:
    """A case with small numbers. A tenth of the labels are ignored; most masks drop a third."""
    generator = torch.Generator().manual_seed(seed)
    if view == "nv":
        b, s = 1, b * s

    def numbers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).div(4).to(dtype)

    shapes = {
        "sbv": (s, b, h),
        "transposed": (s, b, h),
        "sliced": (b, s + 2, h + 5),
        "batch_expanded": (1, s, h),
    }
    labels = torch.randint(0, options.get("vocab_size") or v, (b, s), generator=generator)
    labels[torch.rand(b, s, generator=generator) < 0.1] = options.get("ignore_index", -100)
    return LinearCase(
        numbers(*shapes.get(view, (b, s, h))),
        view,
        numbers(v, h),
        numbers(v) if with_bias else None,
        labels,
        make_mask(mask_kind, b, s, generator),
        options,
    )


@st.composite
def linear_cases(draw, vocabularies=VOCABULARIES, dtypes=DTYPES, views=VIEWS):
    v = draw(st.sampled_from(vocabularies))
    b, s = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    options = draw_options(draw, v, b * s)
    kinds = ["none", "bool", "int", "half", "float", "strided", "empty"]
    return build(
        draw(st.sampled_from(views)),
        draw(st.sampled_from(dtypes)),
        b,
        s,
        draw(st.sampled_from([1, 3, 8])),
        v,
        draw(st.integers(0, 2**20)),
        draw(st.sampled_from(kinds)),
        options,
        draw(st.booleans()),
    )


@dataclass
class Wanted:
    """The results in float64, and the size of the rounding errors that each gradient may have."""

    rows: Expected
    hidden: Tensor  # [N, h]
    weight: Tensor
    bias: Tensor
    of_terms: tuple[Tensor, Tensor, Tensor]  # sums of the absolute values of a gradient's terms
    of_logits: tuple[Tensor, Tensor, Tensor]  # sums of the factors of the logits' gradient


def expected(case: LinearCase, upstream: Tensor | None = None) -> Wanted:
    """The oracle's results for the loss sum(upstream * weight * loss); upstream `[N]` or None."""
    hidden = case.batch_first(case.hidden(case.storage.detach())).double()
    weight = case.weight.double()
    logits = hidden @ weight.t()
    if case.bias is not None:
        logits = logits + case.bias.double()
    rows = evaluate(logits, case.labels, case.loss_mask, upstream=upstream, **case.options)
    grad, flat = rows.grad, hidden.flatten(0, 1)
    scored = (rows.weight != 0).double().unsqueeze(1)
    ones = scored.expand_as(grad)
    return Wanted(
        rows,
        grad @ weight,
        grad.t() @ flat,
        grad.sum(0),
        (grad.abs() @ weight.abs(), grad.abs().t() @ flat.abs(), grad.abs().sum(0)),
        (ones @ weight.abs(), ones.t() @ flat.abs(), ones.sum(0)),
    )


def gradients(case: LinearCase, upstream: Tensor | None = None, **more):
    """(losses `[N]`, gradients of the hidden states `[N, h]`, of weight and of bias)."""
    leaf, weight = (t.clone().requires_grad_() for t in (case.storage, case.weight))
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    seen = []

    def watched(storage):
        hidden = LinearCase.hidden(case, storage)
        hidden = hidden.view_as(hidden)
        hidden.register_hook(seen.append)
        return hidden

    with mock.patch.object(case, "hidden", watched):
        losses = case.call(leaf, weight, bias, reduction="none", **more)
    total = losses if upstream is None else losses * upstream.view_as(losses)
    total.sum().backward()
    hidden = case.batch_first(seen[0]).flatten(0, 1)
    return losses.detach(), hidden, weight.grad, None if bias is None else bias.grad


def assert_gradients(case: LinearCase, got, want: Wanted, upstream: Tensor, tile: torch.dtype):
    """Gradients within the rounding of their tile, of an fp32 sum, and one of their own."""
    largest = (want.rows.weight * upstream.double().abs()).max().item()
    largest *= case.options.get("logit_scale", 1.0)
    dtype = case.weight.dtype
    rounding = 0.0 if dtype == torch.float32 else ROUNDING[dtype]
    of_tile = 4e-6 if tile == torch.float32 else 4e-6 + ROUNDING[tile]
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    wanted = (want.hidden, want.weight, want.bias)
    for value, right, terms, factors in zip(
        got, wanted, want.of_terms, want.of_logits, strict=True
    ):
        if value is None:
            continue
        bound = terms * of_tile + factors * (1e-6 * largest + smallest) + smallest
        bound += right.abs() * rounding
        error = (value.double() - right).abs()
        assert (error <= bound).all(), (error - bound).max()
