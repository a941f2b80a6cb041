"""The backends on a GPU: the promises again, and those that only a GPU can show.

Skipped, and counted as skipped, on machines without one.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import DTYPES, Case, build, cases, expected, largest_term, run, storage_grad
from closeness import PRODUCT, assert_grad, assert_losses
from hypothesis import given, settings

import bench  # noqa: F401  finds the Triton kernels in a checkout that is not installed
import fused_sft_loss as fsl
from fused_sft_loss.backends import selection
from fused_sft_loss.backends.gpu import device_chip


def usable(name):
    """Skip a backend on a GPU of another vendor, or if its module is missing."""
    reason = selection.reason_against(name, "cuda") if torch.cuda.is_available() else None
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(name, marks=marks)


NAMES = [usable(name) for name in ("triton", "cuda", "hip")]
on_every_backend = pytest.mark.parametrize("backend", NAMES)
on_compiled_backends = pytest.mark.parametrize("backend", NAMES[1:])
pytestmark = pytest.mark.gpu

VOCABULARIES = (1, 2, 31, 32, 33, 1000, 32000, 50257, 128256, 151936)
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.5}


def on_device(case: Case, device="cuda") -> Case:
    """The case with its tensors moved to `device`. It takes the view of the storage there."""
    options = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in case.options.items()
    }
    mask = None if case.loss_mask is None else case.loss_mask.to(device)
    return replace(
        case,
        storage=case.storage.to(device),
        labels=case.labels.to(device),
        loss_mask=mask,
        options=options,
    )


@on_every_backend
@PRODUCT
@given(case=cases(vocabularies=VOCABULARIES))
def test_losses_and_gradients_over_the_option_product(backend, case):
    upstream = torch.rand(case.labels.numel(), generator=torch.Generator().manual_seed(0)) * 3 - 1
    want = expected(case, upstream)
    losses, grad = run(on_device(case), backend, upstream.cuda())
    assert_losses(losses.cpu(), want)
    if case.view != "batch_expanded":  # torch adds the copies' rounded gradients
        largest = largest_term(case, want, upstream)
        assert_grad(grad.cpu(), storage_grad(case, want.grad), case.storage.dtype, largest)


@on_every_backend
@settings(PRODUCT, max_examples=60)
@given(case=cases(dtypes=(torch.bfloat16, torch.float16), views=("bsv", "sbv", "sliced", "offset")))
def test_gradient_is_the_fp32_gradient_rounded_once(backend, case):
    case = on_device(case)
    losses, grad = run(case, backend)
    losses32, grad32 = run(case, backend, dtype=torch.float32)
    assert torch.equal(losses, losses32)
    assert torch.equal(grad, grad32.to(grad.dtype))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_same_bits_run_after_run_and_whatever_the_split(backend, monkeypatch, dtype, options):
    case = on_device(build("bsv", dtype, 4, 64, 128256, 0, "float", options))
    first = run(case, backend)
    for parts in (1, 1, 2, 3, 8):
        share_out(monkeypatch, backend, parts)
        again = run(case, backend)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def share_out(monkeypatch, backend, parts):
    """Split each of the 256 rows over about `parts` programs."""
    if backend == "triton":
        from fused_sft_loss.triton_kernels import row_grad, row_stats

        for kernel in (row_stats, row_grad):
            monkeypatch.setattr(kernel, "splits", lambda *_: parts)
    else:
        generation, _ = device_chip(torch.device("cuda"))
        chip = generation, 8 * (parts - 1)  # 32 blocks each: see kBlocks in csrc/gpu/launch_table.h
        monkeypatch.setattr(selection.load(backend), "chip_of", lambda _device: chip)


@on_compiled_backends
@pytest.mark.parametrize("inplace", [False, True])
@PRODUCT
@given(case=cases(vocabularies=VOCABULARIES, views=("bsv", "sbv", "sliced", "offset")))
def test_one_read_over_the_option_product(backend, inplace, case):
    """Correct if the upstream gradient is the expected one, and if some rows have another."""
    draws = torch.rand(case.labels.numel(), generator=torch.Generator().manual_seed(0))
    upstream = torch.where(draws < 0.5, 0.75, -0.4)
    want, there = expected(case, upstream), on_device(case)
    leaf = there.storage.clone().requires_grad_()
    losses = fsl.sft_loss(
        there.logits(leaf * 1), there.labels, there.loss_mask, reduction="none", backend=backend,
        grad_in_forward=0.75, inplace_backward=inplace, **there.call_options(),
    )  # fmt: skip
    losses.backward(upstream.cuda().view_as(losses))
    assert_losses(losses.detach().cpu(), want)
    largest = largest_term(case, want, upstream)
    if inplace:  # rescaled rows are rounded twice: as exact as one rounding to one bit less
        rounding = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}
        wanted, rtol = storage_grad(case, want.grad), rounding[case.storage.dtype]
        atol = 2e-6 * largest + 2**-23
        torch.testing.assert_close(leaf.grad.cpu().double(), wanted, rtol=rtol, atol=atol)
    else:
        assert_grad(leaf.grad.cpu(), storage_grad(case, want.grad), case.storage.dtype, largest)


@on_compiled_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_read_has_the_same_bits_run_after_run(backend, dtype):
    """Holds for rows split over a cluster, and for rows wider than the chip can hold."""
    for columns in (128256, 600_000):
        case = on_device(build("bsv", dtype, 2, 32, columns, 0, "float", ALL))
        first, *others = (run(case, backend, grad_in_forward=True) for _ in range(3))
        for again in others:
            assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@on_every_backend
def test_metrics_agree_with_the_oracle(backend):
    case = build("bsv", torch.bfloat16, 2, 8, 50257, 0, "bool", {"softcap": 30.0})
    want, there = expected(case), on_device(case)
    got = fsl.token_metrics(
        there.storage, there.labels, there.loss_mask, softcap=30.0, backend=backend
    )
    for field in ("log_prob", "lse", "entropy"):
        value = getattr(got, field).flatten().double().cpu()
        torch.testing.assert_close(value, getattr(want, field), rtol=2e-6, atol=5e-6)
    assert torch.equal(got.correct.flatten().cpu(), want.correct)


def test_a_device_gets_compiled_kernels_unasked_and_has_triton():
    assert selection.resolve(None, "cuda") in ("cuda", "hip", "triton")
    assert selection.reason_against("triton", "cuda") is None


@on_every_backend
@pytest.mark.parametrize("inplace", [False, True])
def test_extra_memory(backend, inplace):
    """Forward needs O(N); backward one gradient of the logits' size, or nothing in place."""
    rows, v = 2048, 128256
    leaf = torch.randn(1, rows, v, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, v, (1, rows), device="cuda")
    logits = leaf * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = fsl.sft_loss(logits, labels, backend=backend, inplace_backward=inplace)
    assert torch.cuda.max_memory_allocated() - before < 4096 * rows
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(loss, logits)
    extra = torch.cuda.max_memory_allocated() - before - (0 if inplace else 2 * rows * v)
    assert extra < 4096 * rows


