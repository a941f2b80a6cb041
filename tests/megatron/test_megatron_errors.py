"""Wrong use inside Megatron: every rank raises the right error at once, with the right words."""

import sys
import time
from functools import partial
from types import SimpleNamespace

import megatron_runs as runs
import pytest
import torch
import torch.distributed as dist

from bench.megatron_cpu import RankError, build_model, config, init, run_ranks
from fused_sft_loss.megatron import make_forward_step, sft_loss_func

LABELS = torch.zeros(2, 5, dtype=torch.int64)
LOGITS = torch.zeros(2, 5, 11)
PER_TOKEN = SimpleNamespace(calculate_per_token_loss=True)


def schedule(forward_step, tp=1, pp=1, cp=1, **options):
    """One micro-batch through the schedule, on every rank.

    forward_step: a user's own, or the options of a `make_forward_step`.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    init(tp, pp, cp)
    if isinstance(forward_step, dict):
        forward_step = make_forward_step(next, **forward_step)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(runs.micro_batches()),
        model=[build_model(config(**runs.SHAPE, **options), runs.VOCAB, runs.SEQ)],
        num_microbatches=1,
        seq_length=runs.SEQ,
        micro_batch_size=runs.BATCH,
    )


def error_on_every_rank(processes, forward_step, **sizes):
    """The message, the same on all ranks; no rank waits for one that has raised."""
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(processes, schedule, forward_step, timeout=30, **sizes)
    assert sorted(caught.value.exceptions) == list(range(processes)), str(caught.value)
    assert time.monotonic() - start < 25, "ranks were killed for waiting"
    (kind, message), *others = caught.value.exceptions.values()
    assert kind == "ValueError" and all(other == (kind, message) for other in others)
    return message


def model_called_with_labels(data_iterator, model):
    batch = next(data_iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["tokens"])
    return losses, partial(sft_loss_func, batch["tokens"], batch["loss_mask"])


@pytest.mark.parametrize("tp", [1, 2])
def test_trap_labels_passed_to_the_model(tp):
    """A GPTModel called with labels returns per-token losses [b, s], not logits."""
    message = error_on_every_rank(tp, model_called_with_labels, tp=tp)
    assert "called with labels" in message and "per-token loss" in message
    assert "call it without" in message, "the fix"


def shift_under_cp(data_iterator, model):
    logits = torch.zeros(2, 8, runs.VOCAB, requires_grad=True)
    labels = torch.zeros(2, 8, dtype=torch.int64)
    return logits, partial(sft_loss_func, labels, None)


@pytest.mark.parametrize("own", [False, True])
def test_trap_shift_inside_a_context_parallel_shard(own):
    message = error_on_every_rank(2, shift_under_cp if own else {}, cp=2)
    assert "context parallelism of size 2" in message
    steps = ("shift_targets", "get_batch_on_this_cp_rank", "then shift=False")
    recipe = [message.index(step) for step in steps]
    assert recipe == sorted(recipe), "shift first, slice after"


def test_mean_contradicts_calculate_per_token_loss():
    options = {"returns": "mean"}
    message = error_on_every_rank(2, options, calculate_per_token_loss=True, tp=2)
    assert "returns='mean' with calculate_per_token_loss=True" in message
    assert "Use returns='per_token'" in message


def test_mean_contradicts_calculate_per_token_loss_on_the_first_pipeline_stage():
    """The last stage waits for the first one's output, so the first one must raise."""
    with pytest.raises(RankError) as caught:
        run_ranks(2, schedule, {"returns": "mean"}, pp=2, calculate_per_token_loss=True)
    kind, message = caught.value.exceptions[0]
    assert kind == "ValueError" and "returns='mean'" in message


def whole_logits(data_iterator, model):
    """The model gathers its logits. The loss gets vocab_size, but tp_group is still Megatron's."""
    batch = next(data_iterator)
    inputs = batch["tokens"], batch["position_ids"], None
    logits = model(*inputs, runtime_gather_output=True)
    return logits, partial(sft_loss_func, batch["tokens"], None, vocab_size=runs.VOCAB)


def test_trap_gathered_logits_to_the_sharded_loss():
    """Without the check the loss would be off by log(tp)."""
    assert "vocab_size" in error_on_every_rank(2, whole_logits, tp=2)


