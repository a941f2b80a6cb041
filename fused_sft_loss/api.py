"""sft_loss, SFTLoss and token_metrics: defaults, validation, and the way into the operators."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import autograd as _operators  # noqa: F401  (registers them)
from . import checks, onepass, shards
from .backends import choose
from .options import Options, expect
from .rowmath import RowMath
from .targets import Targets

REDUCTIONS = ("mean", "sum", "none")


class LossTerms(NamedTuple):
    """The pieces of a reduction, none of them read by the host."""

    losses: Tensor  # labels' shape, fp32: weight * loss, exactly 0 where not scored
    weight_sum: Tensor  # 0-d fp32
    count: Tensor  # 0-d int32: scored tokens


class TokenMetrics(NamedTuple):
    """Per-token figures of the labels' shape, without a graph; 0 or False where a token is not
    scored.

    The mask selects and does not weigh: `loss` is that of ``sft_loss`` before the weight. With
    tensor parallelism every rank holds the same values.
    """

    loss: Tensor  # fp32, smoothing and z-loss included
    log_prob: Tensor  # fp32, of the label
    lse: Tensor  # fp32, log-sum-exp of the transformed logits
    correct: Tensor  # bool: the label is the first id with the largest logit
    entropy: Tensor  # fp32, nats


def sft_loss(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    shift: bool = True,
    layout: str = "bsv",
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    tp_group: "dist.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    inplace_backward: bool = False,
    grad_in_forward: bool | float | Tensor = False,
    backend: str | None = None,
) -> Tensor:
    """Masked next-token cross-entropy, read straight from the logits.

    Equivalent to, without any of its copies (unsharded, all defaults)::

        rows = logits[:, :-1].float().transpose(1, 2)
        losses = F.cross_entropy(rows, labels[:, 1:], reduction="none")
        weight = loss_mask[:, 1:].float()
        (losses * weight).sum() / weight.sum()

    Args:
        logits: `[b, s, v]`, `[s, b, v]` with ``layout="sbv"``, or `[n, v]`; bf16, fp16 or fp32; any
            strides but a vocabulary stride of 1. `v` is this rank's shard of the vocabulary.
        labels: `[b, s]` (`[n]`) integer token ids of the global vocabulary, in batch-major order
            whatever the layout.
        loss_mask: labels' shape, bool, int or float >= 0: which *label* tokens count, and how much.
        shift: True: row t is scored on ``labels[t + 1]`` with ``loss_mask[t + 1]``. False: on
            position t.
        cu_seqlens: `[k+1]` boundaries of packed documents over the flattened b*s positions: no
            prediction crosses one, and positions outside all documents are not scored.
        ignore_index: a label that is never scored.
        reduction: "mean" = sum(w * loss) / sum(w), 0 when nothing is scored; "sum" = sum(w * loss);
            "none" = w * loss in labels' shape, exactly 0 where not scored. fp32.
        label_smoothing, z_loss, softcap, logit_scale: see :class:`fused_sft_loss.rowmath.RowMath`.
        vocab_size: true global vocabulary; columns beyond it are padding, outside the softmax,
            gradient 0.
        tp_group: process group over which the vocabulary is sharded. Every rank gets the same loss.
        vocab_start: first global id on this rank, for uneven shards (needs vocab_size); None: equal
            shards in rank order.
        inplace_backward: the gradient overwrites the logits' memory; a second backward raises.
        grad_in_forward: compute the gradient in forward, from the same read of the logits, for the
            gradient that the result will be given by backward: True means 1, another one is a
            number or a 0-d tensor (a loss scale, 1 / micro-batches). Bytes per bf16 element: 4, not
            6. Any other gradient in backward is still right: rows stored for another one are
            computed again, on the device and without a synchronisation. With inplace_backward the
            logits are gone when forward returns, and such rows are multiplied by the ratio, which
            rounds 16-bit gradients a second time (not when it is a power of two and both gradients
            are normal numbers: those stored in fp16 below 6e-5 have fewer digits). Worth it where
            the gradient is known and rows are many. It needs the whole vocabulary (no tp_group) and
            backend "cpu", "cuda" or "hip"; backward runs once; together with inplace_backward it
            stays out of torch.compile's graphs. Where no gradient is asked for (no_grad, logits
            that do not require it) nothing is written.
        backend: "cpu", "eager", "triton", "cuda", "hip", or None for the best there is (see
            ``python -m fused_sft_loss env``).

    Raises:
        TypeError, ValueError: expected, got, and the fix. On a CPU (elsewhere with
            FUSED_SFT_LOSS_CHECK=1) also for a label outside the vocabulary or a negative weight, by
            position; without that check such a label makes its row's loss NaN.
        NotImplementedError: the backend asked for cannot run here.
    """
    expect(reduction in REDUCTIONS, f"reduction in {REDUCTIONS}", reduction)
    options = Options(
        shift=shift,
        layout=layout,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        tp_group=tp_group,
        vocab_start=vocab_start,
        inplace_backward=inplace_backward,
        grad_in_forward=grad_in_forward,
        backend=backend,
    )
    terms = loss_terms(logits, labels, loss_mask, options, mean=reduction == "mean")
    if reduction == "none":
        return terms.losses
    total = terms.losses.sum()
    return total if reduction == "sum" else weighted_mean(total, terms.weight_sum)


def loss_terms(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    options: Options,
    *,
    mean: bool = False,
) -> LossTerms:
    """Per-token losses and what normalises them; the losses carry the graph.

    `mean`: the caller divides by weight_sum, so the gradient that grad_in_forward expects for the
    quotient is divided by it, too.
    """
    if options.inplace_backward:
        checks.inplace(logits)
    targets, call = _prepare(logits, labels, loss_mask, options)
    if options.one_read and logits.requires_grad and torch.is_grad_enabled():
        expected = _expected_gradient(options.grad_in_forward, targets.weight_sum, mean)
        losses = onepass.token_losses(*call, expected, options.inplace_backward)
    else:
        losses, _ = torch.ops.fused_sft_loss.token_losses(*call, options.inplace_backward)
    return LossTerms(losses.view(labels.shape), targets.weight_sum, targets.count)


def loss_terms_and_metrics(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, options: Options
) -> tuple[LossTerms, TokenMetrics]:
    """`loss_terms` and the figures of `token_metrics` (without a graph), from one forward read."""
    if options.one_read:
        raise NotImplementedError(
            "expected no grad_in_forward where more than the loss is reported, got "
            f"{options.grad_in_forward!r}; drop it, or report the loss alone"
        )
    if options.inplace_backward:
        checks.inplace(logits)
    targets, call = _prepare(logits, labels, loss_mask, options)
    vectors = torch.ops.fused_sft_loss.token_losses_and_metrics(*call, options.inplace_backward)
    losses, _normalizer, *metrics = vectors
    terms = LossTerms(losses.view(labels.shape), targets.weight_sum, targets.count)
    return terms, TokenMetrics(*(figure.view(labels.shape).detach() for figure in metrics))


def _expected_gradient(expected: bool | float | Tensor, weight_sum: Tensor, mean: bool) -> Tensor:
    """0-d, of every token's loss; as autograd will compute it, so that the bits are the same."""
    if not isinstance(expected, Tensor):
        expected = weight_sum.new_full((), float(expected))  # filled on the device: no copy to it
    return weighted_mean(expected.detach(), weight_sum) if mean else expected.detach()


