"""Promise: neither pass reads a row that is not scored. The test makes its memory unreadable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import ON_CPU
from tiers import sampled_runs

# A row is one page of bf16. Rows are unscored by weight or by label.
PROGRAM = """
import ctypes, mmap, sys
import torch, fused_sft_loss as fsl
from backends import using
from fused_sft_loss.backends import selection

ROWS, V = 24, mmap.PAGESIZE // 2
name, threads, read_one = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "read"
torch.set_num_threads(threads)
memory = mmap.mmap(-1, ROWS * mmap.PAGESIZE)
logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(1, ROWS, V)
logits.copy_(torch.randn(1, ROWS, V))
labels, mask = torch.randint(0, V, (1, ROWS)), torch.ones(1, ROWS)
mask[0, 1::3] = 0
labels[0, 2] = -100
unread = [row for row in range(ROWS) if mask[0, row] == 0 or row == 2]
small = logits.clone()
temperature = torch.rand(1, ROWS) + 0.5

def run(x):
    leaf = x.detach().requires_grad_()
    with using(name) as backend:
        losses = fsl.sft_loss(leaf, labels, mask, shift=False, reduction="none", backend=backend)
        metrics = fsl.token_metrics(x, labels, mask, shift=False, backend=backend)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        both = fsl.token_logprobs(leaf, labels, mask, temperature=temperature,
                                  return_entropy=True, shift=False, backend=backend)
        of_both = torch.autograd.grad(sum(both).sum(), leaf)
    results = [losses.detach(), grad, *metrics, *(x.detach() for x in both), *of_both]
    if name.partition("-")[0] in selection.ONE_READ:
        with using(name) as backend:
            losses = fsl.sft_loss(leaf, labels, mask, shift=False, reduction="none",
                                  grad_in_forward=2.0, backend=backend)
            results += [losses.detach(), *torch.autograd.grad(losses.sum(), leaf)]
    return results

want = run(small)
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
for row in unread:
    assert protect(logits.data_ptr() + row * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
if read_one:
    logits[0, unread[0], 0].item()
for got, wanted in zip(run(logits), want, strict=True):
    assert torch.equal(got, wanted)
print("not read:", len(unread))
"""

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    paths = [str(ROOT / "tests/support"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")

#: eager on an accelerator reads all rows, as documented.
NAMES = [name for name in ON_CPU if name != "eager-accelerator"]


RUNS = [(threads, name) for threads in ("1", "8") for name in NAMES]  # whole rows; split rows


@pytest.mark.parametrize(
    ("threads", "name"),
    sampled_runs(RUNS, lambda run: run[0] == "1" and "baseline" not in run[1]),
)
def test_rows_without_weight_are_not_read(name, threads):
    done = run(name, threads, "leave")
    assert done.returncode == 0 and done.stdout == "not read: 9\n", done.stderr


@pytest.mark.parametrize("name", NAMES[:1])
def test_reading_an_unreadable_row_is_fatal(name):
    assert run(name, "1", "read").returncode < 0
