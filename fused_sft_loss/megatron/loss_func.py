"""sft_loss_func: the loss_func of a forward_step whose model returned logits."""

import dataclasses
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .. import agreement
from ..api import token_metrics
from ..options import Options
from . import preconditions
from .packing import one_row, shift_packed_targets
from .protocols import PackedSeqParams
from .reports import Convention, LossTuple, Sums
from .samples import Samples, sample_bounds


def sft_loss_func(
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_tensor: Tensor,
    *,
    returns: str = "per_token",
    report: tuple[str, ...] = ("lm loss",),
    num_tokens: Tensor | None = None,
    non_loss_data: bool = False,
    config: Any = None,
    tp_group: ProcessGroup | DeviceMesh | str | None = "megatron",
    packed_seq_params: PackedSeqParams | None = None,
    position_ids: Tensor | None = None,
    check_for_nan: bool | None = None,
    check_for_spiky: bool | None = None,
    **options: Any,
) -> LossTuple | dict[str, Tensor]:
    """The masked next-token loss of one micro-batch, as the tuple that Megatron's schedules expect.

    A micro-batch without scored tokens has loss 0, with a graph, so backward runs and no other rank
    waits. Megatron divides the loss in place; the other results do not share its memory.

    Args:
        labels: [b, s] integer token ids of the whole vocabulary, not shifted (the input ids) unless
            `shift=False`.
        loss_mask: [b, s] bool, integer or float, not negative, aligned with `labels`. None scores
            all.
        output_tensor: [b, s, V/tp] bf16, fp16 or fp32 logits, from the model called without labels.
        returns: "per_token", "mean" or "per_sample"; see Returns, and "What the gradient is" in
            docs/megatron.md.
        report: names to report. "lm loss" is the loss. "accuracy" (the label has the largest
            logit), "entropy" (of the prediction, in nats), "nll" (-log p of the label) and
            "perplexity" (mean of 1/p) come from the same read of the logits: unweighted means over
            the tokens with w != 0, without smoothing or z-loss.
        num_tokens: for "per_token" only: a 0-d int32 or int64 tensor, returned in place of the
            number of tokens that the loss counts.
        non_loss_data: set by the schedule under `collect_non_loss_data=True`.
        config: the model's TransformerConfig; a `returns` that contradicts it raises.
            `make_forward_step` passes it. None: Megatron-LM's global arguments if there are any,
            otherwise `returns` is not checked.
        tp_group: the group that shards the vocabulary. "megatron": Megatron's tensor-parallel group
            once it is initialised. None: the logits are whole (`parallel_output=False`). Pass
            `vocab_size` too: a mix-up of whole and sharded logits is then an error; without it the
            loss is off by about log(tp).
        packed_seq_params, position_ids: where packed documents end, for `shift=True`; see
            `shift_packed_targets`.
        check_for_nan, check_for_spiky: Megatron-LM's checks of the loss through its rerun state
            machine, which read the loss on the host. None: Megatron-LM's arguments
            `check_for_nan_in_loss_and_grad` and `check_for_spiky_loss` decide; without Megatron-LM
            both are off.
        **options: those of `sft_loss` except `reduction`. `cu_seqlens` may be [1, k+1].

    Returns:
        - "per_token": `(loss_sum, num_tokens, {"lm loss": report})`. loss_sum is fp32 0-d, sum(w *
          loss). num_tokens is int32 0-d, the number of tokens with w != 0: Megatron needs an
          integer, so with fractional weights a run is divided by the number of tokens. report is
          fp32 [2], [loss_sum, num_tokens], which Megatron adds up over micro-batches and ranks.
        - "mean": `(loss, {"lm loss": report})`. loss is fp32 0-d, sum(w * loss) / sum(w); under
          context parallelism it is this shard's part of the mean over whole sequences. report is
          fp32 0-d, the mean over data and context parallelism, weighted by sum(w).
        - "per_sample": `(loss_sum, num_samples, {"lm loss": report})`. loss_sum is the sum over
            samples of sum(w * loss) / sum(w), num_samples the number of samples with sum(w) > 0,
            int32 0-d, and report `[loss_sum, num_samples]`. A sample is a document of cu_seqlens,
            packed_seq_params or position_ids, else a row of the batch. Under context parallelism
            loss_sum is this rank's part, and the number is 0 on all ranks but the first; cu_seqlens
            are then the parts of documents on this rank, as many on every rank.
        - `non_loss_data=True`: a dict of `token_metrics`, each [b, s] and detached, of this rank's
          tokens.

    Raises:
        ValueError: the model was called with labels and returned losses; `shift=True` under context
            parallelism; "mean" with `calculate_per_token_loss`; "per_sample" under context
            parallelism without `calculate_per_token_loss`, or with packed_seq_params or
            position_ids; labels None; a tp_group that is not Megatron's; what `sft_loss` raises. On
            a CPU, and on GPUs with FUSED_SFT_LOSS_CHECK=1, all tensor-parallel ranks raise if one
            of them does, or if their batches differ.
        TypeError: `reduction` was given; num_tokens of another kind; what `sft_loss` raises.
        RuntimeError: Megatron's, if a check rejects the loss.
    """
    convention = Convention(returns, report, num_tokens, check_for_nan, check_for_spiky)
    preconditions.run(convention, config, options)
    if non_loss_data:
        options = {**options, "inplace_backward": False, "grad_in_forward": False}
    options["tp_group"] = preconditions.vocab_group({**options, "tp_group": tp_group})

    group = options["tp_group"]
    try:
        labels = preconditions.labels_here(labels)
        documents: dict[str, Any] = {
            "packed_seq_params": packed_seq_params,
            "position_ids": position_ids,
        }
        samples = None
        if convention.per_sample:
            labels, loss_mask, samples = sampled(labels, loss_mask, options, **documents)
        elif packed_seq_params is not None or position_ids is not None:
            labels, loss_mask = shifted(labels, loss_mask, options, **documents)
        if isinstance(options.get("cu_seqlens"), Tensor):
            options["cu_seqlens"] = one_row("cu_seqlens", options["cu_seqlens"])
        loss_options = Options(**options)
    except Exception as error:
        agreement.tell(error, group, output_tensor)
        raise
    if non_loss_data:
        return token_metrics(output_tensor, labels, loss_mask, **vars(loss_options))._asdict()
    if samples is None:
        return convention.tuple_of(Sums.of(output_tensor, labels, loss_mask, loss_options, report))
    weighed = samples.weighed()
    sums = Sums.of(output_tensor, labels, weighed.mask, loss_options, report)
    return convention.tuple_of(dataclasses.replace(sums, samples=weighed.number))


