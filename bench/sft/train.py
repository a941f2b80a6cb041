"""Train with each loss in Megatron: the same weights and batches, one step of each in turn."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import megatron_cpu
from ..clock import Clock
from ..ranks import send_to_parent
from ..reference import make_reference_forward_step
from .losses import IN_FP32, LINEAR, REVERSED
from .matmul import compute_in_fp32_without_instructions
from .shapes import Shape
from .stage import LossStage


@dataclass(frozen=True, kw_only=True)
class Settings(Shape):
    losses: tuple  # names, see losses.py
    device: str  # device type
    tp: int
    dp: int
    vocab: int
    seq_length: int
    learning_rate: float
    warmup: int  # steps
    inplace: bool
    seed: int
    threads: int  # of each rank


def run(settings, batches, tell=send_to_parent):
    """Train with all losses. Runs in each of the tp * dp ranks. Returns {name: result of `_Run`}.

    batches  of all data-parallel ranks: batches[step][rank]
    tell     called on rank 0 with the progress
    """
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        compute_in_fp32_without_instructions()
    parallel = megatron_cpu.init(tp=settings.tp)
    mine = [step[parallel.get_data_parallel_rank()] for step in batches]
    steps = _forward_steps(settings, device)
    runs = {name: _Run(name, steps[name], settings, device) for name in settings.losses}
    first = dist.get_rank() == 0
    for name, this in runs.items():
        this.rehearse(mine[0])
        if first:
            tell({"rehearsed": name})
    for number, batch in enumerate(mine):
        for this in runs.values():
            this.train(batch, number)
        if first:
            tell({"step": number, "losses": {n: this.losses[-1] for n, this in runs.items()}})
    return {name: this.result() for name, this in runs.items()}


def _forward_steps(settings, device):
    from fused_sft_loss.megatron import LinearHead, make_forward_step

    def get_batch(data_iterator):
        return next(data_iterator).for_megatron(device)

    def get_reversed(data_iterator):
        return next(data_iterator).reversed().for_megatron(device)

    return {
        "reference": make_reference_forward_step(get_batch),
        IN_FP32: make_reference_forward_step(get_batch),
        REVERSED: make_reference_forward_step(get_reversed),
        "ours": make_forward_step(get_batch, inplace_backward=settings.inplace),
        LINEAR: make_forward_step(get_batch, head=LinearHead()),
    }


class _Run:
    """A model, its optimizer and its loss. Megatron's own schedule runs the steps."""

    def __init__(self, name, forward_step, settings, device):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        dtype = torch.float32 if name == IN_FP32 else torch.bfloat16
        self.model = _model(settings, dtype).to(device)
        self.stage, self.clock = LossStage(device, has_logits=name != LINEAR), Clock(device)
        self.forward_step = self.stage.watch(forward_step)
        self.schedule = get_forward_backward_func()
        self.optimizer = _MasterAdamW(self.model.parameters(), settings)
        self.losses, self.step_seconds = [], []

    def forward_backward(self, batch):
        """Run one micro-batch through the schedule. Returns its reported "lm loss" as a float."""
        reports = self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=iter([batch]),
            model=[self.model],
            num_microbatches=1,
            seq_length=batch.tokens.size(1),
            micro_batch_size=batch.tokens.size(0),
            forward_only=False,
        )
        report = reports[0]["lm loss"]
        # A report is (sum, count) or the mean.
        return (report[0] / report[1]).item() if report.numel() == 2 else report.item()

    def rehearse(self, batch):
        """Record the memory of the loss stage, and warm up. The weights do not change."""
        self.stage.record(lambda: self.forward_backward(batch))
        self.model.zero_grad(set_to_none=True)

    def train(self, batch, number):
        self.clock.start()
        loss = self.stage.time(lambda: self.forward_backward(batch))
        self.optimizer.step(number)
        self.clock.mark()
        self.step_seconds += self.clock.intervals()
        self.losses.append(_averaged(torch.tensor(loss, dtype=torch.float64)).item())

    def result(self):
        return {
            "losses": self.losses,
            "stage_seconds": self.stage.seconds,
            "head_seconds": self.stage.head_seconds,
            "step_seconds": self.step_seconds,
            "memory": self.stage.memory,
            "logits": self.stage.logits,
        }


def _model(settings, dtype):
    """A GPTModel of these settings on the CPU. Its weights are bf16 numbers, in any dtype."""
    modern = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }
    config = megatron_cpu.config(
        dtype=dtype,
        num_layers=settings.layers,
        hidden_size=settings.hidden,
        ffn_hidden_size=settings.ffn,
        num_attention_heads=settings.heads,
        num_query_groups=settings.groups,
        kv_channels=settings.head_dim,
        **(modern if settings.gated else {}),
    )
    model = megatron_cpu.build_model(
        config,
        settings.vocab,
        settings.seq_length,
        seed=settings.seed,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope" if settings.gated else "learned_absolute",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def _averaged(tensor):
    """Replace a tensor by its mean over data-parallel ranks, and return it."""
    from megatron.core.parallel_state import get_data_parallel_group

    group = get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
        tensor /= group.size()
    return tensor


class _MasterAdamW:
    """AdamW on fp32 copies of bf16 weights, as Megatron's mixed-precision optimizer keeps them.

    Megatron's own optimizer refuses CPU tensors.
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
            master.grad = _averaged(parameter.grad.float())
            parameter.grad = None
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.master, strict=True):
                parameter.copy_(master)
                master.grad = None
