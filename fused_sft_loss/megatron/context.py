"""fused_cross_entropy: a context in which a model computes its losses with this package."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn import Module

from ..options import Options
from .protocols import LossMask
from .replaced_loss import Head, ReplacedLoss

#: Options of `sft_loss` that follow from the model. fused_cross_entropy takes the others.
OF_MODEL = ("shift", "layout", "cu_seqlens", "tp_group", "vocab_start")
ALLOWED = tuple(name for name in vars(Options()) if name not in OF_MODEL)


@contextmanager
def fused_cross_entropy(
    model: Module | list[Module],
    *,
    loss_mask: LossMask = None,
    head: Head | None = None,
    **options: Any,
) -> Iterator[None]:
    """A context manager in which `model(..., labels=labels)` computes its losses with this package.

    Use it with trainers that call the model with labels: Megatron-LM's pretrain_gpt.py, Primus,
    Megatron-Bridge::

        with fused_cross_entropy(model):
            output_tensor, loss_func = forward_step(data_iterator, model)

    The model returns the same [b, s] fp32 losses, computed from the logits without a copy. Backward
    may run outside the context. Megatron still computes the losses of multi-token prediction. A
    call without labels returns logits as before. Contexts may be nested; the innermost one counts.
    A schedule plan (`overlap_moe_expert_parallel_comm`) that is built inside the context computes
    these losses when it runs.

    Args:
        model: a GPTModel or another LanguageModule, wrapped (Float16Module, DDP) or not, or a
            vision-language model that holds one as `language_model`; or a list of model chunks.
        loss_mask: [b, s]: positions with 0 are not read and have loss 0. None: the loss_mask that
            the model is called with, if any. The mask selects and does not weigh, because the
            trainer multiplies by it. A function without arguments that returns one of these is
            called in each forward of the model with labels: for a trainer that loads its batch in
            its forward step.
        head: a `ResponseOnlyHead` or a `LinearHead`; None: logits of all positions.
        **options: those of `sft_loss` except `reduction`, and except `shift`, `layout`,
            `cu_seqlens`, `tp_group` and `vocab_start`, which follow from the model. Labels are not
            shifted: Megatron's datasets have shifted them already.

    Raises:
        TypeError: the model has no compute_language_model_loss; an unknown option; a loss_mask()
            that is no tensor.
        ValueError: in the model's forward: what `sft_loss` raises.
        NotImplementedError: the whole model is under torch.compile or checkpoint_wrapper (its
            layers may be); before megatron-core 0.18 `model.build_schedule_plan` is called in the
            context.
    """
    unknown = sorted(set(options) - set(ALLOWED))
    if {"returns", "reduction"} & set(unknown):
        raise TypeError(
            f"fused_cross_entropy: expected no {unknown}: the trainer's own loss_func adds up the "
            "losses and divides them by a number of tokens. Use make_forward_step(get_batch, "
            "in_place=True, returns=...), for samples that weigh alike returns='per_sample'"
        )
    if unknown:
        raise TypeError(f"fused_cross_entropy: unknown options {unknown}; expected {ALLOWED}")
    with ExitStack() as stack:
        for chunk in model if isinstance(model, list | tuple) else [model]:
            given = {"shift": False, **options}
            replaced = ReplacedLoss(chunk, loss_mask, head, given, weigh=False)
            stack.enter_context(replaced.installed())
        yield