@on_every_backend
def test_offsets_beyond_2_31_elements(backend):
    v, rows = 151936, 2**31 // 151936 + 3
    if torch.cuda.mem_get_info()[0] < 5 * rows * v:
        pytest.skip("needs 11 GB of free device memory")
    logits = torch.randn(1, rows, v, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, v, (1, rows), device="cuda")
    mask = torch.zeros(1, rows, device="cuda")
    mask[0, -4:] = 1
    want = torch.nn.functional.cross_entropy(logits[0, -4:].double(), labels[0, -4:])
    got = fsl.sft_loss(logits, labels, mask, shift=False, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@on_every_backend
@pytest.mark.parametrize("one_read", [False, True])
def test_no_synchronisation_and_graph_capture(backend, one_read):
    if one_read and backend not in selection.ONE_READ:
        pytest.skip("Triton has no kernel for grad_in_forward")
    case = on_device(build("bsv", torch.bfloat16, 2, 64, 32000, 0, "float", ALL))
    logits = case.storage.clone().requires_grad_()

    def step():
        loss = fsl.sft_loss(
            logits, case.labels, case.loss_mask, backend=backend, grad_in_forward=one_read, **ALL
        )
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    want = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.fill_(7)
    graph.replay()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@on_every_backend
def test_runs_on_the_current_stream(backend):
    """A side stream writes the logits late. A launch on any other stream would read zeros."""
    case = on_device(build("bsv", torch.float32, 2, 16, 32000, 0, "none", {}))
    want, _ = run(case, backend)
    late = torch.zeros_like(case.storage)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(case.storage)
        got = fsl.sft_loss(late, case.labels, reduction="none", backend=backend)
    stream.synchronize()
    assert torch.equal(got, want)


@on_every_backend
def test_compiled_step_equals_the_eager_one(backend):
    case = on_device(build("bsv", torch.bfloat16, 2, 8, 32000, 0, "float", {}))

    def step(x):
        return fsl.sft_loss(x * 1.0, case.labels, case.loss_mask, backend=backend)

    leaf, again = (case.storage.clone().requires_grad_() for _ in range(2))
    loss, want = torch.compile(step, fullgraph=True)(leaf), step(again)
    loss.backward()
    want.backward()
    # Inductor sums the losses in another order, and the gradient is divided by that sum.
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, again.grad, rtol=2**-7, atol=0)


def two_devices():
    return pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two devices"
    )


@on_every_backend
@two_devices()
def test_tensors_on_a_device_that_is_not_current(backend):
    case = build("bsv", torch.bfloat16, 2, 8, 32000, 0, "float", ALL)
    want = run(on_device(case, "cuda:0"), backend)
    got = run(on_device(case, "cuda:1"), backend)
    assert torch.equal(got[0].cpu(), want[0].cpu()) and torch.equal(got[1].cpu(), want[1].cpu())
    assert torch.cuda.current_device() == 0


def sharded(rank, backend, case, path, results):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{path}", rank=rank, world_size=2)
    case = on_device(case, f"cuda:{rank}")
    leaf = case.storage.chunk(2, -1)[rank].contiguous().requires_grad_()
    loss = fsl.sft_loss(
        leaf, case.labels, case.loss_mask, backend=backend, tp_group=dist.group.WORLD
    )
    loss.backward()
    results[rank] = (loss.detach().cpu(), leaf.grad.cpu())
    dist.destroy_process_group()


@on_every_backend
@two_devices()
def test_two_devices_share_a_vocabulary(backend, tmp_path):
    case = build("bsv", torch.float32, 2, 16, 32000, 0, "float", {})
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(sharded, (backend, case, tmp_path / "store", results), nprocs=2)
        (loss, left), (other, right) = results[0], results[1]
    assert torch.equal(loss, other)
    want = expected(case)
    torch.testing.assert_close(loss.double(), want.reduce("mean"), rtol=1e-6, atol=0)
    grad = torch.cat([left, right], -1).view(-1, 32000).double()
    torch.testing.assert_close(grad, want.grad / want.weight.sum(), rtol=0, atol=1e-6)