def mismatched(what, step):
    """One forward and loss on two tensor-parallel ranks; only the second has a wrong batch."""
    rank = init(tp=2).get_tensor_model_parallel_rank()
    model = build_model(config(**runs.SHAPE), runs.VOCAB, runs.SEQ)
    batch = runs.micro_batches()[0]
    if rank == 1:
        batch |= {
            "mask": {"loss_mask": batch["loss_mask"][:, 1:]},
            "labels": {"labels": batch["tokens"].flip(0)},
            "values": {"loss_mask": batch["loss_mask"].roll(1)},
            "none": {"labels": None},
            "dtype": {"labels": batch["tokens"].float()},
        }[what]
    output, loss_func = runs.STEPS[step](next, returns="per_token")(iter([batch]), model)
    loss_func(output)


MISMATCHES = [(what, "make") for what in ("mask", "labels", "values", "none", "dtype")]
MISMATCHES += [("mask", "own"), ("dtype", "own"), ("values", "in_place"), ("mask", "head")]
MISMATCHES += [("values", "trainer"), ("labels", "trainer")]


@pytest.mark.parametrize(("what", "step"), MISMATCHES)
def test_a_mismatch_on_one_rank_stops_all_of_them(what, step):
    """Otherwise the other ranks would wait in the all-gather for the one that has raised."""
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(2, mismatched, what, step, timeout=60)
    assert time.monotonic() - start < 30
    said = caught.value.exceptions
    assert sorted(said) == [0, 1], str(caught.value)
    if what in ("labels", "values"):
        other = "labels" if what == "labels" else "loss_mask"
        for _, text in said.values():
            assert "expected the same call on ranks [0, 1], which share the vocabulary" in text
            assert f"got other {other} on ranks [1] than on ranks [0]" in text
    else:
        assert "rank 1, which shares this vocabulary, stopped" in said[0][1]
        assert said[1][1] in said[0][1], "what rank 1 says, word for word"


def of_a_wrong_group(which):
    """TP2 x DP2: sharded logits, and a group that is not the one that shards them."""
    parallel = init(tp=2)
    model = build_model(config(**runs.SHAPE), runs.VOCAB, runs.SEQ)
    group = {
        "data parallel": parallel.get_data_parallel_group(),
        "the world": dist.group.WORLD,
        "none": None,
    }[which]
    dist.barrier()  # a rank that leaves before all are connected is a connection error of the rest
    step = make_forward_step(next, tp_group=group)
    output, loss_func = step(iter(runs.micro_batches()), model)
    loss_func(output)


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("data parallel", "expected Megatron's tensor-parallel group of ranks"),
        ("the world", "expected Megatron's tensor-parallel group of ranks"),
        ("none", "expected 1 shards that add up to the model's vocabulary of 64, got 1 x 32"),
    ],
)
def test_trap_the_wrong_group(which, says):
    with pytest.raises(RankError) as caught:
        run_ranks(4, of_a_wrong_group, which, timeout=30)
    assert sorted(caught.value.exceptions) == [0, 1, 2, 3]
    for kind, message in caught.value.exceptions.values():
        assert kind == "ValueError" and says in message


def of_a_group_without_me():
    init(tp=2)
    groups = [dist.new_group([0]), dist.new_group([1])]
    other = groups[1 - dist.get_rank()]
    sft_loss_func(LABELS, None, LOGITS, tp_group=other)


def test_a_group_without_this_rank():
    with pytest.raises(RankError) as caught:
        run_ranks(2, of_a_group_without_me, timeout=30)
    said = caught.value.exceptions
    assert sorted(said) == [0, 1]
    assert all("a group with this rank" in message for _, message in said.values())


def no_labels_on_the_last_stage(data_iterator):
    batch = next(data_iterator)
    from megatron.core import parallel_state

    last = parallel_state.is_pipeline_last_stage()
    return {**batch, "labels": None if last else batch["tokens"]}


def without_labels():
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    init(pp=2)
    get_forward_backward_func()(
        forward_step_func=make_forward_step(no_labels_on_the_last_stage),
        data_iterator=iter(runs.micro_batches()),
        model=[build_model(config(**runs.SHAPE), runs.VOCAB, runs.SEQ)],
        num_microbatches=2,
        seq_length=runs.SEQ,
        micro_batch_size=runs.BATCH,
        forward_only=False,
    )


