"""A small megatron-core GPTModel on this machine's CPU, for the Megatron examples."""

import os

import torch
import torch.distributed as dist

from bench.megatron_cpu import build_model, config, init

VOCAB, SEQ, BATCH = 256, 32, 2


def make_batches(count=2):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (count, BATCH, SEQ), generator=generator)
    positions = torch.arange(SEQ).expand(BATCH, SEQ).contiguous()
    loss_mask = (positions >= SEQ // 2).float()  # only the second half is scored
    same = {"position_ids": positions, "attention_mask": None, "loss_mask": loss_mask}
    return [{"tokens": part, **same} for part in tokens]


def run_schedule(forward_step, batches, tp=1, cp=1):
    """Forward and backward of all micro-batches; returns (model, summed loss, scored tokens)."""
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        dist.init_process_group("gloo")
    init(tp=tp, cp=cp)
    from megatron.core import distributed, pipeline_parallel

    cfg = config(
        calculate_per_token_loss=True,
        finalize_model_grads_func=distributed.finalize_model_grads,
    )
    ddp = distributed.DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = distributed.DistributedDataParallel(cfg, ddp, build_model(cfg, VOCAB, SEQ))
    schedule = pipeline_parallel.get_forward_backward_func()
    sizes = {"seq_length": SEQ, "micro_batch_size": len(batches[0]["tokens"])}
    sizes |= {"num_microbatches": len(batches), "forward_only": False}
    reports = schedule(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[model], **sizes
    )
    loss, tokens = sum(report["lm loss"] for report in reports).tolist()
    return model, loss, tokens
