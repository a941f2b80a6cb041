"""Promise: beyond the logits, forward needs O(N) bytes, backward one gradient, in place nothing."""

import re
from pathlib import Path

import pytest
import torch
from backends import BUILT

import fused_sft_loss as fsl
from bench.memory import MemoryRecord

B, S, V = 2, 64, 65536  # 16 MiB of bf16
LOGITS_BYTES = B * S * V * 2
SCRATCH = {
    "eager": 64 * 2**20,
    "cpu": 0,
}  # eager has a documented bound; native keeps vectors of N rows only
VECTORS = 64 * 2**10  # bytes: N rows of statistics, losses, targets


def peaks(backend, inplace, make_logits, grad_in_forward=False):
    """Bytes beyond the logits: peak in forward, held after forward, peak in backward."""
    labels = torch.randint(0, V, (B, S))
    mask = (torch.rand(B, S) < 0.7).float()
    with MemoryRecord() as record:
        logits = make_logits()
        logits.register_hook(lambda grad: record.mark("backward"))  # before autograd passes it on
        record.mark("begin")
        loss = fsl.sft_loss(
            logits,
            labels,
            mask,
            backend=backend,
            inplace_backward=inplace,
            grad_in_forward=grad_in_forward,
        )
        record.mark("forward")
        loss.backward()
    forward = record.usage("begin", "forward")
    return forward.peak, forward.held, record.usage("begin", "backward").peak


def owned():
    return torch.randn(B, S, V).bfloat16().requires_grad_() * 1


def transposed():
    return torch.randn(S, B, V).bfloat16().requires_grad_().mul(1).transpose(0, 1)


@pytest.mark.parametrize("make_logits", [owned, transposed])
@pytest.mark.parametrize("backend", BUILT)
def test_forward_holds_vectors_of_rows_only(backend, make_logits):
    forward, held, _ = peaks(backend, False, make_logits)
    assert forward <= SCRATCH[backend] + VECTORS
    assert held <= VECTORS


@pytest.mark.parametrize("make_logits", [owned, transposed])
@pytest.mark.parametrize("backend", BUILT)
def test_backward_holds_one_gradient(backend, make_logits):
    _, _, backward = peaks(backend, False, make_logits)
    assert LOGITS_BYTES <= backward <= LOGITS_BYTES + SCRATCH[backend] + VECTORS


@pytest.mark.parametrize("make_logits", [owned, transposed])
@pytest.mark.parametrize("backend", BUILT)
def test_in_place_backward_holds_nothing(backend, make_logits):
    _, _, backward = peaks(backend, True, make_logits)
    assert backward <= SCRATCH[backend] + VECTORS


@pytest.mark.skipif("cpu" not in BUILT, reason="needs the native kernels")
@pytest.mark.parametrize("make_logits", [owned, transposed])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("expect", [True, 0.5], ids=["as expected", "rescaled"])
def test_one_read_holds_one_gradient_or_nothing(make_logits, inplace, expect):
    gradient = 0 if inplace else LOGITS_BYTES
    forward, held, backward = peaks("cpu", inplace, make_logits, expect)
    assert gradient <= held <= forward <= gradient + VECTORS
    assert backward <= gradient + VECTORS


@pytest.mark.parametrize("shape", [(1, 4, 2**20), (1, 1, 2**24), (512, 8, 1024), (1, 3, 5_000_001)])
def test_eager_scratch_stays_under_64_mib(shape):
    """Many rows, one row of 2^24 columns (64 MiB in fp32), a width that no tile divides."""
    b, s, v = shape
    logits = torch.randn(shape).bfloat16().requires_grad_()
    labels = torch.randint(0, v, (b, s))
    options = {"softcap": 30.0, "label_smoothing": 0.1, "shift": False, "backend": "eager"}
    with MemoryRecord() as record:
        record.mark("begin")
        loss = fsl.sft_loss(logits, labels, **options)
        record.mark("forward")
        fsl.token_metrics(logits, labels, **options)
        record.mark("metrics")
        (grad,) = torch.autograd.grad(loss, logits)
        record.mark("backward")
    gradient = grad.numel() * 2
    del grad
    assert record.usage("begin", "forward").peak < 64 * 2**20
    assert record.usage("forward", "metrics").peak < 64 * 2**20
    assert record.usage("metrics", "backward").peak - gradient < 64 * 2**20


def advised(address):
    """Whether huge pages are advised at `address`; None if Linux does not tell."""
    inside = None
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return None


@pytest.mark.skipif("cpu" not in BUILT, reason="needs the native kernels")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux's")
@pytest.mark.parametrize("one_read", [False, True])
@pytest.mark.parametrize("rows", [2, 40])  # threads share rows; threads get whole rows
def test_pages_of_a_new_gradient_are_asked_for_at_once(one_read, rows):
    logits = torch.randn(1, rows, 2**23 // rows).bfloat16().requires_grad_()
    labels = torch.randint(0, 1000, (1, rows))
    loss = fsl.sft_loss(logits, labels, shift=False, backend="cpu", grad_in_forward=one_read)
    (grad,) = torch.autograd.grad(loss, logits)
    if advised(logits.data_ptr()) is None:
        pytest.skip("the kernel does not tell how memory is advised")
    assert advised(grad.data_ptr() + grad.numel())