def sampled(
    labels: Tensor,
    loss_mask: Tensor | None,
    options: dict[str, Any],
    *,
    packed_seq_params: PackedSeqParams | None,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor | None, Samples]:
    """:func:`shifted` labels and mask, and their samples.

    With shift=False the documents only say which tokens form a sample.
    """
    cu_seqlens = options.get("cu_seqlens")
    if options.get("shift", Options.shift):
        labels, loss_mask = shifted(
            labels,
            loss_mask,
            options,
            packed_seq_params=packed_seq_params,
            position_ids=position_ids,
        )
    options.pop("cu_seqlens", None)
    bounds = sample_bounds(labels, cu_seqlens, packed_seq_params, position_ids)
    ignore_index = options.get("ignore_index", Options.ignore_index)
    return labels, loss_mask, Samples.of(labels, loss_mask, ignore_index, bounds)


def shifted(
    labels: Tensor,
    loss_mask: Tensor | None,
    options: dict[str, Any],
    *,
    packed_seq_params: PackedSeqParams | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Shift labels and mask if `options` of `sft_loss` say so; changes `options` to shift=False."""
    if not options.get("shift", Options.shift):
        if packed_seq_params is not None or position_ids is not None:
            raise ValueError(
                "expected no packed_seq_params or position_ids with shift=False, which takes "
                "labels as they are; pass them to shift_packed_targets, or use shift=True"
            )
        return labels, loss_mask
    cu_seqlens = options.pop("cu_seqlens", None)
    options["shift"] = False
    return shift_packed_targets(
        labels,
        loss_mask,
        packed_seq_params=packed_seq_params,
        cu_seqlens=cu_seqlens,
        position_ids=position_ids,
        ignore_index=options.get("ignore_index", Options.ignore_index),
    )
