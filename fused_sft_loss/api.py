"""sft_loss, SFTLoss and token_metrics: they check their arguments and call the operators."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import agreement, autograd, checks, dtensor, groups, inplace, one_read, samples, shards
from .backends import selection
from .backends.contract import Losses
from .options import Options
from .rowmath import RowMath
from .scoring import Scoring
from .targets import Targets, weighted_mean

METRICS = "token_metrics"


class LossTerms(NamedTuple):
    """Unreduced losses and their normalisers. All stay on the device."""

    losses: Tensor  # labels' shape, fp32: weight * loss, exactly 0 where not scored
    weight_sum: Tensor  # 0-d fp32
    count: Tensor  # type: ignore[assignment]  # 0-d int32: scored tokens; hides tuple.count


class TokenMetrics(NamedTuple):
    """Figures for each token, in the labels' shape, without a graph.

    Tokens that are not scored have 0 or False. The mask selects tokens and does not weigh them:
    `loss` is the loss of ``sft_loss`` without the weight. Under tensor parallelism all ranks hold
    the same values.
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
    shift: bool = Options.shift,
    layout: str = Options.layout,
    cu_seqlens: Tensor | None = Options.cu_seqlens,
    ignore_index: int = Options.ignore_index,
    reduction: str = "mean",
    label_smoothing: float = Options.label_smoothing,
    z_loss: float = Options.z_loss,
    softcap: float | None = Options.softcap,
    logit_scale: float | Tensor = Options.logit_scale,
    vocab_size: int | None = Options.vocab_size,
    tp_group: "dist.ProcessGroup | None" = Options.tp_group,
    vocab_start: int | None = Options.vocab_start,
    inplace_backward: bool = Options.inplace_backward,
    grad_in_forward: bool | float | Tensor = Options.grad_in_forward,
    backend: str | None = Options.backend,
) -> Tensor:
    """Masked next-token cross-entropy, computed on the logits where they lie.

    Without options, and for an unsharded vocabulary, it equals the following, without the copies::

        rows = logits[:, :-1].float().transpose(1, 2)
        losses = F.cross_entropy(rows, labels[:, 1:], reduction="none")
        weight = loss_mask[:, 1:].float()
        (losses * weight).sum() / weight.sum()

    Everything is computed in fp32. The gradient is rounded once, to the dtype of the logits.

    Args:
        logits: `[b, s, v]`, `[s, b, v]` with ``layout="sbv"``, or `[n, v]`; bf16, fp16 or fp32. The
            vocabulary stride must be 1; all other strides are free. `v` is this rank's shard of the
            vocabulary. A DTensor sharded on the vocabulary, also unevenly, or replicated needs no
            `tp_group`, `vocab_start` and `vocab_size`, and its gradient is such a DTensor.
        labels: `[b, s]` (or `[n]`) integer token ids of the whole vocabulary, batch first for every
            layout.
        loss_mask: bool, integer or float, not negative, in the labels' shape. It says which label
            tokens count, and how much. None: all count 1.
        shift: True: row t is scored on ``labels[t + 1]`` with weight ``loss_mask[t + 1]``. False:
            on ``labels[t]``, for labels that are shifted already.
        layout: "bsv" or "sbv": the order of the dimensions of the logits.
        cu_seqlens: `[k+1]` boundaries of k packed documents over the b*s positions. No prediction
            crosses a boundary, and positions outside all documents are not scored. With
            ``shift=False`` only "sample_mean" takes them.
        ignore_index: a label that is never scored.
        reduction: "mean" is sum(w * loss) / sum(w), and 0 if nothing is scored. "sum" is sum(w *
            loss). "none" is w * loss in the labels' shape, and exactly 0 for tokens that are not
            scored. "sample_mean" is the mean over samples of sum(w * loss) / sum(w), so that long
            samples weigh no more than short ones. A sample is a document of `cu_seqlens`; without
            them a row of the batch, and labels `[n]` are one sample. Samples without a scored token
            are not counted; without any sample the loss is 0. The result is fp32.
        label_smoothing, z_loss, softcap, logit_scale: with z = logit_scale * x, or z = softcap *
            tanh(logit_scale * x / softcap), and lse = log(sum(exp(z))), the loss of a token is (1 -
            label_smoothing) * (lse - z[label]) + label_smoothing * (lse - mean(z)) + z_loss *
            lse**2. They are constants and get no gradient, nor does `loss_mask`. `logit_scale` may
            be a 0-d CPU tensor: a compiled step is then not compiled again when it changes.
        vocab_size: size of the whole vocabulary without padding. Columns beyond it are not in the
            softmax and get gradient 0.
        tp_group: process group that shards the vocabulary, or a DeviceMesh of one dimension. Every
            rank gets the same loss, by one all-gather. On a CPU, and on GPUs with
            FUSED_SFT_LOSS_CHECK=1, the ranks first compare their arguments in one more small
            exchange.
        vocab_start: first token id on this rank, for uneven shards; needs `vocab_size`. None: equal
            shards in rank order.
        inplace_backward: True: the gradient overwrites the memory of the logits, so backward needs
            no extra memory. A second backward raises. It is refused for a leaf that requires grad
            and its views, for rows that share memory, and where autograd cannot see that another
            operator needs the old values: under ``saved_tensors_hooks`` (non-reentrant
            checkpointing, save_on_cpu, activation offloading) and torch.func. Inside a
            torch.compile graph the gradient is a new tensor.
        grad_in_forward: True, or the gradient that backward will be called with (a number or a 0-d
            tensor, such as a loss scale). Forward then computes the gradient from the same read of
            the logits: 4 bytes for each bf16 logit instead of 6. If backward is called with another
            gradient, the rows are corrected on the device: from the logits, exactly; with
            `inplace_backward` by the ratio, which rounds 16-bit gradients a second time (a power
            of two is exact, unless a stored fp16 gradient is below 6e-5 and has fewer digits). It
            needs the whole vocabulary on one rank and backend "cpu", "cuda" or "hip". Backward runs
            once. Without a gradient to compute (``no_grad``) nothing is written.
        backend: "cpu", "cuda", "hip", "triton" or "eager". None: the fastest that runs on the
            device; ``python -m fused_sft_loss env`` prints which, and why not the others.

    Returns:
        The loss, fp32: 0-d, or in the labels' shape with ``reduction="none"``.

    Raises:
        TypeError, ValueError: a wrong argument. The message says what was expected, what came, and
            the fix. On a CPU, and on GPUs with FUSED_SFT_LOSS_CHECK=1, label values and weights are
            checked too, and ranks that share a vocabulary must agree, or all of them raise. Without
            that check, a label outside the vocabulary makes the loss of its token NaN.
        NotImplementedError: the backend cannot run here, or has no kernel for an option.
    """
    of_kernels, per_sample = samples.of_kernels(reduction)
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
    call = prepared(logits, labels, loss_mask, options, f"{reduction} loss", per_sample)
    if not call.one_read:
        result = call.loss(of_kernels)[0]
        return result.view(labels.shape) if of_kernels == "none" else result
    terms = call.one_read_terms(labels.shape, mean=of_kernels == "mean")
    if of_kernels == "none":
        return terms.losses
    total = terms.losses.sum()
    return total if of_kernels == "sum" else weighted_mean(total, terms.weight_sum)


