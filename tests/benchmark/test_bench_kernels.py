"""`python -m bench kernels`: the bytes it counts, and the providers it refuses to time."""

from functools import partial

import bench_providers as made
import pytest
import torch
from bench_providers import case_of, problem_of

from bench.kernels import cases, oracle, record, table, timing, worker
from bench.kernels.cases import MODELS
from bench.kernels.footprint import footprint
from bench.kernels.problem import Source
from bench.kernels.providers import PROVIDERS
from bench.memory import peak_memory


def test_the_least_bytes_are_those_of_the_definition():
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for scored in cases.FRACTIONS:
            case = case_of(dtype=dtype, seq=100, scored=scored)
            f = case.scored_rows / case.rows
            elements = case.rows * case.columns
            least = {mode: sum(case.minimum_bytes(mode)) / elements for mode in cases.MODES}
            assert least["fwd"] == pytest.approx(size * f)
            assert least["bwd"] == pytest.approx(2 * size * f + size * (1 - f))
            assert least["full"] == pytest.approx(least["fwd"] + least["bwd"])
            if dtype == "bf16":
                assert least["full"] == pytest.approx(2 * f + 4 * f + 2 * (1 - f))


def test_scored_rows_are_those_that_the_mask_leaves():
    for scored in (1.0, 0.7, 0.5, 0.3, 0.1):
        case = case_of(seq=30, scored=scored)
        problem = problem_of(case, copies=1)
        rows = (problem.target >= 0).sum()
        assert rows == problem.total == case.scored_rows
        wanted = problem.mask[:, 1:].bool()
        labels = problem.labels[:, 1:][wanted]
        assert torch.equal(problem.target[problem.target >= 0], labels)


def test_the_roof_is_the_time_that_copying_and_zeroing_take():
    case = case_of(seq=100, scored=0.3)
    moved, zeroed = case.minimum_bytes("full")
    roof = {"copy_gb_per_s": 10.0, "zero_gb_per_s": 20.0}
    seconds = record.roof_seconds(case, roof, "full")
    assert seconds == pytest.approx(moved / 10e9 + zeroed / 20e9)
    # With everything scored there are three passes over the logits; a copy makes two.
    rows = record.Rows([case], "full")
    rows.roofs[0] = {"copy": [(0.5, 0.0)], "zero": [(0.25, 0.0)]}
    made_of = record.build(rows, {}, {}, True)["cases"][0]["roof"]
    assert made_of["copy_gb_per_s"] == pytest.approx(2 * case.logits_bytes / 0.5 / 1e9)
    assert made_of["zero_gb_per_s"] == pytest.approx(case.logits_bytes / 0.25 / 1e9)


def test_a_provider_that_copies_once_is_one():
    problem = problem_of(case_of(seq=256), copies=1)
    size = problem.case.logits_bytes
    usage = footprint(made.provider(made.copying), problem)
    assert usage.forward / size == pytest.approx(1, abs=0.02)
    assert usage.full / size == pytest.approx(1, abs=0.02)
    usage = footprint(made.provider(made.right), problem)
    assert usage.forward / size < 0.02
    assert usage.full / size == pytest.approx(1, abs=0.02)


def test_the_logits_are_not_copied_on_the_way_to_a_provider():
    problem = problem_of(case_of(seq=256), copies=1)
    buffer = problem.source.take()
    usage = peak_memory(lambda: oracle.attached(buffer))
    assert usage.peak < 4096
    logits = oracle.attached(buffer)
    assert logits.data_ptr() == buffer.data_ptr() and not logits.is_leaf and logits.requires_grad


@pytest.fixture
def timed(monkeypatch):
    """time_case on given providers; returns what it reported by name, and the calls made."""
    monkeypatch.setattr(timing, "FEWEST", 3)
    monkeypatch.setattr(timing, "WARM_S", 0.0)

    def run(*providers, case=None):
        made.calls.clear()
        told = {}

        def tell(name, **what):
            told.setdefault(name, {}).update(what)

        worker.time_case(problem_of(case or case_of()), providers, "full", 0.0, tell)
        return told, list(made.calls)

    return run


@pytest.mark.parametrize("change", [made.scaled, made.leaking, made.nan, made.coarse])
def test_a_wrong_provider_is_not_timed(timed, change):
    wrong = made.provider(partial(made.changing, change=change), "wrong")
    told, calls = timed(made.provider(made.right), wrong)
    assert calls.count("wrong") == 1  # called for the check only
    assert told["wrong"]["status"] == "wrong" and not told["wrong"]["check"]["ok"]
    assert told["wrong"]["reason"].startswith("wrong: ") and "seconds" not in told["wrong"]
    assert told["right"]["check"]["ok"] and len(told["right"]["seconds"]) == 3
    assert len(told["copy"]["seconds"]) == 3


def test_a_wrong_loss_is_not_timed(timed):
    told, _ = timed(made.provider(made.biased))
    assert told["biased"]["status"] == "wrong" and "seconds" not in told["biased"]


def test_memory_that_is_not_there_is_a_row_and_the_others_go_on(timed):
    told, _ = timed(*map(made.provider, (made.greedy, made.raising, made.right)))
    assert told["greedy"]["status"] == "OOM"
    assert told["raising"] == {"status": "failed", "reason": "RuntimeError: no such kernel"}
    assert told["right"]["seconds"]