def test_labels_missing_on_the_last_pipeline_stage():
    """The last stage raises before its model runs; the earlier stages end when it has exited."""
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(2, without_labels, timeout=60)
    kind, message = caught.value.exceptions[1]
    assert kind == "ValueError" and "this is the last one, where the loss is" in message
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("learnt", ["config", "megatron-lm"])
def test_mean_contradicts_the_config_that_can_be_learnt(monkeypatch, learnt):
    options = {"returns": "mean"}
    if learnt == "config":
        options["config"] = PER_TOKEN
    else:
        stand_in = SimpleNamespace(get_args=lambda: PER_TOKEN)
        monkeypatch.setitem(sys.modules, "megatron.training.global_vars", stand_in)
    with pytest.raises(ValueError, match="returns='mean' with calculate_per_token_loss=True"):
        sft_loss_func(LABELS, None, LOGITS, **options)
    sft_loss_func(LABELS, None, LOGITS, **{**options, "returns": "per_token"})


def test_megatron_lm_imported_but_not_initialised(monkeypatch):
    def get_args():
        raise AssertionError("args is not initialized.")

    stand_in = SimpleNamespace(get_args=get_args)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", stand_in)
    sft_loss_func(LABELS, None, LOGITS, returns="mean")


@pytest.mark.parametrize(
    ("labels", "mask", "logits", "options", "kind", "says"),
    [
        (LABELS, None, LOGITS[..., 0], {}, ValueError, "called with labels"),
        (LABELS, None, LOGITS[..., 0], {"returns": "mean"}, ValueError, "called with labels"),
        (LABELS, None, LOGITS[..., 0], {"non_loss_data": True}, ValueError, "called with labels"),
        (LABELS, torch.ones(2, 4), LOGITS, {}, ValueError, "loss_mask"),
        (LABELS[:, 1:], None, LOGITS, {}, ValueError, "labels"),
        (None, None, LOGITS, {}, ValueError, "last one"),
        (LABELS, None, LOGITS, {"returns": "sum"}, ValueError, "one of .*'per_sample'.*got 'sum'"),
        (LABELS, None, LOGITS, {"reduction": "sum"}, TypeError, "reduction: not an option"),
        (LABELS, None, LOGITS, {"shfit": True}, TypeError, "shfit"),
    ],
)
def test_errors_of_the_loss_func(labels, mask, logits, options, kind, says):
    with pytest.raises(kind, match=says):
        sft_loss_func(labels, mask, logits, **options)


BATCH = {"tokens": LABELS, "position_ids": LABELS, "attention_mask": None}


@pytest.mark.parametrize(
    ("batch", "options", "kind", "says"),
    [
        (tuple(BATCH.values()), {}, TypeError, "expected a dict .* got tuple.*name its parts"),
        ({"tokens": LABELS}, {}, ValueError, r"missing \['position_ids', 'attention_mask'\]"),
        ({**BATCH, "mask": LABELS}, {}, ValueError, r"unknown \['mask'\]"),
        (BATCH, {"shift": False}, ValueError, "expected 'labels' with shift=False"),
        (BATCH, {"returns": "sum"}, ValueError, "got 'sum'"),
        (BATCH, {"reduction": "mean"}, TypeError, "reduction: not an option"),
    ],
)
def test_errors_of_the_forward_step(batch, options, kind, says):
    """Raised before the model runs, so no rank waits inside one of its collectives."""

    def model(*_):
        raise AssertionError("the model ran")

    with pytest.raises(kind, match=says):
        make_forward_step(lambda _: batch, **options)(None, model)


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind", "says"),
    [
        ((None, None, True), {}, NotImplementedError, "overlap_moe_expert_parallel_comm=False"),
        ((None, None), {"return_schedule_plan": True}, NotImplementedError, "make_forward_step"),
        ((None, None, None, True), {}, NotImplementedError, "compute Megatron.s loss when"),
        ((None,), {}, TypeError, r"expected \(data_iterator, model\).*got \(NoneType\)"),
        ((1, 2, 3, 4), {}, TypeError, r"got \(int, int, int, int\)"),
    ],
)
def test_arguments_that_a_forward_step_does_not_take(arguments, keywords, kind, says):
    with pytest.raises(kind, match=says):
        make_forward_step(next)(*arguments, **keywords)