def loss_terms(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, options: Options
) -> LossTerms:
    """Per-token losses, their sum of weights and count. The losses have a graph."""
    call = prepared(logits, labels, loss_mask, options, "loss")
    if call.one_read:
        return call.one_read_terms(labels.shape)
    found = call.loss("none")
    return LossTerms(found.result.view(labels.shape), found.weight_sum, found.count)


def loss_terms_and_metrics(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, options: Options
) -> tuple[LossTerms, TokenMetrics]:
    """`loss_terms`, and the figures of `token_metrics` without a graph, from one forward read."""
    if options.one_read:
        raise NotImplementedError(
            "expected no grad_in_forward where more than the loss is reported, got "
            f"{options.grad_in_forward!r}; drop it, or report the loss alone"
        )
    call = prepared(logits, labels, loss_mask, options, "loss and metrics")
    losses, metrics = call.loss_and_metrics()
    terms = LossTerms(losses.result.view(labels.shape), losses.weight_sum, losses.count)
    return terms, TokenMetrics(*(figure.view(labels.shape).detach() for figure in metrics))


def token_metrics(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None, **options: Any
) -> TokenMetrics:
    """Loss, log-probability, lse, top-1 hit and entropy of each token, from one read.

    Takes the arguments of :func:`sft_loss` except `reduction`, `inplace_backward` and
    `grad_in_forward`, and raises the same errors. The results have no graph.
    """
    with torch.no_grad():
        vectors = prepared(logits, labels, loss_mask, Options(**options), METRICS).metrics()
    return TokenMetrics(*(vector.view(labels.shape) for vector in vectors))