def test_logits_are_restored_after_a_provider_that_writes(timed):
    """Unrestored, an in-place provider's second timing, and the next provider's, would be wrong."""
    problem = problem_of(case_of())
    ours = PROVIDERS["ours-cpu-inplace"]
    function = ours.function(problem)
    contender = timing.provider_contender("ours", function, problem, "full", ours.writes)
    list(timing.rounds([contender], problem.source.device, False, 0.0, worker.failed))
    assert all(torch.equal(buffer, problem.source.logits) for buffer in problem.source.ring)


def test_what_is_timed_in_turn_is_spread_over_the_rounds():
    order = []

    def contender(name):
        def run(clock):
            order.append(name)
            clock.start()
            clock.mark()
            clock.mark()

        return timing.Contender(name, run)

    both = [contender("often"), contender("seldom")]
    counts = iter((9, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_count", lambda one, budget: next(counts))
        patch.setattr(timing, "WARM_S", 0.0)
        list(timing.rounds(both, torch.device("cpu"), False, 0.0, worker.failed))
    order = order[2:]  # without the warm-up
    assert [len(c.seconds) for c in both] == [9, 3]
    at = [place for place, name in enumerate(order) if name == "seldom"]
    assert [later - sooner for sooner, later in zip(at, at[1:], strict=False)] == [4, 4]


def test_more_than_a_cache_lies_between_two_uses_of_a_buffer():
    cache = 2**25
    for seq in (2, 16, 1000, 20000):
        case = case_of(seq=seq)
        count = cases.copies(case, cache)
        assert count >= 2
        assert (count - 1) * case.logits_bytes >= cache or count == cases.MOST_COPIES
    source = Source(case_of().source, "cpu", 3)
    taken = [source.take().data_ptr() for _ in range(6)]
    assert len(set(taken[:3])) == 3 and taken[:3] == taken[3:]


@pytest.mark.parametrize(
    ("provider", "row", "status", "said"),
    [
        ("ours-cpu-inplace", {}, 0, ""),
        ("ours-cpu-inplace", {"status": "unavailable", "reason": "no compiler"}, 0, ""),
        ("ours-cpu-inplace", {"status": "wrong", "reason": "off"}, 1, "wrong: off"),
        ("ours-cpu-inplace", {"memory": {"forward": 0, "full": 2**20}}, 1, "full peak of 1048576"),
        ("ours-cpu-new", {"memory": {"forward": 2**20, "full": 2**20}}, 1, "forward peak of"),
        ("ours-cpu-new", {"memory": {"forward": 0, "full": 2**20}}, 0, ""),
        ("ours-cpu-new", {"speedup": 3.0}, 0, "3.0x in "),
        ("other", {"status": "wrong", "reason": "off", "speedup": 0.1}, 0, ""),
    ],
)
def test_the_verdict_is_about_what_ours_promises(provider, row, status, said, capsys):
    fine = {"status": "ok", "reason": None, "memory": {"forward": 0, "full": 0}, "speedup": 9.0}
    case = vars(case_of()) | {"rows": 2, "logits_bytes": 2**20}
    rows = [{"case": 0, "provider": provider, "title": "ours", **fine, **row}]
    rows.append({"case": None, "provider": "ours-cuda-new", "title": "not here"})
    assert table.verdict({"cases": [case], "rows": rows}) == status
    told = capsys.readouterr().err
    assert said in told and bool(said) == bool(told)


def test_logits_grow_with_cache_and_cores():
    mib = 2**20
    assert cases.wanted_bytes("cpu", 32 * mib, 2, 2**18) == 20 * mib
    assert cases.wanted_bytes("cpu", None, 2, 2**18) == 20 * mib
    assert cases.wanted_bytes("cpu", 32 * mib, 16, 2**18) == 32 * mib
    assert cases.wanted_bytes("cpu", 504 * mib, 2, 2**18) == 20 * mib  # the cache of a whole socket
    assert cases.wanted_bytes("cpu", 504 * mib, 64, 2**18) == 504 * mib
    assert cases.wanted_bytes("cuda", 50 * mib, 2, 2**18) == cases.GPU_ROWS * 2**18


def test_a_cache_that_holds_the_logits_is_remarked():
    case = {"logits_bytes": 2**24, "nproc": 2}
    for cache, said in ((None, False), (2**24, False), (2**25, True)):
        made_of = {"machine": {"last_level_cache_bytes": cache}, "cases": [case]}
        assert bool(record.remark(made_of)) == said


def test_a_forward_that_computes_the_gradient_says_so_beside_those_that_do_not():
    one_read, plain = PROVIDERS["ours-cpu-oneread-new"], PROVIDERS["ours-cpu-new"]
    for mode, told in (("fwd", True), ("bwd", True), ("full", False)):
        rows = record.Rows([case_of()], mode)
        rows.add_all([one_read, plain, PROVIDERS["liger"]], "cuda")
        titles = {row["provider"]: row["title"] for row in rows.rows.values()}
        assert titles[plain.name] == plain.title
        for provider in (one_read, PROVIDERS["liger"]):
            assert ("gradient in forward" in titles[provider.name]) == told


def test_models_are_cut_as_megatron_cuts_them():
    gpt2 = MODELS["gpt2"]
    assert gpt2.columns(1) == 50257 and gpt2.columns(2) * 2 == 50432  # a multiple of 128 * 2
    assert MODELS["llama3-8b"].columns(8) * 8 == 128256
    whole, shard = (case_of(gpt2, tp=2, nproc=nproc) for nproc in (2, 1))
    assert whole.vocab == 50257 and shard.vocab == shard.columns and shard.vocab_size is None
    qwen = case_of(MODELS["qwen2.5"])
    assert (qwen.vocab, qwen.columns, qwen.vocab_size) == (151936, 152064, 151936)
