"""A stand-in for the cross-entropy inside a model that is called with labels.

GPTModel's forward ends in logits = output_layer(hidden), [s, b, V/tp], and
compute_language_model_loss(labels, logits). In between nothing has been transposed, cast or
gathered: the one place where the loss can read the logits as they were written. From megatron-core
0.18 on forward takes an `output_processor` for that; before, attributes of that one model object
are replaced. No class and no module is touched, and what was there before comes back.
"""

import dataclasses
import functools
import inspect
from contextlib import ExitStack, contextmanager

from ..options import Options
from . import checks, versions
from .head import ResponseOnlyHead, selected
from .reports import Sums

LOSS = "compute_language_model_loss"


@contextmanager
def fused_cross_entropy(model, *, loss_mask=None, head=None, **options):
    """A context in which `model(..., labels=labels)` computes its losses with this package.

    Use it with trainers that call the model with labels: Megatron-LM's pretrain_gpt.py, Primus,
    Megatron-Bridge::

        with fused_cross_entropy(model):
            output_tensor, loss_func = forward_step(data_iterator, model)

    The model returns the same [b, s] fp32 losses, computed from the logits without a copy. Backward
    may run outside. Losses of multi-token prediction stay Megatron's. A call without labels returns
    logits as before. Contexts may be nested; the innermost one counts.

    Args:
        model: a GPTModel or another LanguageModule, wrapped (Float16Module, DDP) or not, or a list
            of such model chunks.
        loss_mask: [b, s]: positions with 0 are not read and have loss 0. None: the loss_mask that
            the model is called with, if any. The mask only selects, because the trainer multiplies
            by it.
        head: a `ResponseOnlyHead`, or None for all positions.
        **options: those of `sft_loss` about one token: ignore_index, label_smoothing, z_loss,
            softcap, logit_scale, vocab_size, inplace_backward, grad_in_forward, backend. Labels are
            used as they come; Megatron's are shifted already.

    Raises:
        TypeError: a model without such a loss; an unknown option.
        ValueError: in the model's forward: what `sft_loss` raises.
        NotImplementedError: the whole model is under torch.compile or checkpoint_wrapper (its
            layers may be); `model.build_schedule_plan` is called in the context, because that plan
            computes the loss later.
    """
    allowed = ("ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale")
    allowed += ("vocab_size", "inplace_backward", "grad_in_forward", "backend")
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f"fused_cross_entropy: unknown options {unknown}; expected {allowed}")
    with ExitStack() as stack:
        for chunk in model if isinstance(model, list | tuple) else [model]:
            seam = Seam(chunk, loss_mask, head, {"shift": False, **options}, weigh=False)
            stack.enter_context(seam.installed())
        yield


