"""Random problems for the loss, as hypothesis strategies, and their comparison with the oracle."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from oracle import evaluate
from torch import Tensor

import fused_sft_loss as fsl

VOCABULARIES = (1, 2, 31, 32, 33, 1000, 32000, 50257, 151936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("bsv", "sbv", "sliced", "offset", "batch_expanded", "nv")


@dataclass
class Case:
    """One call of the loss: a storage tensor that holds the logits in `view`, and the arguments."""

    storage: Tensor
    view: str
    columns: int
    labels: Tensor
    loss_mask: Tensor | None
    options: dict = field(default_factory=dict)

    def logits(self, leaf: Tensor) -> Tensor:
        """The logits that the call receives: a view of `leaf`, shaped like `storage`."""
        b, s, v = *self.labels2d.shape, self.columns
        if self.view == "bsv":
            return leaf.view_as(leaf)
        if self.view == "sbv":
            return leaf.view_as(leaf)  # storage is [s, b, v]
        if self.view == "sliced":
            return leaf[:, 1 : s + 1, 3 : v + 3]  # storage has more rows and columns
        if self.view == "offset":
            return leaf.flatten()[1 : 1 + b * s * v].view(b, s, v)  # misaligned by one element
        if self.view == "batch_expanded":
            return leaf.expand(b, s, v)
        return leaf.view(b * s, v)

    def full(self) -> Tensor:
        """The same logits, contiguous `[b, s, v]` and detached."""
        logits = self.logits(self.storage.detach())
        if self.view == "sbv":
            logits = logits.transpose(0, 1)
        return logits.reshape(*self.labels2d.shape, -1).contiguous()

    @property
    def labels2d(self) -> Tensor:
        return self.labels if self.labels.dim() == 2 else self.labels.unsqueeze(0)

    def call_options(self) -> dict:
        layout = {"layout": "sbv"} if self.view == "sbv" else {}
        return {**self.options, **layout}


def build(view, dtype, b, s, v, seed, mask_kind, options, spread=4.0) -> Case:
    """A case with normal logits. A tenth of the labels are ignored; most masks drop a third."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "sbv": (s, b, v),
        "sliced": (b, s + 2, v + 5),
        "offset": (b * s * v + 3,),
        "batch_expanded": (1, s, v),
    }
    storage = (torch.randn(shapes.get(view, (b, s, v)), generator=g) * spread).to(dtype)
    valid = options.get("vocab_size") or v
    labels = torch.randint(0, valid, (b, s), generator=g)
    labels[torch.rand(b, s, generator=g) < 0.1] = options.get("ignore_index", -100)
    loss_mask = make_mask(mask_kind, b, s, g)
    if view == "nv":
        labels = labels.view(-1)
        loss_mask = None if loss_mask is None else loss_mask.reshape(-1)
    return Case(storage, view, v, labels, loss_mask, options)


def make_mask(kind, b, s, g):
    keep = torch.rand(b, s, generator=g) < 0.7
    if kind == "none":
        return None
    if kind == "float":
        return keep * torch.rand(b, s, generator=g) * 2
    if kind == "strided":
        return (keep * torch.rand(b, s, generator=g)).t().contiguous().t()
    if kind == "empty":
        return torch.zeros(b, s)
    return keep.to({"bool": torch.bool, "int": torch.int64, "half": torch.bfloat16}[kind])


def draw_options(draw, columns, positions):
    """Options of a loss that fit logits of so many columns and b*s positions."""
    options = {
        "shift": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 1e-3])),
        "softcap": draw(st.sampled_from([None, None, 5.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.5, 2.5])),
        "vocab_size": draw(st.sampled_from([None, max(1, columns - 1), max(1, columns // 2 + 1)])),
        "ignore_index": draw(st.sampled_from([-100, -1, 0])),
    }
    if options["shift"] and draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, positions), max_size=3))
        options["cu_seqlens"] = torch.tensor(sorted({0, positions, *cuts}), dtype=torch.int32)
    return options


@st.composite
def cases(draw, vocabularies=VOCABULARIES, dtypes=DTYPES, views=LAYOUTS):
    v = draw(st.sampled_from(vocabularies))
    view = draw(st.sampled_from(views))
    few = v > 5000
    b = draw(st.integers(1, 2 if few else 3))
    s = draw(st.integers(1, 3 if few else 6))
    options = draw_options(draw, v, b * s)
    mask_kind = draw(st.sampled_from(["none", "bool", "int", "half", "float", "strided", "empty"]))
    return build(
        view,
        draw(st.sampled_from(dtypes)),
        b,
        s,
        v,
        draw(st.integers(0, 2**20)),
        mask_kind,
        options,
    )


def expected(case: Case, upstream: Tensor | None = None):
    mask = case.loss_mask
    if mask is not None and mask.dim() == 1:
        mask = mask.unsqueeze(0)
    options = {k: o for k, o in case.options.items() if k not in ("inplace_backward", "backend")}
    return evaluate(case.full(), case.labels2d, mask, upstream=upstream, **options)


def largest_term(case: Case, want, upstream: Tensor) -> float:
    """The largest term of p - onehot (p or 1), times weight, upstream and logit_scale."""
    return (want.weight * upstream).abs().max().item() * case.options["logit_scale"]


def run(case: Case, backend: str, upstream: Tensor | None = None, dtype=None, **more):
    """The package's (weighted losses, gradient of the storage)."""
    storage = case.storage if dtype is None else case.storage.to(dtype)
    leaf = storage.clone().requires_grad_()
    losses = fsl.sft_loss(
        case.logits(leaf),
        case.labels,
        case.loss_mask,
        reduction="none",
        backend=backend,
        **case.call_options(),
        **more,
    )
    (losses if upstream is None else losses * upstream.view_as(losses)).sum().backward()
    return losses.detach(), leaf.grad


def storage_grad(case: Case, grad_rows: Tensor) -> Tensor:
    """Gradient of the storage in float64, from the gradient of the rows `[N, v]`."""
    leaf = case.storage.detach().double().requires_grad_()
    logits = case.logits(leaf)
    if case.view == "sbv":
        logits = logits.transpose(0, 1)
    (grad,) = torch.autograd.grad(logits, leaf, grad_rows.view(logits.shape))
    return grad
