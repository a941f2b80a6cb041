"""Checks that raise on every rank, before any rank waits for another in a collective."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import agreement, groups
from ..options import Options
from ..scoring import may_synchronise
from . import global_state, wrappers
from .protocols import ParallelState
from .reports import FIGURES, RETURNS, Convention

BATCH_KEYS = ("tokens", "position_ids", "attention_mask")
OPTIONAL_BATCH_KEYS = ("labels", "loss_mask", "cu_seqlens", "packed_seq_params")

Result = TypeVar("Result")


def run(convention: Convention, config: Any, options: Mapping[str, Any]) -> None:
    """Check the configuration, not the batch, so that every rank raises the same error."""
    _convention(convention)
    if "reduction" in options:
        raise TypeError(
            "reduction: not an option here: returns='per_token' sums, 'mean' averages, and "
            "'per_sample' is \"sample_mean\""
        )
    config = global_state.training_args() if config is None else config
    if convention.returns == "mean" and getattr(config, "calculate_per_token_loss", False):
        raise ValueError(
            "returns='mean' with calculate_per_token_loss=True: expected returns='per_token'. "
            "Megatron takes the number of tokens from a 3-tuple. From this 2-tuple it takes 0, so "
            "it sums gradients over data parallelism and never divides them. "
            "Use returns='per_token', or set calculate_per_token_loss=False"
        )
    cp = global_state.context_parallel_size()
    if cp > 1 and convention.per_sample and not getattr(config, "calculate_per_token_loss", False):
        raise ValueError(
            f"returns='per_sample' under context parallelism of size {cp}: expected "
            "calculate_per_token_loss=True. Otherwise each rank divides its parts of samples by "
            "the number that it returns, but the ranks hold the same samples. Set it, and pass "
            "config=model.config to sft_loss_func"
        )
    if cp > 1 and options.get("shift", Options.shift):
        raise ValueError(
            f"shift=True under context parallelism of size {cp}: expected shifted labels. "
            "A rank holds two chunks of each sequence that are not neighbours, so the next token "
            "may be on another rank. Shift first, slice after: labels, loss_mask = "
            "shift_targets(labels, loss_mask) (for packed documents shift_packed_targets), then "
            "get_batch_on_this_cp_rank, then shift=False"
        )


def _convention(convention: Convention) -> None:
    if convention.returns not in RETURNS:
        raise ValueError(f"returns: expected one of {RETURNS}, got {convention.returns!r}")
    names = ("lm loss", *FIGURES)
    report: Any = convention.report
    if isinstance(report, str) or not set(report) <= set(names):
        raise ValueError(f"report: expected a tuple of {names}, got {report!r}")
    count: Any = convention.num_tokens
    if count is None:
        return
    if convention.returns == "mean":
        raise ValueError("num_tokens: expected None with returns='mean', which returns no count")
    if convention.per_sample:
        raise ValueError(
            "num_tokens: expected None with returns='per_sample', which returns a number of samples"
        )
    if not isinstance(count, Tensor) or count.dim() or count.dtype not in (torch.int, torch.long):
        got = f"{list(count.shape)} {count.dtype}" if isinstance(count, Tensor) else repr(count)
        raise TypeError(
            f"num_tokens: expected a 0-d int32 or int64 tensor, got {got}. Megatron adds it to an "
            "integer total on the device; a float or a Python number fails there. "
            "Use loss_mask.sum().to(torch.int)"
        )


def batch(given: object, shift: bool, last_stage: bool) -> Mapping[str, Any]:
    """The dict that get_batch returned, checked and with `labels` filled in."""
    keys = BATCH_KEYS + OPTIONAL_BATCH_KEYS
    names = ", ".join(keys)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"get_batch: expected a dict of {names}, got {type(given).__name__}. Megatron's own "
            "get_batch returns a tuple whose order differs between versions: name its parts"
        )
    missing = [key for key in BATCH_KEYS if key not in given]
    unknown = [key for key in given if key not in keys]
    if missing or unknown:
        raise ValueError(
            f"get_batch: expected a dict of {names}; missing {missing}, unknown {unknown}"
        )
    if "labels" not in given:
        if not shift:
            raise ValueError(
                "get_batch: expected 'labels' with shift=False, got none. Unshifted tokens as "
                "labels would teach the model to copy its input: return shifted labels, or leave "
                "shift=True"
            )
        given = {**given, "labels": given["tokens"]}
    elif shift:
        _not_shifted(given["tokens"], given["labels"])
    if last_stage:
        labels_here(given["labels"])
    return given


def _not_shifted(tokens: Tensor | None, labels: Tensor | None) -> None:
    """Raise ValueError if the host may read values, and every label is the next token already."""
    if tokens is None or labels is None or not may_synchronise(labels):
        return
    if labels.shape != tokens.shape or labels.dim() != 2:
        return
    label, own, following = labels[:, :-1], tokens[:, :-1], tokens[:, 1:]
    ignored = label < 0
    if ((label == following) | ignored).all() and not ((label == own) | ignored).all():
        raise ValueError(
            "get_batch: expected labels that are not shifted, got labels[:, t] == tokens[:, t + 1]."
            " Pass shift=False, and a loss_mask that is shifted in the same way; or leave 'labels' "
            "out, so that the tokens are the labels"
        )


def labels_here(labels: Tensor | None) -> Tensor:
    """The labels. Raise ValueError if the stage that computes the loss has none."""
    if labels is None:
        raise ValueError(
            "labels: expected [b, s] token ids, got None. Megatron's get_batch returns None on "
            "middle pipeline stages; this is the last one, where the loss is computed: load the "
            "labels here too"
        )
    return labels


def vocab_group(
    options: Mapping[str, Any], columns: int | None = None, vocabulary: int | None = None
) -> ProcessGroup | None:
    """The group whose ranks hold the vocabulary's shards, or None for a whole vocabulary.

    options: of the loss. tp_group is "megatron" if absent, or what `sft_loss` takes; vocab_start
    allows uneven shards. columns: the logits' width; vocabulary: the model's padded vocabulary
    size. None: not known yet.
    """
    group, placed = options.get("tp_group", "megatron"), options.get("vocab_start") is not None
    parallel = global_state.parallel_state()
    if isinstance(group, str) and group == "megatron":
        whole = vocabulary is not None and columns == vocabulary
        group = None if parallel is None or whole else parallel.get_tensor_model_parallel_group()
    else:
        group = groups.process_group(group)
        if group is not None and parallel is not None and not placed:
            _is_megatrons(group, parallel)
    ranks = 1 if group is None else dist.get_world_size(group)
    if columns is None or vocabulary is None or placed:
        return group
    if columns * ranks != vocabulary:
        raise ValueError(
            f"expected {ranks} shards that add up to the model's vocabulary of {vocabulary}, got "
            f"{ranks} x {columns} columns: tp_group is not the group that shards it. Leave "
            "tp_group out, or give None for gathered logits"
        )
    return group


def _is_megatrons(group: ProcessGroup, parallel: ParallelState) -> None:
    """Raise ValueError unless Megatron shards the vocabulary over this group."""
    mine = dist.get_process_group_ranks(group)
    tensor = dist.get_process_group_ranks(parallel.get_tensor_model_parallel_group())
    if mine != tensor:
        raise ValueError(
            f"tp_group: expected Megatron's tensor-parallel group of ranks {tensor}, got ranks "
            f"{mine}. Leave tp_group out; for shards of another group pass vocab_start"
        )


def schedule_plan(model: object, what: str) -> None:
    """Raise NotImplementedError unless the model's schedule plan takes an output_processor."""
    build = getattr(model, "build_schedule_plan", None)
    if build is not None and "output_processor" in inspect.signature(build).parameters:
        return
    raise NotImplementedError(
        f"{what}: expected a build_schedule_plan that takes output_processor, as GPTModel has it "
        f"from megatron-core 0.18 on, got {type(model).__name__} without it. Its plan would "
        f"compute Megatron's loss when {what} has ended. Update megatron-core, set "
        f"overlap_moe_expert_parallel_comm=False, or leave {what} out"
    )


