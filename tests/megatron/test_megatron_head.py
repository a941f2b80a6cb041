"""`ResponseOnlyHead`: scored rows alone give the loss and the gradients of all positions."""

import megatron_runs as runs
import pytest
import torch
from megatron_runs import Case
from test_megatron_exactness import largest_error

from bench.megatron_cpu import RankError, build_model, config, init, run_ranks
from fused_sft_loss.megatron import ResponseOnlyHead, head, make_forward_step, reports

TIED = {"tied": Case("per_token", True, tied=True, step="head")}
TIED["tied, mean"] = Case("mean", False, tied=True, step="head")
TIED["tied, linear"] = Case("per_token", True, tied=True, step="linear")
LAYOUTS = {"TP1": (1, {}), "TP2": (2, {"tp": 2}), "TP2+SP": (2, {"tp": 2, "sp": True})}
LAYOUTS["PP2"] = (2, {"pp": 2})  # two copies of the tied weight, whose gradients are added up


@pytest.fixture(scope="module")
def unsharded():
    return run_ranks(1, runs.reference, tied=True)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_embeddings_get_both_gradients(unsharded, layout):
    """The embedding and the head share a weight: its gradient is the sum of both uses."""
    processes, sizes = LAYOUTS[layout]
    assert "output_layer.weight" not in unsharded["weights"]
    ranks = run_ranks(processes, runs.train, unsharded["weights"], [*TIED.values()], **sizes)
    for case, results in zip(TIED.values(), zip(*ranks, strict=True), strict=True):
        assert largest_error(case, results, unsharded) <= 1e-6


def gradients(kinds, tp, sp):
    """For each kind of head: rows of logits, loss, gradients of hidden states and head weight."""
    init(tp)
    model, results = (
        build_model(config(**runs.SHAPE, sequence_parallel=sp), runs.VOCAB, runs.SEQ),
        [],
    )
    hidden, rows = [], []
    model.decoder.register_forward_hook(
        lambda m, args, out: out.retain_grad() or hidden.append(out)
    )
    of = reports.Sums.of
    reports.Sums.of = lambda logits, *args: (
        rows.append(logits.shape[:-1].numel()) or of(logits, *args)
    )
    for kind in kinds:
        model.zero_grad()
        step = make_forward_step(next, in_place=True, head=kind)
        output, loss_func = step(iter(runs.micro_batches()), model)
        loss, count, _ = loss_func(output)
        (loss / count).backward()
        weight = model.output_layer.weight.grad.clone()
        results.append((rows.pop(), loss.detach(), hidden.pop().grad, weight, int(count)))
    return results


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True)])
def test_hidden_states_and_head_weight_get_the_gradients_of_the_whole(tp, sp):
    kinds = [None, ResponseOnlyHead(), ResponseOnlyHead(multiple=10), ResponseOnlyHead(rows=31)]
    for results in run_ranks(tp, gradients, kinds, tp, sp):
        (all_rows, loss, hidden, weight, scored), *others = results
        assert all_rows == runs.SEQ * runs.BATCH > scored > 20
        assert [rows for rows, *_ in others] == [scored, -(-scored // 10) * 10, 31]
        for _, other_loss, other_hidden, other_weight, _ in others:
            torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
            for got, want in ((other_hidden, hidden), (other_weight, weight)):
                assert (got - want).abs().max() <= 1e-6 * want.abs().max()


LABELS = torch.tensor([[5, 6, -100, 8], [1, 2, 3, 4]])
MASK = torch.tensor([[0, 1, 1, 0.5], [0, 0, 1, 0]])


def test_rows_are_the_scored_ones_in_the_order_of_hidden_states():
    """[s, b]: position (1, 0) is row 2, (2, 1) row 5, (3, 0) row 6; the label -100 has none."""
    rows = ResponseOnlyHead().select(LABELS, MASK, -100)
    assert rows.positions.tolist() == [2, 5, 6] and rows.overflow is None
    assert rows.labels.tolist() == [6, 3, 8] and rows.mask.tolist() == [1, 1, 0.5]
    losses = ResponseOnlyHead.scatter(torch.tensor([1.0, 2.0, 3.0]), rows, LABELS.shape)
    assert losses.tolist() == [[0, 1, 0, 3], [0, 0, 2, 0]] and losses.is_contiguous()


@pytest.mark.parametrize(
    ("given", "mask", "rows", "scored"),
    [
        ({"multiple": 2}, MASK, 4, 3),
        ({"multiple": 100}, MASK, 8, 3),
        ({"rows": 3}, MASK, 3, 3),
        ({"rows": 100}, MASK, 8, 3),
        ({}, None, 7, 7),
        ({}, MASK.bool(), 3, 3),
        ({}, MASK * 0, 1, 0),
    ],
)
def test_rows_that_fill_up_are_distinct_and_not_scored(given, mask, rows, scored):
    selected = ResponseOnlyHead(**given).select(LABELS, mask, -100)
    assert selected.positions.numel() == selected.positions.unique().numel() == rows
    assert (selected.mask != 0).sum() == scored


def test_more_scored_positions_than_rows(monkeypatch):
    fixed = ResponseOnlyHead(rows=2)
    with pytest.raises(ValueError, match="expected at most rows=2 scored positions, got 3"):
        fixed.select(LABELS, MASK, -100)
    monkeypatch.setattr(head, "may_synchronise", lambda tensor: False)  # as on a GPU
    rows = fixed.select(LABELS, MASK, -100)
    assert ResponseOnlyHead.scatter(torch.ones(2), rows, LABELS.shape).isnan().any()
    rows = ResponseOnlyHead(rows=3).select(LABELS, MASK, -100)
    assert ResponseOnlyHead.scatter(torch.ones(3), rows, LABELS.shape).sum() == 3


def test_fixed_rows_need_no_value_on_the_host(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(head, "may_synchronise", lambda tensor: False)
    with FakeTensorMode():
        labels, mask = torch.zeros(2, 4).long(), torch.ones(2, 4)
        rows = ResponseOnlyHead(rows=3).select(labels, mask, -100)
        losses = ResponseOnlyHead.scatter(torch.ones(3), rows, labels.shape)
    assert losses.shape == (2, 4) and rows.positions.shape == (3,)


@pytest.mark.parametrize("given", [{"multiple": 0}, {"rows": 1.5}, {"rows": 8, "multiple": 4}])
def test_errors_of_the_head(given):
    with pytest.raises(ValueError, match="expected"):
        ResponseOnlyHead(**given)


def deferred():
    init()
    cfg = config(**runs.SHAPE)
    cfg.defer_embedding_wgrad_compute = True
    model = build_model(cfg, runs.VOCAB, runs.SEQ)
    make_forward_step(next, head=ResponseOnlyHead())(iter(runs.micro_batches()), model)


def test_deferred_weight_gradients_are_refused():
    with pytest.raises(RankError, match="defer_embedding_wgrad_compute=True"):
        run_ranks(1, deferred)
