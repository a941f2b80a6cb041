"""Wrong use inside Megatron: found on every rank, before anything is waited for."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .. import agreement, groups
from . import versions
from .reports import FIGURES

BATCH_KEYS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask", "cu_seqlens")
BATCH_KEYS += ("packed_seq_params",)


def run(convention, config, options):
    """Refuse what no batch can make right. Looks at the run alone, so all ranks raise alike."""
    _convention(convention)
    if "reduction" in options:
        raise TypeError("reduction: not an option here: returns='per_token' sums, 'mean' averages")
    config = versions.training_args() if config is None else config
    if convention.returns == "mean" and getattr(config, "calculate_per_token_loss", False):
        raise ValueError(
            "returns='mean' with calculate_per_token_loss=True: expected returns='per_token'. "
            "Megatron learns the number of tokens from a 3-tuple only; with this 2-tuple it is 0, "
            "and gradients are summed over data parallelism and never divided. "
            "Use returns='per_token', or set calculate_per_token_loss=False"
        )
    parallel = versions.parallel_state()
    cp = 1 if parallel is None else parallel.get_context_parallel_world_size()
    if cp > 1 and options.get("shift", True):
        raise ValueError(
            f"shift=True under context parallelism of size {cp}: expected labels shifted already. "
            "A rank holds two chunks of each sequence that are not neighbours, so the next token "
            "may be on another rank. Shift first, slice after: labels, loss_mask = "
            "shift_targets(labels, loss_mask) (of packed documents: shift_packed_targets), then "
            "get_batch_on_this_cp_rank, then shift=False"
        )


def _convention(convention):
    if convention.returns not in ("per_token", "mean"):
        raise ValueError(f"returns: expected 'per_token' or 'mean', got {convention.returns!r}")
    names = ("lm loss", *FIGURES)
    if isinstance(convention.report, str) or not set(convention.report) <= set(names):
        raise ValueError(f"report: expected a tuple of {names}, got {convention.report!r}")
    count = convention.num_tokens
    if count is None:
        return
    if convention.returns == "mean":
        raise ValueError("num_tokens: expected None with returns='mean', which returns no count")
    if not isinstance(count, Tensor) or count.dim() or count.dtype not in (torch.int, torch.long):
        got = f"{list(count.shape)} {count.dtype}" if isinstance(count, Tensor) else repr(count)
        raise TypeError(
            f"num_tokens: expected a 0-d int32 or int64 tensor, got {got}. Megatron adds it to an "
            "integer total on the device, which a float or a Python number breaks: "
            "use loss_mask.sum().to(torch.int)"
        )


def batch(batch, shift, last_stage):
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
    if "labels" not in batch:
        if not shift:
            raise ValueError(
                "get_batch: expected 'labels' with shift=False, got none. Unshifted tokens as "
                "labels would teach the model to copy its input: give shifted labels, or leave "
                "shift=True"
            )
        batch = {**batch, "labels": batch["tokens"]}
    if last_stage:
        labels_here(batch["labels"])
    return batch


def labels_here(labels):
    """Raise ValueError where the stage that computes the loss was given no labels."""
    if labels is None:
        raise ValueError(
            "labels: expected [b, s] token ids, got None. Megatron's get_batch gives None on "
            "middle pipeline stages; this is the last one, where the loss is: load them here too"
        )


def vocab_group(options, columns=None, vocabulary=None):
    """The group whose ranks hold the vocabulary's shards, or None for a whole vocabulary.

    options: of the loss; tp_group ("megatron" when absent, or what `sft_loss` takes) counts, and
    vocab_start, which allows uneven shards. columns: of the logits, and vocabulary: the model's
    padded one, where they are known.
    """
    group, placed = options.get("tp_group", "megatron"), options.get("vocab_start") is not None
    parallel = versions.parallel_state()
    if isinstance(group, str) and group == "megatron":
        whole = parallel is None or (vocabulary is not None and columns == vocabulary)
        group = None if whole else parallel.get_tensor_model_parallel_group()
    else:
        group = groups.process_group(group)
        if group is not None and parallel is not None and not placed:
            _is_megatrons(group, parallel)
    ranks = 1 if group is None else dist.get_world_size(group)
    if vocabulary is not None and not placed and columns * ranks != vocabulary:
        raise ValueError(
            f"expected {ranks} shards that add up to the model's vocabulary of {vocabulary}, got "
            f"{ranks} x {columns} columns: tp_group is not the group that shards it. Leave "
            "tp_group out, or give None for gathered logits"
        )
    return group


def _is_megatrons(group, parallel):
    """Raise ValueError for another group than the one that Megatron shards the vocabulary over."""
    mine = dist.get_process_group_ranks(group)
    tensor = dist.get_process_group_ranks(parallel.get_tensor_model_parallel_group())
    if mine != tensor:
        raise ValueError(
            f"tp_group: expected Megatron's tensor-parallel group of ranks {tensor}, got ranks "
            f"{mine}. Leave tp_group out; shards that are placed otherwise need vocab_start"
        )


def runs_as_it_is(module, what):
    """Raise NotImplementedError where other code than the module's forward runs, or runs later."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    inside = getattr(module, "__dict__", {}).get("_modules") or {}
    if compiled or versions.COMPILED in inside:
        raise NotImplementedError(
            f"expected {what} itself, got one under torch.compile ({type(module).__name__}): "
            "compiled code does not see that its loss is replaced. Compile the layers: "
            "for layer in model.decoder.layers: layer.compile()"
        )
    if versions.CHECKPOINTED in inside:
        raise NotImplementedError(
            f"expected {what} itself, got one under checkpoint_wrapper ({type(module).__name__}): "
            "backward computes it again, when its loss is no longer replaced. Wrap the layers: "
            "model.decoder.layers[i] = checkpoint_wrapper(model.decoder.layers[i])"
        )


def agreed(check, group, batch_of):
    """`check()`, unless it raises on any rank that shares the vocabulary, or the batch differs
    between them: then all of them raise. For what is checked before the model runs, which has
    collectives of its own.

    batch_of: `batch_of(result) -> dict` of tensors or None.
    """

    def facts(result):
        return {name: agreement.fingerprint(value) for name, value in batch_of(result).items()}

    return agreement.agreed(check, group, facts)
