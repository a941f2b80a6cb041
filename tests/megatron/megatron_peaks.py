"""Peak memory of a training step's loss stage, in logits, for each way to call the loss.

The stage begins when the output layer has written the logits and ends when their gradient is known.
It includes the logits. It does not include the scratch that some processors need for the output
layer's matrix product. Imports no pytest.
"""

from functools import partial

import torch

from bench.megatron_cpu import build_model, config, init
from bench.memory import MemoryRecord
from bench.reference import make_reference_forward_step
from fused_sft_loss.megatron import ResponseOnlyHead, fused_cross_entropy, make_forward_step

VOCAB, SEQ, BATCH, SCORED = 32768, 64, 2, 0.25
LOGITS_BYTES = VOCAB * SEQ * BATCH * 2  # bf16


def megatrons_own(get_batch):
    """The model's own cross-entropy, as pretrain_gpt.py uses it."""

    def forward_step(data_iterator, model):
        batch = get_batch(data_iterator)
        inputs = batch["tokens"], batch["position_ids"], None
        losses = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
        return losses, lambda losses: ((losses * batch["loss_mask"]).sum(),)

    return forward_step


def inside_the_context(get_batch, **options):
    """The same trainer with its forward_step inside `fused_cross_entropy`."""
    own = megatrons_own(get_batch)

    def forward_step(data_iterator, model):
        with fused_cross_entropy(model, **options):
            return own(data_iterator, model)

    return forward_step


WAYS = {  # name, as in the docs: writes a forward_step
    "reference loss on the logits": make_reference_forward_step,
    "Megatron's own cross-entropy": megatrons_own,
    "(a) `make_forward_step`": make_forward_step,
    "(a) with `inplace_backward`": partial(make_forward_step, inplace_backward=True),
    "(b) `in_place=True`": partial(make_forward_step, in_place=True),
    "(b) with `inplace_backward`": partial(make_forward_step, in_place=True, inplace_backward=True),
    "(c) `fused_cross_entropy`": inside_the_context,
    "(c) with `inplace_backward`": partial(inside_the_context, inplace_backward=True),
    "(b) with `inplace_backward`, `ResponseOnlyHead`, 25% scored": partial(
        make_forward_step, head=ResponseOnlyHead(), inplace_backward=True
    ),
}


def measure():
    """{way: peak bytes of the stage / bytes of the logits [s, b, v] in bf16}."""
    init()
    model = build_model(
        config(torch.bfloat16, num_layers=1, hidden_size=32, num_attention_heads=4), VOCAB, SEQ
    )
    return {name: _peak(write(next), model) for name, write in WAYS.items()}


def _batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    mask = torch.zeros(BATCH * SEQ)
    mask[torch.randperm(BATCH * SEQ, generator=generator)[: int(SCORED * BATCH * SEQ)]] = 1
    positions = torch.arange(SEQ).expand(BATCH, SEQ).contiguous()
    batch = {"tokens": tokens, "position_ids": positions, "attention_mask": None}
    return {**batch, "labels": tokens, "loss_mask": mask.view(BATCH, SEQ)}


def _peak(forward_step, model):
    model.zero_grad(set_to_none=True)
    layer = model.module.output_layer
    with MemoryRecord() as record:
        handles = [
            layer.register_forward_pre_hook(lambda *_: record.mark("begin")),
            layer.register_forward_hook(lambda module, args, out: _written(out[0], record)),
        ]
        output, loss_func = forward_step(iter([_batch()]), model)
        loss_func(output)[0].backward()
    for handle in handles:
        handle.remove()
    return record.usage("logits", "end", base="begin").peak / LOGITS_BYTES


def _written(logits, record):
    record.mark("logits")
    logits.register_hook(lambda grad: record.mark("end"))
