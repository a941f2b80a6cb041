"""The loss as Megatron wants it: a loss_func, and a forward_step that calls the model rightly.

    from fused_sft_loss.megatron import make_forward_step
    forward_backward_func(forward_step_func=make_forward_step(get_batch), ...)

or, in a forward_step of your own, with the model called *without* labels:

    output_tensor = model(tokens, position_ids, attention_mask)
    return output_tensor, partial(sft_loss_func, labels, loss_mask)

What is trained on. Micro-batch i has S_i = sum(w * loss), n_i = tokens with w != 0, W_i = sum(w);
there are M micro-batches on each of D data-parallel ranks; mean() is over all D*M:

    returns      calculate_per_token_loss   gradient of           "lm loss" reported
    "per_token"  True                       sum S_i / sum n_i     sum S_i / sum n_i
    "per_token"  False                      mean(S_i / n_i)       sum S_i / sum n_i
    "mean"       False                      mean(S_i / W_i)       mean over M of (sum_D S / sum_D W)
    "mean"       True                       refused: summed over D where it should be averaged

**Only the first row is the token-weighted mean of the global batch.** The others are means of
means: a token of a micro-batch with few scored tokens weighs more than one among many. Context
parallelism leaves rows one and three as they are; in row two n_i is then that of a shard.

For megatron-core >= 0.13 (reports of two numbers); tested on 0.16.1. Nothing here imports Megatron:
what has not been imported has not been initialised either.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from .api import Options, loss_terms, token_metrics, weighted_mean

BATCH_KEYS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask", "cu_seqlens")


def sft_loss_func(
    labels,
    loss_mask,
    output_tensor,
    *,
    returns="per_token",
    non_loss_data=False,
    config=None,
    tp_group="megatron",
    **options,
):
    """The masked next-token loss of one micro-batch, in the tuple Megatron's schedules expect.

    Args:
        labels: [b, s] integer, global token ids; unshifted (the input ids) unless `shift=False`.
        loss_mask: [b, s] bool, integer or float >= 0, aligned with `labels`; None scores all.
        output_tensor: [b, s, V/tp] bf16, fp16 or fp32, from the model called without labels.
        returns: "per_token" or "mean", see below and the table above.
        non_loss_data: set by the schedule under `collect_non_loss_data=True`.
        config: the model's TransformerConfig, so that a `returns` that contradicts it is refused;
            `make_forward_step` gives it. None: Megatron-LM's global arguments if there are any,
            else nothing is checked, for a schedule does not tell its loss_func the config.
        tp_group: the group the vocabulary is sharded over. "megatron": its tensor-parallel group
            once `parallel_state` is initialised. None: the logits are whole
            (`parallel_output=False`). Whole and sharded logits look alike here: with `vocab_size`
            given a mix-up is an error, without it the loss is off by about log(tp).
        **options: those of `sft_loss` but `reduction`: shift, layout, cu_seqlens, ignore_index,
            label_smoothing, z_loss, softcap, logit_scale, vocab_size, vocab_start,
            inplace_backward, backend.

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
            labels None; and what `sft_loss` raises.
        TypeError: `reduction` given, and what `sft_loss` raises.
    """
    _check_run(returns, config, options)
    if labels is None:
        raise ValueError(
            "labels: expected [b, s] token ids, got None. Megatron's get_batch gives None on "
            "middle pipeline stages; this is the last one, where the loss is: load them here too"
        )
    options["tp_group"] = _vocab_group(tp_group)
    if non_loss_data:
        options.pop("inplace_backward", None)
        return token_metrics(output_tensor, labels, loss_mask, **options)._asdict()
    terms = loss_terms(output_tensor, labels, loss_mask, Options(**options))
    loss_sum = terms.losses.sum()
    if returns == "mean":
        return _mean(loss_sum, terms.weight_sum)
    # stack copies: a report in the loss's memory would be divided along with it.
    report = torch.stack([loss_sum.detach(), terms.count.to(loss_sum.dtype)])
    return loss_sum, terms.count, {"lm loss": report}


def make_forward_step(get_batch, **options):
    """A Megatron `forward_step(data_iterator, model)` training on the masked next-token loss.

    The model is called without labels, and a Float16Module that can (megatron-core >= 0.15) is told
    not to cast the logits to fp32, a copy of twice their size. Logits as wide as the model's
    vocabulary are taken as whole, narrower ones as sharded over Megatron's tensor-parallel group.

    Args:
        get_batch: `get_batch(data_iterator) -> dict`, called on every pipeline stage, with
            tokens          [b, s] int64, the input ids
            position_ids    [b, s] int64
            attention_mask  what the model's attention takes, or None
            loss_mask       [b, s], which tokens count as predictions; absent or None: all
            labels          [b, s]; absent: `tokens`, which needs `shift=True` (the default)
            cu_seqlens      [k+1], document boundaries for the loss; absent or None: none
            Each may be None on a stage that does not need it. Labels that come shifted, as from
            Megatron's GPTDataset, go with `shift=False`, and with a mask shifted like them.
        **options: those of `sft_loss_func` but `config`.

    Raises, on every stage and before the model runs: what `sft_loss_func` raises about the run;
    TypeError or ValueError for a batch of another form.
    """

    def forward_step(data_iterator, model):
        config = _attribute(model, "config")
        _check_run(options.get("returns", "per_token"), config, options)
        batch = _checked(get_batch(data_iterator), options.get("shift", True))
        inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
        output = model(*inputs, **({"fp32_output": False} if _can_keep_dtype(model) else {}))
        known = {"config": config, "cu_seqlens": batch.get("cu_seqlens")}
        if output.size(-1) == _attribute(model, "vocab_size"):
            known["tp_group"] = None
        loss_func = partial(sft_loss_func, batch["labels"], batch.get("loss_mask"))
        return output, partial(loss_func, **{**known, **options})

    return forward_step


def _mean(loss_sum, weight_sum):
    """The tuple of returns="mean" from this rank's sums (fp32 0-d; weight_sum is overwritten)."""
    parallel = _parallel_state()
    report = torch.stack([loss_sum.detach(), weight_sum])
    if parallel is not None:
        _all_reduce(report, parallel.get_data_parallel_group(with_context_parallel=True))
        _all_reduce(weight_sum, parallel.get_context_parallel_group())
    return weighted_mean(loss_sum, weight_sum), {"lm loss": weighted_mean(*report)}


