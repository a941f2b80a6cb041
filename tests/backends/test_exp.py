"""The native backend's exponential, against float64 over its whole domain."""

import pytest
import torch
from backends import ON_CPU, using

from fused_sft_loss.backends import selection

NATIVE = [name for name in ON_CPU if name.startswith("cpu-")]
pytestmark = pytest.mark.skipif(not NATIVE, reason="the native module is not built")

RELATIVE = 2e-7  # csrc/cpu/row_math.h states this bound
SUBNORMAL = 2.0**-126


LOG2E = torch.tensor(1.4426950408889634, dtype=torch.float32)


def native_exp(x, unit=1.0):
    """e^(unit * x)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    unit_log2 = (torch.tensor(unit) * LOG2E).item()
    selection.load("cpu")._cpu.exp(x.data_ptr(), out.data_ptr(), x.numel(), unit_log2)
    return out


def every_nth_float(low, high, step):
    """Negative floats at equal steps of their bit patterns, so that every binade is covered."""
    first, last = (torch.tensor(v).view(torch.int32).item() for v in (low, high))
    return torch.arange(first, last, step, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("unit", [1.0, 0.7, 4.0, 1 / 3])
@pytest.mark.parametrize("name", NATIVE)
def test_error_bound_over_the_domain(name, unit):
    x = torch.cat(
        [
            every_nth_float(-1e-38, -88.1, 997),
            torch.linspace(-88.1, 0, 2_000_003),
            torch.linspace(0, 88.0, 100_003),
        ]
    )
    x = x / unit
    with using(name):
        got = native_exp(x, unit).double()
    z = x.double() * torch.tensor(unit).double()
    want = z.exp()
    error = (got - want).abs()
    per_unit = (9e-8 if name == "cpu-baseline" else 3e-8) + (0 if unit == 1 else 6e-8)
    bound = torch.where(want < SUBNORMAL, SUBNORMAL, want * (RELATIVE + z.abs() * per_unit))
    worst = (error / bound).argmax()
    assert (error <= bound).all(), (
        f"exp({x[worst].item()!r}): error {error[worst]}, bound {bound[worst]}"
    )


@pytest.mark.parametrize("name", NATIVE)
def test_special_values(name):
    inf, nan = float("inf"), float("nan")
    payload = torch.tensor([0x7FC00001, 0x7FFFFFFF, 0x7F800001], dtype=torch.int64).to(torch.int32)
    x = torch.tensor([0.0, -0.0, -inf, -88.03, -1e30, -3.4e38, nan, -nan])
    with using(name):
        got = native_exp(x)
        nans = native_exp(payload.view(torch.float32))
    assert got[:2].tolist() == [1.0, 1.0]
    assert got[2:6].tolist() == [0.0] * 4
    assert got[6:].isnan().all() and nans.isnan().all()


@pytest.mark.parametrize("name", NATIVE)
def test_subnormal_arguments_are_one(name):
    x = torch.tensor([-1e-45, -1e-40, -1.17e-38])
    with using(name):
        assert native_exp(x).tolist() == [1.0] * 3
