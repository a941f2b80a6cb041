"""Runs of real megatron-core, executed by the processes that `bench.ranks.run_ranks` starts.

A tiny GPTModel (fp32, learned positions, untied head) gets a few micro-batches of two sequences.
The unsharded model in float64 gives the gradient of each micro-batch alone. Each of Megatron's
conventions is a linear combination of these gradients, so one reference serves every case.
Does not import pytest, which would slow down the workers' start.
"""

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from bench.megatron_cpu import build_model, config, init, zigzag_positions
from fused_sft_loss import shift_targets
from fused_sft_loss.megatron import (
    LinearHead,
    ResponseOnlyHead,
    fused_cross_entropy,
    make_forward_step,
    sft_loss_func,
)
from fused_sft_loss.megatron.versions import context_parallel_slice

VOCAB, SEQ, BATCH, LAYERS = 64, 16, 2, 2
SHAPE = {"num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    """One run of the schedule."""

    returns: str = "per_token"
    calculate_per_token_loss: bool = False
    data: tuple = (0, 1, 2, 3)  # micro-batches to use: the first `each` * DP, repeated if too few
    each: int = 4  # micro-batches per data-parallel rank
    step: str = "make"  # key of STEPS: how forward_step is written
    dtype: torch.dtype = torch.float32
    gathered: bool = False  # parallel_output=False
    tied: bool = False  # the head shares the embedding's weight
    forward_only: bool = False
    non_loss: bool = False  # collect_non_loss_data=True
    options: dict = field(default_factory=dict)  # options of sft_loss

    def of(self, data_parallel):
        """Indices of the global batch's micro-batches, rank 0 first."""
        wanted = self.each * data_parallel
        return (self.data * wanted)[:wanted]


def micro_batches():
    """Unequal on purpose: many scored, few scored, none scored, weights that sum to 0.375, and all
    scored targets in the shard of rank 0 out of two context-parallel ranks.

    Each is a dict of tokens, position_ids [2, 16] int64, attention_mask None, loss_mask [2, 16].
    """
    generator = torch.Generator().manual_seed(7)
    masks = torch.zeros(5, BATCH, SEQ)
    masks[0] = (torch.rand(BATCH, SEQ, generator=generator) > 0.2).float()
    masks[1, 0, 5] = masks[1, 1, 9] = masks[1, 1, 10] = 1
    masks[1, :, 0] = 1  # the first token is never a target, so it must not be counted
    masks[3, 0, 4], masks[3, 1, 7] = 0.25, 0.125
    masks[4, 0, 2] = masks[4, 1, 14] = 1
    tokens = torch.randint(0, VOCAB, (5, BATCH, SEQ), generator=generator)
    positions = torch.arange(SEQ).expand(BATCH, SEQ).contiguous()
    parts = {"position_ids": positions, "attention_mask": None}
    return [{"tokens": t, "loss_mask": m, **parts} for t, m in zip(tokens, masks, strict=True)]


def reference(tied=False):
    """The unsharded model in one process, in float64: its weights (as fp32), and one part per
    micro-batch, computed with the reference loss of `bench.reference` in float64.

    A part has S = sum(w * loss), gradients by name, n scored tokens, W = sum(w) and logits. Its
    "shards" are the same for the positions of each of two context-parallel ranks, its "samples" for
    each sequence.
    """
    init()
    model = build_model(config(**SHAPE), VOCAB, SEQ, **TIED[tied]).double()
    weights = {name: p.detach().float() for name, p in model.named_parameters()}

    def part(batch, mask):
        logits = model(batch["tokens"], batch["position_ids"], None)
        scored = mask[:, 1:].double()
        losses = F.cross_entropy(logits[:, :-1].mT, batch["tokens"][:, 1:], reduction="none")
        total = (losses * scored).sum()
        grads = torch.autograd.grad(total, list(model.parameters()))
        sums = {"S": total.detach(), "n": int((scored != 0).sum()), "W": scored.sum()}
        return {
            **sums,
            "logits": logits.detach().float(),
            "grads": dict(zip(weights, grads, strict=True)),
        }

    def of_shard(mask, rank):
        """The mask, zero at labels that this rank's positions do not predict (one to the left)."""
        predicted = torch.zeros_like(mask)
        predicted[:, 1 + zigzag_positions(SEQ, 2, rank).clamp(max=SEQ - 2)] = 1
        return mask * predicted

    parts = []
    for batch in micro_batches():
        mask = batch["loss_mask"]
        shards = [part(batch, of_shard(mask, rank)) for rank in range(2)]
        alone = torch.eye(BATCH).unsqueeze(-1)
        samples = [part(batch, mask * one) for one in alone]
        parts.append({**part(batch, mask), "shards": shards, "samples": samples})
    return {"weights": weights, "parts": parts}


def train(weights, cases, tp=1, pp=1, cp=1, sp=False):
    """Run every case on a sharded model that holds `weights`; returns one dict per case:

    rank {"tp", "pp", "dp", "cp"}; collected (the schedule's result); logged (the "lm loss" that a
    training loop logs, or None on stages without it); grads {unsharded name: (main_grad,
    partition_dim or None)}.
    """
    parallel = init(tp, pp, cp)
    rank = {
        "tp": parallel.get_tensor_model_parallel_rank(),
        "pp": parallel.get_pipeline_model_parallel_rank(),
        "dp": parallel.get_data_parallel_rank(),
        "cp": parallel.get_context_parallel_rank(),
    }
    return [{"rank": rank, **run(case, weights, parallel, rank, sp)} for case in cases]


def run(case, weights, parallel, rank, sp):
    """Run one case: build, load, wrap in Megatron's DDP, call the schedule."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    model = wrapped_model(case, weights, rank, sp)
    dp, cp = parallel.get_data_parallel_world_size(), parallel.get_context_parallel_world_size()
    mine = case.of(dp)[rank["dp"] * case.each :][: case.each]
    mine = [copy.copy(micro_batches()[i]) for i in mine]
    options = {"returns": case.returns, **case.options}
    if cp > 1:
        mine = [context_shard(batch) for batch in mine]
        options["shift"] = False
    collected = get_forward_backward_func()(
        forward_step_func=STEPS[case.step](next, **options),
        data_iterator=iter(mine),
        model=[model],
        num_microbatches=len(mine),
        seq_length=SEQ,
        micro_batch_size=BATCH,
        forward_only=case.forward_only,
        collect_non_loss_data=case.non_loss,
    )
    grads = {
        global_name(name, rank["pp"], case.tied): (p.main_grad.clone(), shard_dim(p))
        for name, p in model.module.named_parameters()
    }
    last = parallel.is_pipeline_last_stage()
    logged = reduced_report(collected) if last and not case.non_loss else None
    return {"collected": collected, "logged": logged, "grads": grads}


def wrapped_model(case, weights, rank, sp):
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    cfg = config(
        case.dtype,
        **SHAPE,
        calculate_per_token_loss=case.calculate_per_token_loss,
        finalize_model_grads_func=finalize_model_grads,
        sequence_parallel=sp,
    )
    model = build_model(cfg, VOCAB, SEQ, **TIED[case.tied])
    if case.gathered and model.post_process:
        model.parallel_output, model.output_layer.gather_output = False, True
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights[global_name(name, rank["pp"], case.tied)]
            dim = shard_dim(parameter)
            size = 0 if dim is None else parameter.size(dim)
            parameter.copy_(whole if dim is None else whole.narrow(dim, rank["tp"] * size, size))
    in_fp32 = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(cfg, in_fp32, model)


def own_forward_step(get_batch, **options):
    """A user's own step: calls the model without labels, binds sft_loss_func to the batch."""

    def forward_step(data_iterator, model):
        batch = get_batch(data_iterator)
        output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
        labels = batch.get("labels", batch["tokens"])
        return output, partial(sft_loss_func, labels, batch["loss_mask"], **options)

    return forward_step


def trainers_forward_step(get_batch, *, returns, shift=True, head=None, **options):
    """A trainer's step: calls the model with labels, inside `fused_cross_entropy`."""

    def loss_func(loss_mask, output_tensor):
        losses, mask = output_tensor.view(-1).float(), loss_mask.view(-1).float()
        loss = torch.sum(losses * mask)
        count = mask.sum().clone().detach().to(torch.int)
        return loss, count, {"lm loss": torch.cat([loss.detach().clone().view(1), count.view(1)])}

    def forward_step(data_iterator, model):
        batch = get_batch(data_iterator)
        labels, mask = batch.get("labels", batch["tokens"]), batch["loss_mask"]
        if shift:
            labels, mask = shift_targets(labels, mask)
        inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
        with fused_cross_entropy(model, head=head, **options):
            output = model(*inputs, labels=labels, loss_mask=mask)
        return output, partial(loss_func, mask)

    return forward_step


STEPS = {
    "make": make_forward_step,
    "own": own_forward_step,
    "in_place": partial(make_forward_step, in_place=True),
    "head": partial(make_forward_step, head=ResponseOnlyHead()),
    "linear": partial(make_forward_step, head=LinearHead(chunk_rows=3)),
    "trainer": trainers_forward_step,
    "trainer_head": partial(trainers_forward_step, head=ResponseOnlyHead(multiple=8)),
    "trainer_linear": partial(trainers_forward_step, head=LinearHead(multiple=8)),
}
TIED = {False: {}, True: {"share_embeddings_and_output_weights": True}}


def context_shard(batch):
    """Shift first, then slice: this rank's chunks of the tokens and of the shifted targets."""
    labels, mask = shift_targets(batch["tokens"], batch["loss_mask"])
    return context_parallel_slice({**batch, "labels": labels, "loss_mask": mask})


def shard_dim(parameter):
    """The dimension that tensor parallelism splits, or None."""
    split = getattr(parameter, "tensor_model_parallel", False)
    return parameter.partition_dim if split and parameter.partition_dim >= 0 else None


def global_name(name, pp_rank, tied):
    """The name in the unsharded model. A stage numbers its layers from 0, and the last stage has a
    copy of a tied weight."""
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    name = name.removeprefix("module.")  # added by Float16Module
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    head, found, tail = name.partition("decoder.layers.")
    if not found:
        return name
    index, _, rest = tail.partition(".")
    return f"{head}{found}{int(index) + pp_rank * LAYERS // stages}.{rest}"


def whole_grads(ranks):
    """Unsharded gradients from the ranks of one replica: joins shards, compares copies."""
    pieces, seen = {}, {}
    for result in sorted(ranks, key=lambda r: r["rank"]["tp"]):
        for name, (grad, dim) in result["grads"].items():
            first = seen.setdefault((name, result["rank"]["tp"]), grad)
            if first is not grad:  # a tied weight has a copy on the first and on the last stage
                assert torch.equal(first, grad), f"{name} differs between its copies"
                continue
            pieces.setdefault(name, (dim, []))[1].append(grad)
    for name, (dim, grads) in pieces.items():
        if dim is None:
            assert all(torch.equal(grads[0], g) for g in grads), f"{name} differs between TP ranks"
    return {n: gs[0] if dim is None else torch.cat(gs, dim) for n, (dim, gs) in pieces.items()}


def reduced_report(reports):
    """The figure that a Megatron-LM training loop (0.13 and later) logs from "lm loss" reports.

    A report of two numbers is (sum, count): both are added over micro-batches and data (and
    context) parallel ranks, then divided. One number is only averaged over the micro-batches.
    """
    from megatron.core import parallel_state

    values = [report["lm loss"].view(-1) for report in reports]
    if values[0].numel() == 1:
        return torch.cat(values).mean()
    total = torch.vstack(values).sum(0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1]