def not_wrapped(module: object, what: str) -> None:
    """Raise NotImplementedError for a module that torch.compile or checkpoint_wrapper wraps.

    Compiled code does not call the replaced methods, and a checkpoint calls them too late.
    """
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    inside = wrappers.submodules(module)
    if compiled or wrappers.COMPILED in inside:
        raise NotImplementedError(
            f"expected {what} itself, got one under torch.compile ({type(module).__name__}): "
            "compiled code does not see that its loss is replaced. Compile the layers: "
            "for layer in model.decoder.layers: layer.compile()"
        )
    if wrappers.CHECKPOINTED in inside:
        raise NotImplementedError(
            f"expected {what} itself, got one under checkpoint_wrapper ({type(module).__name__}): "
            "backward computes it again, when its loss is no longer replaced. Wrap the layers: "
            "model.decoder.layers[i] = checkpoint_wrapper(model.decoder.layers[i])"
        )


def plain_output_layer(layer: Any) -> None:
    """Raise NotImplementedError unless the output layer computes hidden @ weight.T + bias alone."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if getattr(type(layer), "forward", None) is not ColumnParallelLinear.forward:
        raise NotImplementedError(
            f"LinearHead: expected Megatron's ColumnParallelLinear as output layer, got {kind}, "
            "whose own forward (an adapter, 8-bit products) would be left out. Use "
            "ResponseOnlyHead, which calls it"
        )
    for name, plain in (
        ("explicit_expert_comm", False),
        ("disable_grad_reduce", False),
        ("gtp_remat_size", 1),
    ):
        if getattr(layer, name, plain) != plain:
            raise NotImplementedError(
                f"LinearHead: expected an output layer with {name}={plain}, got "
                f"{getattr(layer, name)}; use ResponseOnlyHead"
            )


def agreed(
    check: Callable[[], Result],
    group: ProcessGroup | None,
    batch_of: Callable[[Result], Mapping[str, Tensor | None]],
) -> Result:
    """`check()`, or an error on every rank that shares the vocabulary.

    All of them raise if `check()` raises on one of them, or if their batches differ. It is for
    checks before the model runs, because the model runs collectives itself.

    batch_of: `batch_of(result) -> dict` of the tensors that must be equal, or None.
    """

    def facts(result: Result) -> dict[str, Any]:
        return {name: agreement.fingerprint(value) for name, value in batch_of(result).items()}

    return agreement.agreed(check, group, facts)
