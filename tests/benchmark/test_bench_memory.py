"""bench.memory reports known allocations correctly."""

import numpy as np
import pytest
import torch

from bench.memory import MemoryRecord, peak_memory

X = torch.ones(2048, 2048)  # fp32, 16 MiB
SIZE = X.numel() * X.element_size()
SMALL = 4096  # tolerance for scalars that torch allocates


def near(value, multiple):
    return abs(value - multiple * SIZE) <= SMALL


def test_one_copy_is_one():
    usage = peak_memory(lambda: X.clone())
    assert near(usage.peak, 1) and near(usage.held, 1)


def test_what_is_released_counts_in_the_peak_only():
    def two_then_one():
        double = X.double()
        return double.float()

    usage = peak_memory(two_then_one)
    assert near(usage.peak, 3) and near(usage.held, 1)


def test_releases_make_room():
    def one_at_a_time():
        for _ in range(5):
            X.clone()

    usage = peak_memory(one_at_a_time)
    assert near(usage.peak, 1) and near(usage.held, 0)


def test_nothing_is_nothing():
    usage = peak_memory(lambda: X.view(-1).t())
    assert usage.peak == 0 and usage.held == 0


def test_releasing_what_was_there_at_the_start_makes_room():
    with MemoryRecord() as record:
        before = [X.clone()]
        record.mark("begin")
        before.clear()
        after = X.double()
        record.mark("end")
        del after
    usage = record.usage("begin", "end")
    assert near(usage.peak, 1) and near(usage.held, 1)


def test_marks_in_autograd_hooks():
    leaf = X.clone().requires_grad_()
    with MemoryRecord() as record:
        x = leaf.view_as(leaf)
        x.register_hook(lambda grad: record.mark("gradient ready"))
        record.mark("forward")
        loss = x.exp().sum()  # exp saves one copy
        record.mark("forward end")
        loss.register_hook(lambda grad: record.mark("backward"))
        loss.backward()
    assert near(record.usage("forward", "forward end").held, 1)
    assert near(record.usage("backward", "gradient ready").peak, 1)
    assert near(record.usage("backward", "gradient ready", base="forward").peak, 2)


def test_resident_sees_memory_that_torch_does_not():
    usage = peak_memory(lambda: np.ones(SIZE, dtype=np.uint8))
    assert usage.peak == 0
    if usage.resident_peak is None:
        pytest.skip("this kernel does not report a resettable high-water mark")
    assert 0.95 * SIZE < usage.resident_peak < 2 * SIZE


def test_an_unknown_mark_is_an_error():
    with MemoryRecord() as record:
        record.mark("a")
    with pytest.raises(ValueError, match="expected one of the marks"):
        record.usage("a", "b")
