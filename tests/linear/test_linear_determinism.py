"""Promise: same inputs, same bits, in every run."""

import pytest
import torch
from backends import BUILT
from linear_cases import build
from tiers import sampled


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk_rows", [7, None])
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", sampled(BUILT, ["cpu"]))
def test_two_runs_give_the_same_bits(backend, dtype, one_pass, chunk_rows, threads):
    case = build("bsv", dtype, 2, 20, 64, 2500, 5, "float", {"label_smoothing": 0.1})
    before, results = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            leaves = [t.clone().requires_grad_() for t in (case.storage, case.weight, case.bias)]
            loss = case.call(
                *leaves, grad_in_forward=one_pass, chunk_rows=chunk_rows, backend=backend
            )
            loss.backward()
            results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("one_pass", [False, True])
def test_rows_that_fill_up_change_no_loss(one_pass):
    case = build("bsv", torch.float32, 2, 6, 8, 1100, 5, "float", {})
    given = case.storage, case.weight, case.bias
    want = case.call(*given, reduction="none", grad_in_forward=one_pass)
    for padding in ({"rows": 12}, {"multiple": 4}):
        got = case.call(*given, reduction="none", grad_in_forward=one_pass, **padding)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
