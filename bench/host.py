"""`python -m bench host`: the host's time for one call of the loss.

A GPU waits for its host when a step is small. Here the logits have a few hundred elements, and the
CPU uses one thread. So the measured time is that of Python, autograd and the calls of kernels. The
losses are interleaved. The 10th percentile excludes calls that other work on the machine delayed.
"""

import argparse
import time
from collections.abc import Callable

import torch

from .errors import need

BATCH, SEQ, VOCABULARY = 1, 8, 64
PERCENTILE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5000, help="timings of each loss")


def run(args: argparse.Namespace) -> None:
    need("rich")
    from rich.console import Console
    from rich.table import Table

    times = measured(args.rounds)
    table = Table(
        title=f"forward + backward of [{BATCH}, {SEQ}, {VOCABULARY}] fp32 logits, one thread"
    )
    table.add_column("loss")
    table.add_column("host time, us", justify="right")
    table.add_column("of the reference", justify="right")
    for name, microseconds in times.items():
        ratio = microseconds / times["reference"]
        table.add_row(name, f"{microseconds:.1f}", f"{ratio:.2f}x")
    Console().print(table)


def measured(rounds: int) -> dict[str, float]:
    """Microseconds of a training step of each loss, by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = _steps()
        times: dict[str, list[int]] = {name: [] for name in steps}
        for turn in range(rounds + rounds // 10):
            for name, step in steps.items():
                begin = time.perf_counter_ns()
                step()
                if turn >= rounds // 10:  # the first ones warm up
                    times[name].append(time.perf_counter_ns() - begin)
    finally:
        torch.set_num_threads(threads)
    return {
        name: sorted(taken)[int(PERCENTILE * len(taken))] / 1e3 for name, taken in times.items()
    }


def _steps() -> dict[str, Callable[[], None]]:
    from fused_sft_loss import sft_loss

    from .reference import reference_loss

    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(BATCH, SEQ, VOCABULARY, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (BATCH, SEQ), generator=generator)
    mask = torch.ones(BATCH, SEQ)

    def step(loss: Callable[..., torch.Tensor], **options) -> Callable[[], None]:
        def once() -> None:
            leaf.grad = None
            logits = leaf * 1.0  # like a model's output: not a leaf
            loss(logits, labels, mask, **options).backward()

        return once

    return {
        "reference": step(reference_loss),
        "ours": step(sft_loss),
        "ours, in place": step(sft_loss, inplace_backward=True),
        "ours, one read": step(sft_loss, grad_in_forward=True),
    }
