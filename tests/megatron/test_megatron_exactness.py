"""Parameter gradients and logged losses of real Megatron runs equal those of the reference loss.

Every convention is compared with its own exact definition (the table that opens
`fused_sft_loss.megatron`), made of the reference's gradients on the unsharded model. Where a
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
    "TP2+SP": (2, {"tp": 2, "sp": True}),
    "TP4": (4, {"tp": 4}),
    "TP4+SP": (4, {"tp": 4, "sp": True}),
    "PP2": (2, {"pp": 2}),
    "CP2": (2, {"cp": 2}),
    "DP2": (2, {}),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}),
    "TP2xCP2": (4, {"tp": 2, "cp": 2}),
    "PP2xCP2": (4, {"pp": 2, "cp": 2}),
    "TP2xDP2": (4, {"tp": 2}),
}
SAMPLE = ("TP2+SP", "CP2", "TP2xPP2")  # make test has these, make check the others
ALL_MASKED = (2,)
UNIT_WEIGHTS = (0, 1, 2, 4)  # a trainer's own loss_func counts tokens by adding their weights
CASES = {
    "per_token": Case("per_token", True),
    "per_token, 1 micro-batch": Case("per_token", True, each=1),
    "per_token, bf16": Case("per_token", True, dtype=torch.bfloat16),
    "per_token per micro-batch": Case("per_token", False),
    "mean": Case("mean", False),
    "mean, 1 micro-batch": Case("mean", False, each=1),
    "mean, bf16": Case("mean", False, dtype=torch.bfloat16),
    "all masked, per_token": Case("per_token", True, data=ALL_MASKED, each=2),
    "all masked, per_token per micro-batch": Case("per_token", False, data=ALL_MASKED, each=2),
    "all masked, mean": Case("mean", False, data=ALL_MASKED, each=2),
    "one context shard masked": Case("per_token", True, data=(4,), each=1),
    "own forward_step, per_token": Case("per_token", True, step="own"),
    "own forward_step, mean": Case("mean", False, step="own"),
    "gathered logits": Case("per_token", True, gathered=True, options={"vocab_size": runs.VOCAB}),
    "in_place, per_token": Case("per_token", True, step="in_place"),
    "in_place, mean": Case("mean", False, step="in_place"),
    "in_place, bf16": Case("per_token", True, step="in_place", dtype=torch.bfloat16),
    "in_place, all masked": Case("per_token", True, data=ALL_MASKED, each=2, step="in_place"),
    "head, per_token": Case("per_token", True, step="head"),
    "head, mean": Case("mean", False, step="head"),
    "head, all masked": Case("per_token", True, data=ALL_MASKED, each=2, step="head"),
    "head, one context shard masked": Case("per_token", True, data=(4,), each=1, step="head"),
    "linear, per_token": Case("per_token", True, step="linear"),
    "linear, mean": Case("mean", False, step="linear"),
    "linear, bf16": Case("per_token", True, step="linear", dtype=torch.bfloat16),
    "linear, all masked": Case("per_token", True, data=ALL_MASKED, each=2, step="linear"),
    "linear, one context shard masked": Case("per_token", True, data=(4,), each=1, step="linear"),
    "linear, grad_in_forward": Case(
        "per_token", True, step="linear", options={"grad_in_forward": True}
    ),
    "linear, gathered logits": Case("per_token", True, step="linear", gathered=True),
    "per_sample": Case("per_sample", True),
    "per_sample, in_place": Case("per_sample", True, step="in_place"),
    "per_sample, head": Case("per_sample", True, step="head"),
    "per_sample, linear": Case(
        "per_sample", True, step="linear", options={"grad_in_forward": True}
    ),
    "per_sample, one context shard masked": Case("per_sample", True, data=(4,), each=1),
    "all masked, per_sample": Case("per_sample", True, data=ALL_MASKED, each=2),
    "trainer's loss_func": Case("per_token", True, data=UNIT_WEIGHTS, step="trainer"),
    "trainer's loss_func, head": Case("per_token", True, data=UNIT_WEIGHTS, step="trainer_head"),
    "trainer's loss_func, linear": Case(
        "per_token", True, data=UNIT_WEIGHTS, step="trainer_linear"
    ),
}
#: Largest error: of an entry, in units of the parameter's largest (fp32); of a whole parameter's
#: gradient, relative to its norm, bf16 weights and activations included (bf16).
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def unsharded():
    return run_ranks(1, runs.reference)[0]


@pytest.fixture(
    scope="module",
    params=[n if n in SAMPLE else pytest.param(n, marks=pytest.mark.long) for n in LAYOUTS],
    ids=str,
)
def results(request, unsharded):
    """{case: [what `runs.train` returned, per process]}; one process group runs all cases."""
    processes, sizes = LAYOUTS[request.param]
    cases = list(CASES.values())
    ranks = run_ranks(processes, runs.train, unsharded["weights"], cases, **sizes)
    return dict(zip(CASES, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_reference_on_the_unsharded_model(results, unsharded, name):
    assert largest_error(CASES[name], results[name], unsharded) <= BOUNDS[CASES[name].dtype]


@pytest.mark.parametrize("name", [n for n in CASES if "all masked" not in n])
def test_trap_mean_of_means_logged_loss_is_token_weighted(results, unsharded, name):
    """Every rank logs the same loss: the token-weighted mean, over data parallelism too."""
    logged = [r["logged"] for r in results[name] if r["logged"] is not None]
    wanted = expected_log(CASES[name], unsharded, data_parallel(results[name]))
    bound = 1e-6 if CASES[name].dtype == torch.float32 else 2e-3
    assert logged and all(torch.equal(logged[0], other) for other in logged)
    torch.testing.assert_close(logged[0].double(), wanted, rtol=bound, atol=0)


def test_trap_all_masked_gradient_is_exactly_zero(results):
    """The run also ends: a loss without a graph would leave pipeline peers waiting."""
    for name in (n for n in CASES if "all masked" in n):
        for result in results[name]:
            for parameter, (grad, _) in result["grads"].items():
                assert torch.equal(grad, torch.zeros_like(grad)), f"{name}: {parameter}"


def test_the_parts_are_the_reference_loss(unsharded):
    """The loss that SFT scripts write by hand, on the same logits: S / W of every micro-batch."""
    for batch, part in zip(runs.micro_batches(), unsharded["parts"], strict=True):
        mean = reference_loss(part["logits"], batch["tokens"], batch["loss_mask"])
        wanted = part["S"] / part["W"] if part["W"] else part["S"]
        torch.testing.assert_close(mean.double(), wanted, rtol=1e-6, atol=0)


def test_the_biased_conventions_are_not_the_token_weighted_mean(unsharded):
    """Rows two and three of the table in the package's docstring."""
    whole = expected_gradients(CASES["per_token"], unsharded, 1, 1)
    for name in ("per_token per micro-batch", "mean"):
        biased = expected_gradients(CASES[name], unsharded, 1, 1)
        assert max(relative(biased[n], whole[n]) for n in whole) > 0.1
    per_shard = expected_gradients(CASES["per_token per micro-batch"], unsharded, 1, 2)
    per_batch = expected_gradients(CASES["per_token per micro-batch"], unsharded, 1, 1)
    assert max(relative(per_shard[n], per_batch[n]) for n in whole) > 0.1


