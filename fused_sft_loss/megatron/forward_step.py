"""make_forward_step: a forward_step that calls the model rightly."""

import dataclasses
from functools import partial

from . import checks, versions
from .loss_func import sft_loss_func, shifted
from .reports import Convention
from .seam import Seam

CONVENTION = ("returns", "report", "num_tokens", "check_for_nan", "check_for_spiky")


def make_forward_step(get_batch, *, in_place=False, head=None, **options):
    """Make a Megatron `forward_step(data_iterator, model)` that trains on this loss.

    By default the model is called without labels. A Float16Module is told not to cast the logits to
    fp32 (megatron-core >= 0.15); what remains is the model's own transpose copy if b > 1. With
    `in_place=True` there is no copy: the model is called with labels, and the loss reads the logits
    as the output layer wrote them.

    Logits as wide as the model's vocabulary are whole; narrower ones are sharded over Megatron's
    tensor-parallel group. Shards that do not add up to the vocabulary are an error.

    Args:
        get_batch: `get_batch(data_iterator) -> dict`, called on every pipeline stage. A value may
            be None on a stage that does not need it.
            - `tokens`: [b, s] int64, the input ids
            - `position_ids`: [b, s] int64
            - `attention_mask`: for the model's attention, or None
            - `loss_mask`: [b, s], which label tokens count; absent or None: all
            - `labels`: [b, s]; absent: `tokens`. Labels that are shifted already need `shift=False`
              and a mask that is shifted like them
            - `cu_seqlens`: [k+1], document boundaries for the loss; optional
            - `packed_seq_params`: Megatron's PackedSeqParams, for the model and the loss; optional
        in_place: needs a GPTModel or another LanguageModule of megatron-core, and no
            `collect_non_loss_data`. Multi-token prediction before 0.18 needs it.
        head: a `ResponseOnlyHead`: only scored positions go through the output layer. Implies
            in_place.
        **options: those of `sft_loss_func` except `config`. `position_ids="restart"`: a document
            ends where the next position id is not one higher.

    Raises:
        ValueError, TypeError: when a step runs, on every stage and before the model runs: what
            `sft_loss_func` raises about the configuration; a batch of another form; labels None on
            the last stage.
    """
    given = {key: options.pop(key) for key in CONVENTION if key in options}
    convention = Convention(**given)
    restart = options.pop("position_ids", None)
    if restart not in (None, "restart"):
        raise ValueError(f"position_ids: expected None or 'restart', got {restart!r}")
    in_place = in_place or head is not None

    def forward_step(data_iterator, model):
        config = versions.attribute(model, "config")
        checks.run(convention, config, options)
        last = versions.attribute(model, "post_process") in (None, True)
        got = get_batch(data_iterator)
        group = checks.vocab_group(options)

        def checked():
            batch = checks.batch(got, options.get("shift", True), last)
            return batch, *_targets(batch, options, restart)

        batch, labels, mask, plain = checks.agreed(checked, group, _batch)
        if in_place:
            seam = Seam(model, mask, head, plain, weigh=True, report=convention.report)
            with seam.installed():
                output = _call(model, batch, labels=labels, loss_mask=mask)
            return output, partial(_in_place_loss, convention, seam.sums)
        keep = {"fp32_output": False} if versions.accepts(model, "fp32_output") else {}
        output = _call(model, batch, **keep)
        if last:
            vocabulary = versions.attribute(model, "vocab_size")
            plain["tp_group"] = checks.vocab_group(plain, output.size(-1), vocabulary)
        return output, partial(sft_loss_func, labels, mask, config=config, **given, **plain)

    return forward_step


def _batch(checked):
    return {"labels": checked[1], "loss_mask": checked[2]}


def _targets(batch, options, restart):
    """(labels, loss_mask, options left for the loss) of one batch, shifted if options say so.

    On a stage without labels nothing is shifted: its loss is never computed.
    """
    options, labels, mask = dict(options), batch["labels"], batch.get("loss_mask")
    if labels is None:
        return labels, mask, {**options, "shift": False}
    if batch.get("cu_seqlens") is not None:
        options["cu_seqlens"] = batch["cu_seqlens"]
    documents = {"packed_seq_params": None, "position_ids": None}
    if options.get("shift", True):
        documents["packed_seq_params"] = batch.get("packed_seq_params")
        documents["position_ids"] = batch["position_ids"] if restart else None
    labels, mask = shifted(labels, mask, options, **documents)
    return labels, mask, options


def _call(model, batch, **kwargs):
    if batch.get("packed_seq_params") is not None:
        kwargs["packed_seq_params"] = batch["packed_seq_params"]
    return model(batch["tokens"], batch["position_ids"], batch["attention_mask"], **kwargs)


def _in_place_loss(convention, sums, output_tensor, non_loss_data=False):
    """loss_func of a model that has returned weight * loss, [b, s]."""
    if non_loss_data:
        raise ValueError(
            "collect_non_loss_data=True with in_place=True: expected logits, which never left the "
            "model. Use in_place=False for such steps"
        )
    return convention.tuple_of(dataclasses.replace(sums, losses=output_tensor))
