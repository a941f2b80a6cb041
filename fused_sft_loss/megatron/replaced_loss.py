"""Temporary replacement of the cross-entropy inside a model that is called with labels.

GPTModel's forward ends in logits = output_layer(hidden), [s, b, V/tp], and
compute_language_model_loss(labels, logits). Between the two, nothing has transposed, cast or
gathered the logits, so the loss can read them where the output layer wrote them. From megatron-core
0.18 on, forward takes an `output_processor` for that. Before, methods of this one model object are
replaced, and restored at the end of the context. Classes and modules stay as they are.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..options import Options
from . import preconditions, versions
from .head import ResponseOnlyHead, Rows, selected
from .language_model import LOSS, language_model, nothing_replaced
from .lazy_mask import mask_now
from .linear_head import LinearHead, LinearTargets
from .methods import replace_method
from .protocols import LossMask, OutputLayer
from .reports import Sums

#: What decides which rows go through the output layer.
Head = ResponseOnlyHead | LinearHead


class _Call(NamedTuple):
    """A call of the model with labels."""

    labels: Tensor
    mask: Tensor | None
    rows: Rows | LinearTargets | None  # that go through the output layer; None: all


class ReplacedLoss:
    """Replaces one model's cross-entropy while `installed()`.

    options: of the loss, as `sft_loss_func` takes them, with tp_group; weigh: multiply the losses
    by the mask; report: as in `sft_loss_func`.
    """

    def __init__(
        self,
        model: Module,
        loss_mask: LossMask,
        head: Head | None,
        options: dict[str, Any],
        *,
        weigh: bool,
        report: tuple[str, ...] = (),
    ) -> None:
        if head is not None and not isinstance(head, Head):
            raise TypeError(
                f"head: expected a ResponseOnlyHead or a LinearHead, got {type(head).__name__}"
            )
        self.model = language_model(model)
        self._is_last = getattr(self.model, "post_process", True)  # pipeline stage
        if head is not None:
            head.check(self.model.config)
            if self._is_last:
                preconditions.not_wrapped(self.model.output_layer, "the output layer")
        self.loss_mask, self.head, self.weigh, self.report = loss_mask, head, weigh, report
        self.options = dict(options)
        self.sums: Sums | None = None  # of the last call with labels
        self._call: _Call | None = None  # that is running
        # Output layer calls of multi-token prediction before the main one; None: all calls, until
        # the output_processor makes the main one.
        self._heads_to_pass: int | None = 0
        self._logits_factor = 1.0  # of Megatron's _scale_logits

    @contextmanager
    def installed(self) -> Iterator["ReplacedLoss"]:
        with ExitStack() as stack:
            replace = functools.partial(replace_method, stack)
            replace(self.model, "forward", self._forward)
            if hasattr(self.model, "build_schedule_plan"):
                replace(self.model, "build_schedule_plan", self._schedule_plan)
            if self.head is not None and self._is_last:
                replace(self.model.output_layer, "forward", self._output_layer)
            if not versions.accepts(self.model, "output_processor"):
                replace(self.model, LOSS, self._loss)
            yield self

    def _forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Keeps labels and mask for the methods that it calls."""
        given = inspect.signature(base).bind(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        if given.get("labels") is None:
            return base(*args, **kwargs)
        call = self._call_of(given["labels"], given.get("loss_mask"))
        if versions.accepts(self.model, "output_processor"):
            if given.get("output_processor") is not None:
                raise ValueError("expected no output_processor of your own inside this context")
            kwargs["output_processor"] = functools.partial(self._output_processor, call)
        self._call, self.sums = call, None
        self._heads_to_pass = self._before_the_main_call()
        try:
            output = base(*args, **kwargs)
        finally:
            self._call = None
        if self._is_last and self.sums is None:
            raise nothing_replaced(self.model)
        return output

    def _schedule_plan(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's build_schedule_plan. The plan calls the output_processor when it runs."""
        given = inspect.signature(base).bind(*args, **kwargs).arguments
        if given.get("labels") is None:
            return base(*args, **kwargs)
        preconditions.schedule_plan(self.model, "fused_cross_entropy")
        if given.get("output_processor") is not None:
            raise ValueError("expected no output_processor of your own inside this context")
        call = self._call_of(given["labels"], given.get("loss_mask"))
        return base(*args, **kwargs, output_processor=functools.partial(self._planned, call))

    def _planned(self, call: _Call, **given: Any) -> Tensor:
        """:meth:`_output_processor` of a plan, which runs after the context has ended."""
        with ExitStack() as stack:
            if self.head is not None:
                replace_method(stack, self.model.output_layer, "forward", self._output_layer)
            self._call = call
            stack.callback(setattr, self, "_call", None)
            return self._output_processor(call, **given)

    def _before_the_main_call(self) -> int | None:
        """What `_heads_to_pass` is when the model is called."""
        if versions.accepts(self.model, "output_processor"):
            return None
        return getattr(self.model.config, "mtp_num_layers", None) or 0

    def _call_of(self, labels: Tensor, mask: Tensor | None) -> _Call:
        """The call with these labels; `mask` counts if the context was given none."""
        own = mask_now(self.loss_mask, labels, preconditions.vocab_group(self.options))
        mask = mask if own is None else own
        if not self.weigh and mask is not None:
            mask = mask != 0
        return _Call(labels, mask, self._rows(labels, mask))

    def _rows(self, labels: Tensor, mask: Tensor | None) -> Rows | LinearTargets | None:
        """The rows that go through the output layer, the same on all ranks of the vocabulary."""
        if (head := self.head) is None or not self._is_last:
            return None
        ignore_index = self.options.get("ignore_index", Options.ignore_index)

        def select() -> Rows | LinearTargets:
            return head.select(labels, mask, ignore_index)

        return preconditions.agreed(select, preconditions.vocab_group(self.options), _compared)

    def _output_layer(
        self,
        base: Callable[..., Any],
        hidden_states: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Any:
        """The output layer's forward. The main call computes the rows of the head only: their
        logits, or with a LinearHead the losses [b, s] of all positions."""
        layer = functools.partial(base, weight=weight, runtime_gather_output=runtime_gather_output)
        rows = None if self._call is None else self._call.rows
        if rows is None or self._heads_to_pass is None:
            return layer(hidden_states)
        if self._heads_to_pass > 0:
            self._heads_to_pass -= 1
            return layer(hidden_states)
        if isinstance(rows, LinearTargets):
            return self._linear_losses(rows, hidden_states, weight), None
        with selected(self.model.output_layer, hidden_states, rows) as hidden_states:
            return layer(hidden_states)

    def _linear_losses(
        self, targets: LinearTargets, hidden_states: Tensor, weight: Tensor | None
    ) -> Tensor:
        """The losses [b, s] of a LinearHead."""
        scale = self.options.get("logit_scale", Options.logit_scale) * self._logits_factor
        self.sums = targets.sums(
            self.model.output_layer,
            hidden_states,
            weight,
            {**self.options, "logit_scale": scale},
            getattr(self.model, "vocab_size", None),
            self.report,
        )
        return self.sums.losses

    def _loss(self, base: Callable[..., Tensor], labels: Tensor, logits: Tensor) -> Tensor:
        """Before 0.18: compute_language_model_loss.

        Multi-token prediction passes a rolled copy of the labels. Only the main call passes the
        object that the model was given.
        """
        if self._call is None or labels is not self._call.labels:
            return base(labels, logits)
        return self._losses(self._call, logits)

    def _output_processor(
        self,
        call: _Call,
        *,
        hidden_states: Tensor,
        output_layer: OutputLayer,
        output_weight: Tensor | None,
        runtime_gather_output: bool | None,
        scale_logits: Callable[[Tensor], Tensor],
        **_: Any,
    ) -> Tensor:
        """From 0.18 on: output layer and loss, in the order of GPTModel's forward."""
        self._heads_to_pass = 0
        if isinstance(call.rows, LinearTargets):  # which scales inside the output layer
            one = torch.ones((), dtype=torch.float32, device="cpu")
            self._logits_factor = float(scale_logits(one))
        logits, _bias = output_layer(
            hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        return self._losses(call, scale_logits(logits))

    def _losses(self, call: _Call, logits: Tensor) -> Tensor:
        """Per-token losses [b, s] fp32 of logits [s, b, V/tp], or [r, 1, V/tp] of selected rows.

        With a LinearHead the output layer has computed them, and returned them as logits.
        """
        rows = call.rows
        if isinstance(rows, LinearTargets):
            assert self.sums is not None
            return self.sums.losses
        vocabulary = getattr(self.model, "vocab_size", None)
        group = preconditions.vocab_group(self.options, logits.size(-1), vocabulary)
        options = Options(**{**self.options, "tp_group": group})
        if rows is None:
            options = dataclasses.replace(options, layout="sbv")
            self.sums = Sums.of(logits, call.labels, call.mask, options, self.report)
            return self.sums.losses
        sums = Sums.of(logits.squeeze(1), rows.labels, rows.mask, options, self.report)
        losses = ResponseOnlyHead.scatter(sums.losses, rows, call.labels.shape)
        self.sums = dataclasses.replace(sums, losses=losses)
        return losses


def _compared(rows: Rows | LinearTargets) -> dict[str, Tensor | None]:
    """The tensors that must be equal on all ranks that share the vocabulary."""
    if isinstance(rows, LinearTargets):
        return {"labels": rows.labels, "loss_mask": rows.mask}
    return {"scored positions": rows.positions, "labels": rows.labels, "loss_mask": rows.mask}
