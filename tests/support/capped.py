"""Logits of every size, and the float64 truth of a softcap on them."""

import torch

INF, NAN = float("inf"), float("nan")
CAPS = (1e-3, 1.0, 30.0, 32.0, 33.0, 50.0, 1e4)  # the GPU formula changes above 32

#: The relative error of the kernels' tanh and of the factors logit_scale / cap and cap.
RELATIVE = 6e-7
SMALLEST = 2.0**-126  # below it a GPU may flush to 0


def logits_of_every_size(cap: float, count: int) -> torch.Tensor:
    """`count` fp32 numbers: equal steps of bit patterns from 0 to the largest, of either sign, as
    many within 12 caps, where a cap bends, and infinities, NaN and subnormals."""
    special = torch.tensor([INF, -INF, NAN, -NAN, 0.0, -0.0, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38])
    quarter = (count - len(special)) // 4
    bits = torch.linspace(0, 0x7F7FFFFF, quarter, dtype=torch.float64).to(torch.int32)
    sizes = bits.view(torch.float32)
    near = torch.linspace(-12, 12, count - len(special) - 2 * quarter) * cap
    return torch.cat([special, sizes, -sizes, near])


def _truth(x, math):
    u = x.double() * math.logit_scale / math.softcap
    return torch.where(x.isinf(), x.double(), math.softcap * u.tanh()), u


def assert_capped(value, x, math, absolute: float):
    """z within RELATIVE of the truth, or within `absolute` of it."""
    want, _ = _truth(x, math)
    bound = want.abs() * RELATIVE + absolute + SMALLEST
    infinite = x.isinf() | x.isnan()
    torch.testing.assert_close(
        value[infinite].double(), want[infinite], rtol=0, atol=0, equal_nan=True
    )
    error = ((value.double() - want).abs() / bound)[~infinite]
    assert not error.isnan().any()
    assert error.max() <= 1, f"x = {x[~infinite][error.argmax()].item()!r}: {error.max()} bounds"


def assert_slope(slope, x, math):
    """(dz/dx) / logit_scale within 1e-6, never negative; 0 for infinities."""
    _, u = _truth(x, math)
    there = ~x.isnan()
    want = 1 - u.tanh() ** 2
    torch.testing.assert_close(slope[there].double(), want[there], rtol=0, atol=1e-6)
    assert (slope[there] >= 0).all() and (slope[x.isinf()] == 0).all()
