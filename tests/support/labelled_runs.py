"""Trainers on Megatron that call the model with labels: stand-ins, run with a real GPTModel.

A stand-in has the forward step of the trainer in words of its own: its convention for labels and
masks, its sum and its count. Does not import pytest, which would slow down the workers' start.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from stand_ins import fake_modules

from bench.megatron_cpu import build_model, config, init
from examples.small_run import BATCH, SEQ, VOCAB, run_schedule


def batches():
    """Two micro-batches of tokens [b, s + 1], and which of these tokens are scored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (2, BATCH, SEQ + 1), generator=generator)
    scored = torch.rand(tokens.shape, generator=generator) > 0.6
    scored[..., 0] = scored[..., -1] = False  # SwiftTrainer has no room for the last
    return [{"tokens": t, "scored": s} for t, s in zip(tokens, scored, strict=True)]


def inputs_of(batch):
    ids = batch["tokens"][:, :-1]
    positions = torch.arange(SEQ).expand(BATCH, SEQ).contiguous()
    return {"input_ids": ids, "position_ids": positions, "attention_mask": None}


class SwiftTrainer:
    """ms-swift's MegatronTrainer: rolls the labels, and passes no mask to the model."""

    def __init__(self, task_type="causal_lm"):
        self.args = SimpleNamespace(task_type=task_type)

    def forward_step(self, data_iterator, model):
        batch = next(data_iterator)
        labels = batch["tokens"].masked_fill(~batch["scored"], -100)[:, :-1].roll(-1, 1)
        if self.args.task_type == "seq_cls":
            return model(**inputs_of(batch)), None
        losses = model(**inputs_of(batch), labels=labels)
        return losses, partial(self.loss_func, labels=labels)

    def loss_func(self, output_tensor, *, labels):
        scored = labels != -100
        return summed(output_tensor.float() * scored, scored)


class McaTrainer:
    """mcore_adapter's: LLaMA-Factory's collator has shifted the labels; passes a mask."""

    def _inner_forward_step(self, data_iterator, model):
        batch = next(data_iterator)
        labels = batch["tokens"].masked_fill(~batch["scored"], -100)[:, 1:]
        mask = (labels != -100).float()
        losses = model(**inputs_of(batch), labels=labels, loss_mask=mask)
        return losses, lambda output: summed(output.view(-1) * mask.view(-1), mask)


def summed(losses, scored):
    total, count = losses.sum(), scored.sum()
    return total, count.to(torch.int), {"loss": torch.stack([total.detach().clone(), count])}


def swift_step(snippet, task_type="causal_lm"):
    fake_modules({"swift.megatron.trainers": {"MegatronTrainer": SwiftTrainer}})
    snippet.run({})
    return SwiftTrainer(task_type).forward_step


def llama_factory_step(snippet):
    started = []
    fake_modules(
        {
            "llamafactory.train.tuner": {"run_exp": lambda: started.append(True)},
            "mcore_adapter.trainer": {"McaTrainer": McaTrainer},
        }
    )
    snippet.run({})
    assert started == [True]
    return McaTrainer()._inner_forward_step


STEPS = {"ms swift": swift_step, "llama factory": llama_factory_step}


def trained(snippet, tp):
    """(loss, tokens, {parameter: (gradient, partition_dim or None)}, losses that are not 0)."""
    step, nonzero = STEPS[snippet.name](snippet), []

    def watched(data_iterator, model):
        losses, loss_func = step(data_iterator, model)
        nonzero.append(int((losses != 0).sum()))

        def renamed(output):
            *result, report = loss_func(output)
            return *result, {"lm loss": report["loss"]}

        return losses, renamed

    model, loss, tokens = run_schedule(watched, batches(), tp=tp)
    grads = {
        name: (p.main_grad, p.partition_dim if getattr(p, "tensor_model_parallel", False) else None)
        for name, p in model.module.named_parameters()
    }
    return loss, tokens, grads, sum(nonzero)


def in_float64():
    """The same by definition, of the unsharded model: (loss, tokens, {parameter: gradient})."""
    init()
    model = build_model(config(), VOCAB, SEQ).double()
    total, count = 0.0, 0
    for batch in batches():
        labels = batch["tokens"].masked_fill(~batch["scored"], -100)[:, 1:]
        logits = model(**inputs_of(batch))
        total = total + F.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(total / count, parameters)
    return total.item(), count, dict(zip(names, grads, strict=True))


def logits_of_another_task(snippet):
    """What ms-swift's step returns for another task, which calls the model without labels."""
    init()
    step = swift_step(snippet, "seq_cls")
    return step(iter(batches()), build_model(config(), VOCAB, SEQ))[0].detach()
