"""Two Megatron runs from the same weights on the same batches, one step of each in turn."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .. import megatron_cpu
from ..ranks import send_to_parent
from ..reference import make_reference_forward_step
from .stage import LossStage


@dataclass(frozen=True)
class Settings:
    tp: int
    layers: int
    hidden: int
    heads: int
    vocab: int
    seq_length: int
    learning_rate: float
    warmup: int  # steps
    inplace: bool
    seed: int
    threads: int  # of each rank


def run(settings, batches):
    """In every rank of run_ranks(settings.tp, ...): train both, return {name: result of `_Run`}."""
    megatron_cpu.init(tp=settings.tp)
    runs = {name: _Run(step, settings) for name, step in _forward_steps(settings).items()}
    for name, this in runs.items():
        this.rehearse(batches[0])
        _tell({"rehearsed": name})
    for number, batch in enumerate(batches):
        for this in runs.values():
            this.train(batch, number)
        _tell({"step": number, **{name: this.losses[-1] for name, this in runs.items()}})
    return {name: this.result() for name, this in runs.items()}


def _forward_steps(settings):
    from fused_sft_loss.megatron import make_forward_step

    return {
        "reference": make_reference_forward_step(next),
        "ours": make_forward_step(next, inplace_backward=settings.inplace),
    }


def _tell(message):
    if dist.get_rank() == 0:
        send_to_parent(message)


class _Run:
    """A model, its optimizer and its loss, stepped by Megatron's own schedule."""

    def __init__(self, forward_step, settings):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        config = megatron_cpu.config(
            dtype=torch.bfloat16,
            num_layers=settings.layers,
            hidden_size=settings.hidden,
            num_attention_heads=settings.heads,
        )
        self.model = megatron_cpu.build_model(
            config,
            settings.vocab,
            settings.seq_length,
            seed=settings.seed,
            share_embeddings_and_output_weights=True,
        )
        self.stage = LossStage()
        self.forward_step = self.stage.watch(forward_step)
        self.schedule = get_forward_backward_func()
        self.optimizer = _MasterAdamW(self.model.parameters(), settings)
        self.losses, self.step_seconds = [], []

    def forward_backward(self, batch):
        """One micro-batch through the schedule; the "lm loss" it reports, as a float."""
        reports = self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=iter([batch.for_megatron()]),
            model=[self.model],
            num_microbatches=1,
            seq_length=batch.tokens.size(1),
            micro_batch_size=batch.tokens.size(0),
            forward_only=False,
        )
        report = reports[0]["lm loss"]
        # Megatron's two report forms: (sum, count), or the mean itself.
        return (report[0] / report[1]).item() if report.numel() == 2 else report.item()

    def rehearse(self, batch):
        """Record the memory of the loss stage; the weights stay, and what is lazy is warm after."""
        self.stage.record(lambda: self.forward_backward(batch))
        self.model.zero_grad(set_to_none=True)

    def train(self, batch, number):
        start = time.perf_counter()
        self.losses.append(self.stage.time(lambda: self.forward_backward(batch)))
        self.optimizer.step(number)
        self.step_seconds.append(time.perf_counter() - start)

    def result(self):
        return {
            "losses": self.losses,
            "stage_seconds": self.stage.seconds,
            "step_seconds": self.step_seconds,
            "memory": self.stage.memory,
            "logits": self.stage.logits,
        }


class _MasterAdamW:
    """AdamW on fp32 copies of bf16 weights, as Megatron's mixed-precision optimizer keeps them.

    Megatron's own refuses CPU tensors.
    """

    def __init__(self, parameters, settings):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.master = [p.detach().float().clone() for p in self.parameters]
        self.rate, self.warmup = settings.learning_rate, settings.warmup
        self.adamw = torch.optim.AdamW(self.master, lr=self.rate, weight_decay=0.0, fused=True)

    def step(self, number):
        """Step `number` (from 0) with linear warm-up; clears the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = self.rate * min(1.0, (number + 1) / self.warmup)
        for parameter, master in zip(self.parameters, self.master, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.master, strict=True):
                parameter.copy_(master)
                master.grad = None