def _all_reduce(tensor, group):
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)


def _check_run(returns, config, options):
    """Refuse what no batch can make right. Looks at the run alone, so all ranks raise alike."""
    if returns not in ("per_token", "mean"):
        raise ValueError(f"returns: expected 'per_token' or 'mean', got {returns!r}")
    if "reduction" in options:
        raise TypeError("reduction: not an option here: returns='per_token' sums, 'mean' averages")
    config = _training_args() if config is None else config
    if returns == "mean" and getattr(config, "calculate_per_token_loss", False):
        raise ValueError(
            "returns='mean' with calculate_per_token_loss=True: expected returns='per_token'. "
            "Megatron learns the number of tokens from a 3-tuple only; with this 2-tuple it is 0, "
            "and gradients are summed over data parallelism and never divided. "
            "Use returns='per_token', or set calculate_per_token_loss=False"
        )
    parallel = _parallel_state()
    cp = 1 if parallel is None else parallel.get_context_parallel_world_size()
    if cp > 1 and options.get("shift", True):
        raise ValueError(
            f"shift=True under context parallelism of size {cp}: expected labels shifted already. "
            "A rank holds two chunks of each sequence that are not neighbours, so the next token "
            "may be on another rank. Shift first, slice after: labels, loss_mask = "
            "shift_targets(labels, loss_mask), then get_batch_on_this_cp_rank, then shift=False"
        )


def _checked(batch, shift):
    """get_batch's dict, all required keys present and `labels` filled in."""
    names = ", ".join(BATCH_KEYS)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"get_batch: expected a dict of {names}, got {type(batch).__name__}. Megatron's own "
            "get_batch returns a tuple whose order differs between versions: name its parts"
        )
    missing = [key for key in BATCH_KEYS[:3] if key not in batch]
    unknown = [key for key in batch if key not in BATCH_KEYS]
    if missing or unknown:
        raise ValueError(
            f"get_batch: expected a dict of {names}; missing {missing}, unknown {unknown}"
        )
    if "labels" in batch:
        return batch
    if not shift:
        raise ValueError(
            "get_batch: expected 'labels' with shift=False, got none. Unshifted tokens as labels "
            "would teach the model to copy its input: give shifted labels, or leave shift=True"
        )
    return {**batch, "labels": batch["tokens"]}


def _vocab_group(tp_group):
    """The group whose ranks hold the vocabulary's shards, or None for a whole vocabulary."""
    if tp_group != "megatron":
        return tp_group
    parallel = _parallel_state()
    return None if parallel is None else parallel.get_tensor_model_parallel_group()


def _parallel_state():
    """megatron.core.parallel_state, or None where it is not initialised."""
    parallel = sys.modules.get("megatron.core.parallel_state")
    return parallel if parallel is not None and parallel.model_parallel_is_initialized() else None


def _training_args():
    """Megatron-LM's global arguments, which hold the config's fields, or None outside its runs."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    try:
        return None if global_vars is None else global_vars.get_args()
    except AssertionError:  # not initialised
        return None


def _wrapped(model):
    """The model, then what it wraps: DistributedDataParallel, Float16Module, GPTModel."""
    while model is not None:
        yield model
        model = getattr(model, "module", None)


def _attribute(model, name):
    """The first `name` that is not None on the model or in its wrappings, else None."""
    values = (getattr(part, name, None) for part in _wrapped(model))
    return next((value for value in values if value is not None), None)


def _can_keep_dtype(model):
    return any("fp32_output" in inspect.signature(m.forward).parameters for m in _wrapped(model))