class Seam:
    """One model whose loss is computed here while `installed()`.

    options: of the loss, as `sft_loss_func` takes them, tp_group among them; weigh: multiply the
    losses by the mask; report: as in `sft_loss_func`.
    """

    def __init__(self, model, loss_mask, head, options, *, weigh, report=()):
        if head is not None and not isinstance(head, ResponseOnlyHead):
            raise TypeError(f"head: expected a ResponseOnlyHead, got {type(head).__name__}")
        self.model = _language_model(model)
        self._is_last = getattr(self.model, "post_process", True)  # pipeline stage
        if head is not None:
            head.check(self.model.config)
            if self._is_last:
                checks.runs_as_it_is(self.model.output_layer, "the output layer")
        self.loss_mask, self.head, self.weigh, self.report = loss_mask, head, weigh, report
        self.options = dict(options)
        self.sums = None  # of the last call with labels
        self._call = None  # (labels, mask, rows) of the call that is running
        self._heads_to_pass = 0  # output layer calls of multi-token prediction before the main one

    @contextmanager
    def installed(self):
        with ExitStack() as stack:
            replace = functools.partial(_replaced, stack)
            replace(self.model, "forward", self._forward)
            if hasattr(self.model, "build_schedule_plan"):
                replace(self.model, "build_schedule_plan", _no_schedule_plan)
            if not versions.accepts(self.model, "output_processor"):
                replace(self.model, LOSS, self._loss)
                if self.head is not None and self._is_last:
                    replace(self.model.output_layer, "forward", self._output_layer)
            yield self

    def _forward(self, base, *args, **kwargs):
        """The model's forward: notes labels and mask for the calls that it makes."""
        given = inspect.signature(base).bind(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        labels = given.get("labels")
        if labels is None:
            return base(*args, **kwargs)
        mask = given.get("loss_mask") if self.loss_mask is None else self.loss_mask
        if not self.weigh and mask is not None:
            mask = mask != 0
        rows = None
        if self.head is not None and self._is_last:
            ignore_index = self.options.get("ignore_index", -100)
            select = functools.partial(self.head.select, labels, mask, ignore_index)
            group = checks.vocab_group(self.options)
            rows = checks.agreed(select, group, _batch_of_rows)
        if versions.accepts(self.model, "output_processor"):
            if given.get("output_processor") is not None:
                raise ValueError("expected no output_processor of your own inside this context")
            kwargs["output_processor"] = self._output_processor
        self._call, self.sums = (labels, mask, rows), None
        self._heads_to_pass = getattr(self.model.config, "mtp_num_layers", None) or 0
        try:
            output = base(*args, **kwargs)
        finally:
            self._call = None
        if self._is_last and self.sums is None:
            raise RuntimeError(
                f"{type(self.model).__name__} was called with labels and did not compute its loss "
                f"by {LOSS}(labels, logits): fused_cross_entropy has nothing to replace"
            )
        return output

    def _output_layer(self, base, hidden_states, *args, **kwargs):
        """Before 0.18: the output layer, on the selected rows in the main call."""
        if self._call is None:
            return base(hidden_states, *args, **kwargs)
        if self._heads_to_pass > 0:
            self._heads_to_pass -= 1
            return base(hidden_states, *args, **kwargs)
        with selected(self.model.output_layer, hidden_states, self._call[2]) as hidden_states:
            return base(hidden_states, *args, **kwargs)

    def _loss(self, base, labels, logits):
        """Before 0.18: compute_language_model_loss; multi-token prediction rolls a copy of labels,
        so only the main call has the very object that the model was given."""
        if self._call is None or labels is not self._call[0]:
            return base(labels, logits)
        return self._losses(logits)

    def _output_processor(
        self,
        *,
        hidden_states,
        output_layer,
        output_weight,
        runtime_gather_output,
        scale_logits,
        **_,
    ):
        """From 0.18 on: output layer and loss, as GPTModel's forward would do them."""
        options = {"weight": output_weight, "runtime_gather_output": runtime_gather_output}
        rows = self._call[2]
        if rows is None:
            logits, _ = output_layer(hidden_states, **options)
        else:
            with selected(output_layer, hidden_states, rows) as hidden_states:
                logits, _ = output_layer(hidden_states, **options)
        return self._losses(scale_logits(logits))

    def _losses(self, logits):
        """Per-token losses [b, s] fp32 of logits [s, b, V/tp], or [r, 1, V/tp] of selected rows."""
        labels, mask, rows = self._call
        shape, options = labels.shape, dict(self.options)
        vocabulary = getattr(self.model, "vocab_size", None)
        options["tp_group"] = checks.vocab_group(options, logits.size(-1), vocabulary)
        if rows is None:
            options = Options(**options, layout="sbv")
        else:
            logits, labels, mask = logits.squeeze(1), rows.labels, rows.mask
            options = Options(**options)
        sums = Sums.of(logits, labels, mask, options, self.report)
        if rows is None:
            self.sums = sums
            return sums.losses
        losses = ResponseOnlyHead.scatter(sums.losses, rows, shape)
        self.sums = dataclasses.replace(sums, losses=losses)
        return losses


def _language_model(model):
    """What has the loss, inside all wrappers of the model."""
    parts = list(versions.wrapped(model))
    if not hasattr(parts[-1], LOSS):
        raise TypeError(
            f"expected a model with {LOSS}, such as megatron-core's GPTModel, wrapped or not; "
            f"got {type(model).__name__}"
        )
    for part in parts:
        checks.runs_as_it_is(part, "the model")
    return parts[-1]


def _batch_of_rows(rows):
    return {"scored positions": rows.index, "labels": rows.labels, "loss_mask": rows.mask}


def _replaced(stack, owner, name, method):
    """`owner.name` becomes method(base, ...) until the stack unwinds; base is free of stand-ins."""
    current = getattr(owner, name)
    base = getattr(current, "fused_sft_loss_base", current)

    @functools.wraps(base)
    def stand_in(*args, **kwargs):
        return method(base, *args, **kwargs)

    stand_in.fused_sft_loss_base = base
    own, missing = vars(owner), object()
    before = own.get(name, missing)

    def restore():
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    stack.callback(restore)
    setattr(owner, name, stand_in)


def _no_schedule_plan(base, *args, **kwargs):
    raise NotImplementedError(
        "build_schedule_plan inside fused_cross_entropy: the plan computes the loss later, when "
        "this context has ended. Set overlap_moe_expert_parallel_comm=False, or leave "
        "fused_cross_entropy out"
    )
