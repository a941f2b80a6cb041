"""sft_loss_func: the loss_func of a forward_step whose model returned logits."""

from .. import agreement
from ..api import token_metrics
from ..options import Options
from . import checks
from .packing import shift_packed_targets
from .reports import Convention, Sums


def sft_loss_func(
    labels,
    loss_mask,
    output_tensor,
    *,
    returns="per_token",
    report=("lm loss",),
    num_tokens=None,
    non_loss_data=False,
    config=None,
    tp_group="megatron",
    packed_seq_params=None,
    position_ids=None,
    check_for_nan=None,
    check_for_spiky=None,
    **options,
):
    """The masked next-token loss of one micro-batch, as the tuple that Megatron's schedules expect.

    A micro-batch without scored tokens gives loss 0, with a graph, so backward runs and no other
    rank waits. Megatron divides the loss in place; nothing else that is returned shares its memory.

    Args:
        labels: [b, s] integer token ids of the whole vocabulary, not shifted (the input ids) unless
            `shift=False`.
        loss_mask: [b, s] bool, integer or float, not negative, aligned with `labels`. None scores
            all.
        output_tensor: [b, s, V/tp] bf16, fp16 or fp32 logits, from the model called without labels.
        returns: "per_token" or "mean"; see Returns, and "What the gradient is" in docs/megatron.md.
        report: names to report. "lm loss" is the loss. "accuracy" (the label has the largest
            logit), "entropy" (of the prediction, in nats), "nll" (-log p of the label) and
            "perplexity" (mean of 1/p) come from the same read of the logits: unweighted means over
            the tokens with w != 0, without smoothing or z-loss.
        num_tokens: for "per_token" only: a 0-d int32 or int64 tensor to return in place of the
            counted number of tokens.
        non_loss_data: set by the schedule under `collect_non_loss_data=True`.
        config: the model's TransformerConfig, to refuse a `returns` that contradicts it.
            `make_forward_step` passes it. None: Megatron-LM's global arguments if there are any,
            otherwise nothing is checked.
        tp_group: the group that shards the vocabulary. "megatron": Megatron's tensor-parallel group
            once it is initialised. None: the logits are whole (`parallel_output=False`). Pass
            `vocab_size` too: a mix-up of whole and sharded logits is then an error; without it the
            loss is off by about log(tp).
        packed_seq_params, position_ids: where packed documents end, for `shift=True`; see
            `shift_packed_targets`.
        check_for_nan, check_for_spiky: Megatron-LM's checks of the loss through its rerun state
            machine, which read the loss on the host. None: as Megatron-LM's
            `check_for_nan_in_loss_and_grad` and `check_for_spiky_loss` say; without Megatron-LM's
            arguments, off.
        **options: those of `sft_loss` except `reduction`: shift, layout, cu_seqlens, ignore_index,
            label_smoothing, z_loss, softcap, logit_scale, vocab_size, vocab_start,
            inplace_backward, grad_in_forward, backend.

    Returns:
        - "per_token": `(loss_sum, num_tokens, {"lm loss": report})`. loss_sum is fp32 0-d, sum(w *
          loss). num_tokens is int32 0-d, the number of tokens with w != 0: Megatron needs an
          integer, so with fractional weights a run is divided by the number of tokens. report is
          fp32 [2], [loss_sum, num_tokens], which Megatron adds up over micro-batches and ranks.
        - "mean": `(loss, {"lm loss": report})`. loss is fp32 0-d, sum(w * loss) / sum(w); under
          context parallelism it is this shard's part of the mean over whole sequences. report is
          fp32 0-d, the mean over data and context parallelism, weighted by sum(w).
        - `non_loss_data=True`: a dict of `token_metrics`, each [b, s] and detached, of this rank's
          tokens.

    Raises:
        ValueError: the model was called with labels and returned losses; `shift=True` under context
            parallelism; "mean" with `calculate_per_token_loss`; labels None; a tp_group that is not
            Megatron's; what `sft_loss` raises. On a CPU, and on GPUs with FUSED_SFT_LOSS_CHECK=1,
            an error on one tensor-parallel rank is raised on all of them, and so is a difference
            between their batches.
        TypeError: `reduction` was given; num_tokens of another kind; what `sft_loss` raises.
        RuntimeError: Megatron's, if a check rejects the loss.
    """
    convention = Convention(returns, report, num_tokens, check_for_nan, check_for_spiky)
    checks.run(convention, config, options)
    if non_loss_data:
        options = {**options, "inplace_backward": False, "grad_in_forward": False}
    options["tp_group"] = checks.vocab_group({**options, "tp_group": tp_group})

    group, documents = options["tp_group"], (packed_seq_params, position_ids)
    try:
        checks.labels_here(labels)
        if any(given is not None for given in documents):
            labels, loss_mask = shifted(
                labels,
                loss_mask,
                options,
                packed_seq_params=packed_seq_params,
                position_ids=position_ids,
            )
        options = Options(**options)
    except Exception as error:
        agreement.tell(error, group, output_tensor)
        raise
    if non_loss_data:
        return token_metrics(output_tensor, labels, loss_mask, **vars(options))._asdict()
    return convention.tuple_of(Sums.of(output_tensor, labels, loss_mask, options, report))


def shifted(labels, loss_mask, options, **documents):
    """Labels and mask shifted; `options` of `sft_loss` are changed to say so."""
    if not options.get("shift", True):
        if any(given is not None for given in documents.values()):
            raise ValueError(
                "expected no packed_seq_params or position_ids with shift=False, where labels are "
                "taken as they are; pass them to shift_packed_targets, or use shift=True"
            )
        return labels, loss_mask
    documents["cu_seqlens"] = options.pop("cu_seqlens", None)
    documents["ignore_index"] = options.get("ignore_index", -100)
    options["shift"] = False
    return shift_packed_targets(labels, loss_mask, **documents)