class SFTLoss(torch.nn.Module):
    """:func:`sft_loss` as a module that holds its options.

    Options that are wrong for any input raise when the module is constructed.

    A copy (copy.deepcopy) keeps the tp_group. A pickle (torch.save of a model) keeps its name and
    ranks; a process that loads it without such a group raises in the first call, unless
    options["tp_group"] is set before. state_dict() is empty.
    """

    def __init__(self, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__()
        _, per_sample = samples.of_kernels(reduction)
        Options(**options).validate(per_sample)
        self.reduction = reduction
        self.options = options

    def forward(
        self, logits: Tensor, labels: Tensor, loss_mask: Tensor | None = None, **overrides: Any
    ) -> Tensor:
        """Compute :func:`sft_loss`; `overrides` replace options in this call alone."""
        options = {"reduction": self.reduction, **self.options, **overrides}
        return sft_loss(logits, labels, loss_mask, **options)

    def __getstate__(self) -> dict:
        """For copies and pickles: the group's name and ranks replace the process group."""
        state = super().__getstate__()
        if isinstance(group := self.options.get("tp_group"), groups.NamedGroup | None):
            return state
        found = groups.process_group(group)
        named = None if found is None else groups.named(found)
        return {**state, "options": {**self.options, "tp_group": named}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if isinstance(group := self.options.get("tp_group"), groups.NamedGroup):
            # If the group does not exist yet, the first call looks again, or raises.
            with contextlib.suppress(ValueError):
                self.options = {**self.options, "tp_group": groups.found(group)}

    def extra_repr(self) -> str:
        given = {"reduction": self.reduction, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


class Call(NamedTuple):
    """A call whose options and shapes are checked."""

    logits: Tensor  # [b, s, v]: a view, without a copy
    scoring: Scoring
    math: RowMath
    options: Options
    name: str  # what is computed; ranks that share a vocabulary must agree on it
    group_name: str
    backend: str

    @property
    def one_read(self) -> bool:
        """Whether forward computes the gradient too."""
        wanted = self.options.one_read and self.logits.requires_grad
        return wanted and torch.is_grad_enabled()

    def _arguments(self, reduction: str) -> tuple:
        """The arguments of the differentiable operators."""
        where = self.name, self.group_name, self.backend, self.options.inplace_backward
        return self.logits, self.scoring, self.math, reduction, *where

    def loss(self, reduction: str) -> Losses:
        return Losses(*autograd.differentiable_loss(*self._arguments(reduction)))

    def one_read_terms(self, shape: torch.Size, mean: bool = False) -> LossTerms:
        """LossTerms with the gradient computed in forward.

        mean: the caller divides the sum of losses by weight_sum, so the expected gradient of each
        loss is divided by it too.
        """
        found = autograd.row_targets(self.scoring, self.math.vocab_size, self.backend)
        targets = Targets(*found)
        expected = one_read.expected_gradient(
            self.options.grad_in_forward, targets.weight_sum, mean
        )
        losses = one_read.token_losses(
            self.logits,
            targets,
            self.math,
            self.backend,
            expected,
            self.options.inplace_backward,
        )
        return LossTerms(losses.view(shape), targets.weight_sum, targets.count)

    def loss_and_metrics(self) -> tuple[Losses, tuple[Tensor, ...]]:
        """Losses `[N]` with a graph, and the metrics `[N]` without one."""
        found = autograd.differentiable_loss_and_metrics(*self._arguments("none"))
        losses = len(Losses._fields)
        return Losses(*found[:losses]), found[losses:]

    def metrics(self) -> tuple[Tensor, ...]:
        return autograd.token_metrics(
            self.logits, self.scoring, self.math, self.name, self.group_name, self.backend
        )


def prepared(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    options: Options,
    name: str,
    per_sample: bool = False,
    check_more: Callable[[Tensor], None] = lambda labels: None,
) -> Call:
    """Check the arguments. Wrong ones raise, and ranks that share the vocabulary are told.

    `check_more(labels)` checks arguments that are not in `options`.
    """
    try:
        if dtensor.is_dtensor(logits):
            options = dtensor.placed(logits, options)
            logits, labels, loss_mask, options = dtensor.local(logits, labels, loss_mask, options)
        options.validate(per_sample)
        math, group_name, backend = _validated(logits, labels, loss_mask, options, name)
        check_more(labels)
    except Exception as error:
        agreement.tell(error, options.tp_group, logits)
        raise
    ignored = int(options.ignore_index)
    scoring = Scoring(labels, loss_mask, options.cu_seqlens, options.shift, ignored, per_sample)
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    elif options.layout == "sbv":
        logits = logits.transpose(0, 1)
    return Call(logits, scoring, math, options, name, group_name, backend)


def _validated(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, options: Options, name: str
) -> tuple[RowMath, str, str]:
    """(row math, group name, backend). Raises if this rank's arguments are wrong."""
    checks.tensors(logits, labels, loss_mask, options.cu_seqlens, options.layout)
    checks.constant_mask(loss_mask)
    if options.inplace_backward and name != METRICS:
        inplace.prepare(logits)
    start, size, group_name = shards.placed(logits.shape[-1], options)
    math = RowMath.of(options, start, size)
    if not torch.compiler.is_compiling():
        math = math.read()
    if options.one_read and group_name:
        raise ValueError(
            "expected no grad_in_forward with a vocabulary sharded over tp_group: a row's gradient "
            "needs the other shards' statistics, so its logits are read again in any case. Drop "
            "grad_in_forward"
        )
    device = logits.device.type
    # torch.compile needs constant arguments here. options.one_read is not constant: it depends on
    # the number that is given as grad_in_forward.
    backend = (
        selection.resolve(options.backend, device, one_read=True)
        if options.one_read
        else selection.resolve(options.backend, device)
    )
    return math, group_name, backend
