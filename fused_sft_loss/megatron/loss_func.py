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
    """The masked next-token loss of one micro-batch, in the tuple Megatron's schedules expect.

    Args:
        labels: [b, s] integer, global token ids; unshifted (the input ids) unless `shift=False`.
        loss_mask: [b, s] bool, integer or float >= 0, aligned with `labels`; None scores all.
        output_tensor: [b, s, V/tp] bf16, fp16 or fp32, from the model called without labels.
        returns: "per_token" or "mean", see below and the table that opens this package.
        report: what to report, "lm loss" and of one and the same read of the logits "accuracy" (the
            label has the largest logit), "entropy" (of the prediction, nats), "nll" (-log p of the
            label; exp of its mean is the perplexity) and "perplexity" (mean over tokens of 1/p):
            means over the tokens with w != 0, unweighted, without smoothing or z-loss.
        num_tokens: "per_token" only: a 0-d int32 or int64 tensor to return as the number of tokens
            in place of the count.
        non_loss_data: set by the schedule under `collect_non_loss_data=True`.
        config: the model's TransformerConfig, so that a `returns` that contradicts it is refused;
            `make_forward_step` gives it. None: Megatron-LM's global arguments if there are any,
            else nothing is checked, for a schedule does not tell its loss_func the config.
        tp_group: the group the vocabulary is sharded over. "megatron": its tensor-parallel group
            once `parallel_state` is initialised. None: the logits are whole
            (`parallel_output=False`). Whole and sharded logits look alike here: with `vocab_size`
            given a mix-up is an error, without it the loss is off by about log(tp).
        packed_seq_params, position_ids: where packed documents end, for `shift=True`: as in
            `shift_packed_targets`.
        check_for_nan, check_for_spiky: Megatron-LM's checks of the loss by its rerun state machine,
            which read the loss on the host. None: as Megatron-LM's `check_for_nan_in_loss_and_grad`
            and `check_for_spiky_loss` say, elsewhere not.
        **options: those of `sft_loss` but `reduction`: shift, layout, cu_seqlens, ignore_index,
            label_smoothing, z_loss, softcap, logit_scale, vocab_size, vocab_start,
            inplace_backward, grad_in_forward, backend.

    Returns:
        "per_token": `(loss_sum, num_tokens, {"lm loss": report})`
            loss_sum fp32 0-d = sum(w * loss); num_tokens int32 0-d = tokens with w != 0;
            report fp32 [2] = [loss_sum, num_tokens], which Megatron adds up over micro-batches
            and ranks. Megatron needs an integer, so tokens are counted, not their weights added:
            with weights other than 0 and 1 a run is normalised by the *number* of scored tokens.
        "mean": `(loss, {"lm loss": report})`
            loss fp32 0-d = sum(w * loss) / sum(w). Under context parallelism it is this shard's
            part of the mean over whole sequences, which is what the schedule's `loss *= cp_size`
            needs. report fp32 0-d = that mean over data (and context) parallelism, weighted by
            sum(w): one all-reduce, since Megatron averages it over micro-batches only.
        non_loss_data=True: dict of `token_metrics`, each [b, s] and detached, of this rank's
            tokens. Not reduced over data parallelism: Megatron-LM asks its last rank only.

    An all-masked micro-batch gives loss 0 with a graph: backward runs and no peer is left waiting.
    Megatron changes the loss in place (divides it); nothing else returned shares its memory.

    Raises:
        ValueError: per-token losses instead of logits (the model was called with labels);
            `shift=True` under context parallelism; "mean" with `calculate_per_token_loss`;
            labels None; a tp_group that is not Megatron's; and what `sft_loss` raises. On a CPU
            (elsewhere under FUSED_SFT_LOSS_CHECK=1) what is wrong on one tensor-parallel rank is
            raised on all of them, and so are labels that differ between them.
        TypeError: `reduction` given, a num_tokens of another kind, and what `sft_loss` raises.
        RuntimeError: Megatron's, when a check asked for rejects the loss.
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