def weighted_mean(total: Tensor, weight_sum: Tensor) -> Tensor:
    """total / weight_sum, and 0 with a graph where nothing is scored."""
    return total / torch.where(weight_sum > 0, weight_sum, 1.0)


def token_metrics(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None, **options
) -> TokenMetrics:
    """Loss, label log-probability, lse, top-1 hit and entropy per token, from one read.

    Takes the arguments of :func:`sft_loss` but `reduction` and `inplace_backward`; same errors.
    """
    with torch.no_grad():
        _, call = _prepare(logits, labels, loss_mask, Options(**options))
        vectors = torch.ops.fused_sft_loss.token_metrics(*call)
    return TokenMetrics(*(vector.view(labels.shape) for vector in vectors))


def check_call(logits: Tensor, labels: Tensor, loss_mask: Tensor | None, options: Options) -> None:
    """Raise what :func:`loss_terms` would of this rank's arguments, without talking to others."""
    if options.inplace_backward:
        checks.inplace(logits)
    _prepare(logits, labels, loss_mask, options)


class SFTLoss(torch.nn.Module):
    """:func:`sft_loss` with options bound; those wrong by themselves raise at construction."""

    def __init__(self, *, reduction: str = "mean", **options):
        super().__init__()
        expect(reduction in REDUCTIONS, f"reduction in {REDUCTIONS}", reduction)
        Options(**options).validate()
        self.reduction = reduction
        self.options = options

    def forward(
        self, logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None, **overrides
    ) -> Tensor:
        """As :func:`sft_loss`; `overrides` are options of this call alone, such as cu_seqlens."""
        options = {"reduction": self.reduction, **self.options, **overrides}
        return sft_loss(logits, labels, loss_mask, **options)

    def extra_repr(self) -> str:
        given = {"reduction": self.reduction, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _prepare(logits: Tensor, labels: Tensor, loss_mask: Tensor | None, options: Options):
    """Validate, find the targets, and line up the operators' arguments."""
    options.validate()
    checks.tensors(logits, labels, loss_mask, options.cu_seqlens, options.layout)
    start, size, group_name = shards.placed(logits.shape[-1], options)
    math = RowMath(
        label_smoothing=float(options.label_smoothing),
        z_loss=float(options.z_loss),
        softcap=float(options.softcap or 0.0),
        logit_scale=float(options.logit_scale),
        vocab_start=start,
        vocab_size=size,
    )
    if options.one_read and group_name:
        raise ValueError(
            "expected no grad_in_forward with a vocabulary sharded over tp_group: a row's gradient "
            "needs the other shards' statistics, so its logits are read again in any case. Drop "
            "grad_in_forward"
        )
    device = logits.device.type
    # A constant to torch.compile, which a number given as grad_in_forward is not.
    backend = (
        choose.resolve(options.backend, device, one_read=True)
        if options.one_read
        else choose.resolve(options.backend, device)
    )
    targets = Targets(
        *torch.ops.fused_sft_loss.row_targets(
            labels,
            loss_mask,
            options.cu_seqlens,
            options.shift,
            options.ignore_index,
            size,
            backend,
        )
    )
    # A view: rows are read where they lie.
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    elif options.layout == "sbv":
        logits = logits.transpose(0, 1)
    call = (logits, targets.target, targets.weight, *math, group_name, backend)
    return targets, call
