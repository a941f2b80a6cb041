"""Parameter gradients and logged losses of real Megatron runs equal those of the reference loss.

Every convention is compared with its own exact definition (the table that opens
`fused_sft_loss/megatron.py`), made of the reference's gradients on the unsharded model. Where a
convention is a mean of means, that bias is part of the expectation.
"""

import megatron_runs as runs
import pytest
import torch
from megatron_runs import Case

from bench.megatron_cpu import run_ranks
from bench.reference import reference_loss

LAYOUTS = {  # name: (processes, sizes)
    "TP1": (1, {}),
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"cp": 2}),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}),
    "TP2xDP2": (4, {"tp": 2}),
}
ALL_MASKED = (2, 2)
CASES = {
    "per_token": Case("per_token", True),
    "per_token-per_micro_batch": Case("per_token", False),
    "mean": Case("mean", False),
    "all_masked-per_token": Case("per_token", True, data=ALL_MASKED),
    "all_masked-per_micro_batch": Case("per_token", False, data=ALL_MASKED),
    "all_masked-mean": Case("mean", False, data=ALL_MASKED),
    "own_forward_step-per_token": Case("per_token", True, own_forward_step=True),
    "own_forward_step-mean": Case("mean", False, own_forward_step=True),
    "gathered_logits": Case("per_token", True, gathered=True, options={"vocab_size": runs.VOCAB}),
}


@pytest.fixture(scope="module")
def unsharded():
    return run_ranks(1, runs.reference, reference_loss)[0]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def results(request, unsharded):
    """{case: [what `runs.train` returned, per process]}; one process group runs all cases."""
    processes, sizes = LAYOUTS[request.param]
    cases = list(CASES.values())
    ranks = run_ranks(processes, runs.train, unsharded["weights"], cases, **sizes)
    return dict(zip(CASES, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_reference_on_the_unsharded_model(results, unsharded, name):
    replicas = {}
    for result in results[name]:
        key = (result["rank"]["dp"], result["rank"]["cp"])
        replicas.setdefault(key, []).append(result)
    shards = 1 + max(cp for _, cp in replicas)
    wanted = expected_gradients(CASES[name], unsharded, shards)
    for ranks in replicas.values():
        assert_gradients(runs.whole_grads(ranks), wanted)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("all_masked")])
def test_trap_mean_of_means_logged_loss_is_token_weighted(results, unsharded, name):
    """Every rank logs the same, and it is the token-weighted mean, over data parallelism too."""
    logged = [r["logged"] for r in results[name] if r["logged"] is not None]
    size = 1 + max(r["rank"]["dp"] for r in results[name])
    wanted = expected_log(CASES[name], unsharded, size)
    assert logged and all(torch.equal(logged[0], other) for other in logged)
    torch.testing.assert_close(logged[0].double(), wanted, rtol=1e-6, atol=0)


def test_trap_all_masked_gradient_is_exactly_zero(results):
    """And the run came to its end: a loss without a graph leaves pipeline peers waiting."""
    for name in (n for n in CASES if n.startswith("all_masked")):
        for result in results[name]:
            for parameter, (grad, _) in result["grads"].items():
                assert torch.equal(grad, torch.zeros_like(grad)), f"{name}: {parameter}"


def expected_gradients(case, unsharded, shards):
    """{name: gradient in float64}: the third column of the table in megatron.py, literally."""
    parts = [unsharded["parts"][i] for i in case.data]
    if case.calculate_per_token_loss:
        total = max(sum(p["n"] for p in parts), 1)
        weighted = [(1 / total, p) for p in parts]
    elif case.returns == "mean":
        weighted = [(1 / len(parts) / float(p["W"]), p) for p in parts if p["n"]]
    else:  # under context parallelism every shard is divided by its own count
        parts = parts if shards == 1 else [shard for p in parts for shard in p["shards"]]
        weighted = [(1 / len(parts) / p["n"], p) for p in parts if p["n"]]
    return {
        name: sum((w * p["grads"][name].double() for w, p in weighted), torch.zeros_like(weight))
        for name, weight in unsharded["weights"].items()
    }


def assert_gradients(actual, wanted):
    """Within 1e-6 of the largest entry of each parameter's own gradient."""
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        error, unit = (grad - wanted[name]).abs().max().item(), wanted[name].abs().max().item()
        assert error <= 1e-6 * unit, f"{name}: off by {error:.2e}, largest entry {unit:.2e}"


def expected_log(case, unsharded, data_parallel):
    """What the training loop logs, float64: the last column of the table in megatron.py."""
    parts = [unsharded["parts"][i] for i in case.data]
    sums = torch.stack([p["S"] for p in parts]).double()
    if case.returns == "per_token":
        return sums.sum() / sum(p["n"] for p in parts)
    weights = torch.stack([p["W"] for p in parts]).double()
    sums = sums.view(data_parallel, -1).sum(0)  # micro-batches are dealt to ranks in order
    weights = weights.view(data_parallel, -1).sum(0)
    return torch.where(weights > 0, sums / weights, 0.0).mean()