def largest_error(case, ranks, unsharded):
    """The largest over all parameters and replicas, in the unit of `BOUNDS`.

    ranks: the results of one case.
    """
    replicas = {}
    for result in ranks:
        key = (result["rank"]["dp"], result["rank"]["cp"])
        replicas.setdefault(key, []).append(result)
    shards = 1 + max(cp for _, cp in replicas)
    wanted = expected_gradients(case, unsharded, data_parallel(ranks), shards)
    distance = of_entries if case.dtype == torch.float32 else relative
    worst = 0.0
    for replica in replicas.values():
        grads = runs.whole_grads(replica)
        assert grads.keys() == wanted.keys()
        worst = max(worst, *(distance(grads[name], wanted[name]) for name in wanted))
    return worst


def of_entries(grad, wanted):
    """Largest error of an entry in units of the largest entry; 0 where both are 0."""
    error, unit = (grad - wanted).abs().max().item(), wanted.abs().max().item()
    return error / unit if error else 0.0


def relative(grad, wanted):
    error, unit = (grad - wanted).norm().item(), wanted.norm().item()
    return error / unit if error else 0.0


def data_parallel(ranks):
    return 1 + max(result["rank"]["dp"] for result in ranks)


def expected_gradients(case, unsharded, data_parallel, shards):
    """{name: gradient in float64}, as the third column of the package docstring's table says."""
    parts = [unsharded["parts"][i] for i in case.of(data_parallel)]
    if case.returns == "per_sample":
        samples = scored_samples(parts)
        weighted = [(1 / len(samples) / float(s["W"]), s) for s in samples]
    elif case.calculate_per_token_loss:
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


def scored_samples(parts):
    return [sample for part in parts for sample in part["samples"] if sample["n"]]


def expected_log(case, unsharded, data_parallel):
    """The loss that the training loop logs, in float64: the last column of that table."""
    parts = [unsharded["parts"][i] for i in case.of(data_parallel)]
    if case.returns == "per_sample":
        return torch.stack([s["S"] / s["W"] for s in scored_samples(parts)]).mean().double()
    sums = torch.stack([p["S"] for p in parts]).double()
    if case.returns == "per_token":
        return sums.sum() / sum(p["n"] for p in parts)
    weights = torch.stack([p["W"] for p in parts]).double()
    sums = sums.view(data_parallel, -1).sum(0)  # micro-batches are dealt to ranks in order
    weights = weights.view(data_parallel, -1).sum(0)
    return torch.where(weights > 0, sums / weights, 0.0).mean()
