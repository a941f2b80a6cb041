"""make_forward_step: a forward_step for Megatron's schedules that trains on this loss."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from ..options import Options
from . import preconditions, versions, wrappers
from .loss_func import sampled, sft_loss_func, shifted
from .protocols import GetBatch
from .replaced_loss import Head, ReplacedLoss
from .reports import Convention, LossTuple
from .samples import Samples

#: `([state,] data_iterator, model, return_schedule_plan=False) -> (output_tensor, loss_func)`.
ForwardStep = Callable[..., tuple[Tensor, Callable[..., LossTuple | dict[str, Tensor]]]]


class Targets(NamedTuple):
    """Labels and mask of a batch, None where this stage has none."""

    labels: Tensor | None
    mask: Tensor | None
    options: dict[str, Any]  # left for the loss
    samples: Samples | None = None  # of returns="per_sample"


CONVENTION = ("returns", "report", "num_tokens", "check_for_nan", "check_for_spiky")


def make_forward_step(
    get_batch: GetBatch,
    *,
    in_place: bool = False,
    head: Head | None = None,
    **options: Any,
) -> ForwardStep:
    """Make a Megatron `forward_step(data_iterator, model)` that trains on this loss.

    The step also takes `return_schedule_plan=False` as its last argument, and Megatron-Bridge's
    `state` as its first, which it does not need. With `return_schedule_plan=True`
    (`overlap_moe_expert_parallel_comm`) it returns the model's schedule plan, which computes this
    loss as with `in_place=True`.

    By default the model is called without labels. Float16Module does not cast the logits to fp32
    (megatron-core >= 0.15); the model still copies them to transpose them if b > 1. With
    `in_place=True` there is no copy: the model is called with labels, and the loss reads the logits
    where the output layer wrote them.

    Logits as wide as the model's vocabulary are whole; narrower ones are sharded over Megatron's
    tensor-parallel group. Shards that do not add up to the vocabulary are an error.

    Args:
        get_batch: `get_batch(data_iterator) -> dict`, called on every pipeline stage. A value may
            be None on a stage that does not need it.
            - `tokens`: [b, s] int64, the input ids
            - `position_ids`: [b, s] int64
            - `attention_mask`: for the model's attention, or None
            - `loss_mask`: [b, s], which label tokens count; absent or None: all
            - `labels`: [b, s]; absent: `tokens`. Shifted labels need `shift=False` and a mask that
              is shifted in the same way
            - `cu_seqlens`: [k+1] or [1, k+1], document boundaries for the loss; optional
            - `packed_seq_params`: Megatron's PackedSeqParams, for the model and the loss; optional
        in_place: needs a GPTModel or another LanguageModule of megatron-core, and no
            `collect_non_loss_data`. Multi-token prediction before 0.18 needs it.
        head: a `ResponseOnlyHead` sends only scored positions through the output layer; a
            `LinearHead` also computes their losses there, without ever holding the logits. It
            implies in_place.
        **options: those of `sft_loss_func` except `config`. `position_ids="restart"`: a document
            ends where the next position id is not one higher.

    Raises:
        ValueError, TypeError: when a step runs, on every stage and before the model runs: what
            `sft_loss_func` raises about the configuration; a batch without the required keys or
            with unknown ones; labels None on the last stage.
        NotImplementedError: when a step is asked for a schedule plan before megatron-core 0.18.
    """
    given = {key: options.pop(key) for key in CONVENTION if key in options}
    convention = Convention(**given)
    restart = options.pop("position_ids", None)
    if restart not in (None, "restart"):
        raise ValueError(f"position_ids: expected None or 'restart', got {restart!r}")
    in_place = in_place or head is not None

    def forward_step(
        *arguments: Any, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Callable[..., LossTuple | dict[str, Tensor]]]:
        data_iterator, model, plan = _inputs(arguments, return_schedule_plan)
        if plan:
            preconditions.schedule_plan([model, *wrappers.wrapped(model)][-1], "make_forward_step")
        config = wrappers.attribute(model, "config")
        preconditions.run(convention, config, options)
        last = wrappers.attribute(model, "post_process") in (None, True)
        got = get_batch(data_iterator)
        group = preconditions.vocab_group(options)

        def checked() -> tuple[Mapping[str, Any], Targets]:
            batch = preconditions.batch(got, options.get("shift", Options.shift), last)
            return batch, _targets(batch, options, restart is not None, convention.per_sample)

        batch, (labels, mask, left, samples) = preconditions.agreed(checked, group, _compared)
        if in_place or plan:
            count = None
            if last and samples is not None:
                mask, count = samples.weighed()
            replaced = ReplacedLoss(model, mask, head, left, weigh=True, report=convention.report)
            with replaced.installed():
                call = replaced.model.build_schedule_plan if plan else model
                output = _call(call, batch, labels=labels, loss_mask=mask)
            return output, partial(_in_place_loss, convention, replaced, samples=count)
        keep = {"fp32_output": False} if versions.accepts(model, "fp32_output") else {}
        output = _call(model, batch, **keep)
        if samples is not None:
            left["cu_seqlens"] = samples.bounds
        if last:
            vocabulary = wrappers.attribute(model, "vocab_size")
            left["tp_group"] = preconditions.vocab_group(left, output.size(-1), vocabulary)
        return output, partial(sft_loss_func, labels, mask, config=config, **given, **left)

    return forward_step


def _inputs(arguments: tuple[Any, ...], plan: bool) -> tuple[Any, Module, bool]:
    """(data_iterator, model, plan) of ([state,] data_iterator, model[, return_schedule_plan]).

    A trainer decides by a step's signature what it passes, or passes always the same. A bool at the
    end is return_schedule_plan; what is left are the last two.
    """
    left = arguments
    if left and isinstance(left[-1], bool):
        left, plan = left[:-1], plan or left[-1]
    if len(left) not in (2, 3):
        kinds = ", ".join(type(argument).__name__ for argument in arguments)
        raise TypeError(
            "forward_step: expected (data_iterator, model), with an optional state before them and "
            f"return_schedule_plan after them, got ({kinds})"
        )
    return left[-2], left[-1], plan


def _compared(checked: tuple[Mapping[str, Any], Targets]) -> dict[str, Tensor | None]:
    """The tensors that must be equal on all ranks that share the vocabulary."""
    _, targets = checked
    return {"labels": targets.labels, "loss_mask": targets.mask}


def _targets(
    batch: Mapping[str, Any], options: Mapping[str, Any], restart: bool, per_sample: bool
) -> Targets:
    """Labels and mask of one batch, shifted if `options` say so.

    A stage without labels shifts nothing, because it never computes the loss. restart: position ids
    mark the ends of documents.
    """
    left, labels, mask = dict(options), batch["labels"], batch.get("loss_mask")
    if labels is None:
        return Targets(labels, mask, {**left, "shift": False})
    if batch.get("cu_seqlens") is not None:
        left["cu_seqlens"] = batch["cu_seqlens"]
    documents = {}
    if per_sample or left.get("shift", Options.shift):
        documents["packed_seq_params"] = batch.get("packed_seq_params")
        documents["position_ids"] = batch["position_ids"] if restart else None
    if per_sample:
        labels, mask, samples = sampled(labels, mask, left, **documents)
        return Targets(labels, mask, left, samples)
    labels, mask = shifted(labels, mask, left, **documents)
    return Targets(labels, mask, left)


def _call(model: Callable[..., Any], batch: Mapping[str, Any], **kwargs: Any) -> Any:
    if batch.get("packed_seq_params") is not None:
        kwargs["packed_seq_params"] = batch["packed_seq_params"]
    return model(batch["tokens"], batch["position_ids"], batch["attention_mask"], **kwargs)


def _in_place_loss(
    convention: Convention,
    replaced: ReplacedLoss,
    output_tensor: Tensor,
    non_loss_data: bool = False,
    *,
    samples: Tensor | None = None,
) -> LossTuple:
    """The loss_func of a model or schedule plan that has returned weight * loss, [b, s]."""
    if non_loss_data:
        raise ValueError(
            "collect_non_loss_data=True with in_place=True: expected logits, got losses from the "
            "model. Use in_place=False for such steps"
        )
    sums = replaced.sums
    assert sums is not None, "Megatron calls the loss_func on the last stage only"
    return convention.tuple_of(dataclasses.replace(sums, losses=output_tensor, samples=samples))
