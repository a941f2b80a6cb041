"""A packed sequence has the loss and the gradients of its documents, one by one."""

from functools import partial
from types import SimpleNamespace

import megatron_runs as runs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_megatron_conventions import Returning

from bench.megatron_cpu import build_model, config, init, run_ranks
from fused_sft_loss.megatron import make_forward_step, sft_loss_func, shift_packed_targets
from fused_sft_loss.megatron.versions import context_parallel_slice

# Under context parallelism of 2 the cuts are at 4, 8 and 12: documents begin at two of them, one
# lies across the third, and padding lies between documents and behind them.
LENGTHS, STARTS = (4, 7, 3), (0, 4, 12)
IGNORED = -100


def params(lengths=LENGTHS, starts=STARTS, end=runs.SEQ, kind=SimpleNamespace):
    """Documents of `lengths` at `starts`, as Megatron's PackedSeqParams has them."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    padded = torch.tensor([*starts, end]).int()
    return kind(cu_seqlens_q=bounds, cu_seqlens_q_padded=padded)


def megatrons_params():
    from megatron.core.packed_seq_params import PackedSeqParams

    return params(kind=partial(PackedSeqParams, "thd"))


def packed():
    """One packed sequence: tokens, a mask in every document, restarting positions, block mask."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, runs.VOCAB, (1, runs.SEQ), generator=generator)
    mask = (torch.rand(1, runs.SEQ, generator=generator) > 0.3).float()
    mask[:, list(STARTS)] = 1  # the first token of a document must not count nevertheless
    positions, document = torch.zeros(1, runs.SEQ).long(), torch.full((runs.SEQ,), -1)
    for number, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        positions[0, start : start + length] = torch.arange(length)
        document[start : start + length] = number
    hidden = (document[:, None] != document[None, :]) | torch.ones(runs.SEQ, runs.SEQ).triu(
        1
    ).bool()
    hidden.fill_diagonal_(False)  # padding attends to itself: an empty row would be NaN
    mask[:, document == -1] = 0
    return tokens, mask, positions, hidden[None, None]


def one_by_one():
    """(sum of losses, tokens, gradients) of the documents, each in a separate batch."""
    init()
    model, (tokens, mask, *_) = build_model(config(**runs.SHAPE), runs.VOCAB, runs.SEQ), packed()
    total, count = 0.0, 0
    for start, length in zip(STARTS, LENGTHS, strict=True):
        part = slice(start, start + length)
        logits = model(tokens[:, part], torch.arange(length)[None], None)
        loss, scored, _ = sft_loss_func(tokens[:, part], mask[:, part], logits)
        loss.backward()
        total, count = total + float(loss), count + int(scored)
    return total, count, {n: p.grad for n, p in model.named_parameters()}


def described(how):
    """The options that tell where documents end."""
    starts_and_ends = torch.tensor([0, 4, 11, 12, 15])  # the mask excludes the padding
    return {
        "packed_seq_params": lambda: {"packed_seq_params": megatrons_params()},
        "cu_seqlens": lambda: {"cu_seqlens": starts_and_ends},
        "position_ids": lambda: {"position_ids": packed()[2]},
    }[how]()


def as_one(how, step, tp=1, cp=1):
    """The packed sequence through one forward_step: (loss, tokens, whole gradients by name)."""
    parallel = init(tp, cp=cp)
    tokens, mask, positions, hidden = packed()
    model = build_model(config(**runs.SHAPE), runs.VOCAB, runs.SEQ)
    batch = {"tokens": tokens, "loss_mask": mask, "position_ids": positions}
    batch |= {"attention_mask": hidden, "labels": tokens}
    options = {}
    if cp > 1:
        batch["labels"], batch["loss_mask"] = shift_packed_targets(tokens, mask, **described(how))
        batch, options["shift"] = context_parallel_slice(batch), False
    if step == "own":
        inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
        output = model(*inputs)
        options = options or described(how)
        loss_func = partial(sft_loss_func, batch["labels"], batch["loss_mask"], **options)
    else:
        if not options and how == "position_ids":
            options["position_ids"] = "restart"
        elif not options:
            batch |= described(how)
        output, loss_func = make_forward_step(next, in_place=True, **options)(iter([batch]), model)
    loss, count, _ = loss_func(output)
    loss.backward()
    grads = {n: (p.grad, runs.shard_dim(p)) for n, p in model.named_parameters()}
    return {"tp": parallel.get_tensor_model_parallel_rank()}, loss.detach(), count, grads


@pytest.fixture(scope="module")
def documents():
    return run_ranks(1, one_by_one)[0]


HOW = ("packed_seq_params", "cu_seqlens", "position_ids")


@pytest.mark.parametrize(("step", "tp", "cp"), [("own", 1, 1), ("own", 2, 1), ("in_place", 1, 2)])
@pytest.mark.parametrize("how", HOW)
def test_packed_documents_equal_the_documents_one_by_one(documents, how, step, tp, cp):
    total, count, wanted = documents
    ranks = run_ranks(max(tp, cp), as_one, how, step, tp, cp)
    assert sum(int(n) for _, _, n, _ in ranks) == count * tp, "no boundary, no padding counted"
    assert sum(float(loss) for _, loss, _, _ in ranks) == pytest.approx(total * tp, rel=1e-6)
    if cp > 1:
        grads = {n: sum(rank[3][n][0] for rank in ranks) for n in wanted}
    else:
        grads = runs.whole_grads([{"rank": rank, "grads": g} for rank, _, _, g in ranks])
    for name, want in wanted.items():
        assert (grads[name] - want).abs().max() <= 1e-6 * want.abs().max(), name


def test_in_place_takes_documents_from_the_batch(documents):
    for how in ("cu_seqlens", "position_ids"):
        (_, loss, count, _), *_ = run_ranks(1, as_one, how, "in_place")
        assert count == documents[1] and float(loss) == pytest.approx(documents[0], rel=1e-6)


def test_packed_seq_params_reach_the_model_and_the_loss():
    """This model records them, because Megatron's local attention takes none."""
    tokens, mask, positions, _ = packed()
    logits = torch.randn(1, runs.SEQ, runs.VOCAB, requires_grad=True)
    model, seen = Returning(logits), []
    model.forward = lambda *args, packed_seq_params: seen.append(packed_seq_params) or logits
    batch = {"tokens": tokens, "position_ids": positions, "attention_mask": None}
    batch |= {"loss_mask": mask, "packed_seq_params": params()}
    output, loss_func = make_forward_step(next)(iter([batch]), model)
    wanted = sft_loss_func(tokens, mask, logits, cu_seqlens=torch.tensor([0, 4, 11, 12, 15]))
    assert seen == [batch["packed_seq_params"]]
    assert torch.equal(loss_func(output)[0], wanted[0]) and loss_func(output)[1] == wanted[1]


@st.composite
def layouts(draw):
    """(batch, seq, lengths, starts): ordered documents with gaps; a row's end may lie in one."""
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(2, 12))
    lengths, starts, position = [], [], 0
    while position < batch * seq:
        gap, length = draw(st.integers(0, 2)), draw(st.integers(1, 6))
        start = position + gap
        if start + length > batch * seq:
            break
        starts.append(start)
        lengths.append(length)
        position = start + length
    return batch, seq, lengths or [1], starts or [0]


@settings(max_examples=150, deadline=None)
@given(layouts(), st.booleans())
def test_targets_of_any_documents(layout, masked):
    """Position p is scored on p + 1 when one document holds both and p + 1 is not a new sequence"""
    batch, seq, lengths, starts = layout
    labels = torch.arange(batch * seq).view(batch, seq)
    mask = labels % 3 if masked else None
    got, got_mask = shift_packed_targets(
        labels, mask, packed_seq_params=params(lengths, starts, batch * seq)
    )
    holder = torch.full((batch * seq,), -1)
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        holder[start : start + length] = number
    for p in range(batch * seq):
        scored = (p + 1) % seq != 0 and holder[p] == holder[p + 1] != -1
        weight = ((p + 1) % 3 if masked else 1) if scored else 0
        assert got_mask.view(-1)[p] == weight
        if scored:
            assert got.view(-1)[p] == p + 1
    if not masked:
        positions = torch.zeros(batch * seq).long()
        for start, length in zip(starts, lengths, strict=True):
            positions[start : start + length] = torch.arange(length)
        inside = (holder != -1).view(batch, seq)
        by_ids = shift_packed_targets(labels, inside, position_ids=positions.view(batch, seq))[1]
        assert torch.equal(by_ids, got_mask)


def test_a_document_that_begins_at_a_cut_is_not_predicted_from_before_it():
    tokens, mask, *_ = packed()
    labels, _ = shift_packed_targets(tokens, mask, packed_seq_params=params())
    assert not set(STARTS[1:]) - {runs.SEQ * i // 4 for i in range(4)}, "all are zigzag cuts"
    for first, length in zip(STARTS, LENGTHS, strict=True):
        last = first + length - 1
        assert labels[0, last] == IGNORED
        assert torch.equal(labels[0, first:last], tokens[0, first + 1 : last + 1])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"position_ids": torch.zeros(1, 3)}, "expected position_ids of the labels' shape"),
        ({"loss_mask": torch.zeros(1, 3)}, "expected loss_mask of the labels' shape"),
        ({"cu_seqlens": torch.tensor([0, 9, 4])}, "increasing"),
        ({"cu_seqlens": torch.tensor([0, 99])}, "increasing within"),
        ({"cu_seqlens": torch.tensor([[0, 4], [0, 9]])}, r"\[k\+1\] or \[1, k\+1\], got \[2, 2\]"),
        ({"packed_seq_params": params((4, -1, 3), (0, 4, 12))}, "increasing"),
        ({"packed_seq_params": params(), "cu_seqlens": torch.tensor([0, 4])}, "got both"),
        ({"packed_seq_params": params((4, 7, 3), (0, 4))}, "of one length"),
        ({"packed_seq_params": params((4, 7, 3), (0, 2, 12))}, "increasing"),
        (
            {"packed_seq_params": SimpleNamespace(cu_seqlens_q=None, cu_seqlens_q_padded=None)},
            "got No",
        ),
    ],
)
def test_errors_of_packing(given, says):
    with pytest.raises(ValueError, match=says):
        shift_packed_targets(torch.zeros(1, runs.SEQ).long(), **given)


@pytest.mark.parametrize("name", ["packed_seq_params", "position_ids"])
def test_documents_with_labels_shifted_already(name):
    tokens, mask, positions, _ = packed()
    given = {"packed_seq_params": params(), "position_ids": positions}[name]
    logits = torch.zeros(1, runs.SEQ, runs.VOCAB)
    with pytest.raises(ValueError, match="pass them to shift_packed_targets"):
        sft_loss_func(tokens, mask, logits, shift=False, **{name: given})


def test_trap_boundaries_of_shape_1_k():
    """Megatron's datasets and pretrain_gpt.py of 0.16.1 hold cu_seqlens with a batch dimension."""
    tokens, mask, *_ = packed()
    logits = torch.randn(1, runs.SEQ, runs.VOCAB)
    bounds = torch.tensor([0, 4, 11, 12, 15])
    wanted = sft_loss_func(tokens, mask, logits, cu_seqlens=bounds)
    whole = SimpleNamespace(cu_seqlens_q=bounds[None], cu_seqlens_q_padded=bounds[None])
    for how in ({"cu_seqlens": bounds[None]}, {"packed_seq_params": whole}):
        loss, count, _ = sft_loss_func(tokens, mask, logits, **how)
        assert torch.equal(loss, wanted[0]) and torch.equal(count, wanted[1])
    with pytest.raises(
        ValueError, match=r"expected cu_seqlens \[k\+1\] or \[1, k\+1\], got \[2, 5\]"
    ):
        sft_loss_func(tokens, mask, logits, cu_seqlens=bounds.expand(2, 5))


@pytest.mark.parametrize("fill", [-1, 0])
@pytest.mark.parametrize("padded", [None, (0, 8)])
def test_trap_a_tail_of_sentinels_is_no_document(padded, fill):
    """Megatron-Bridge fills cu_seqlens to a fixed length with -1: [0, 6, 16, -1, -1]."""
    labels = torch.arange(runs.SEQ)[None]
    lengths = (6, 10) if padded is None else (6, 7)
    plain = params(lengths, padded or (0, 6))
    wanted = shift_packed_targets(labels, packed_seq_params=plain)
    tail = torch.tensor([fill, fill]).int()
    filled = SimpleNamespace(cu_seqlens_q=torch.cat([plain.cu_seqlens_q, tail]))
    filled.cu_seqlens_q_padded = None
    if padded is not None:
        filled.cu_seqlens_q_padded = torch.cat([plain.cu_seqlens_q_padded, tail])
    for got, want in zip(
        shift_packed_targets(labels, packed_seq_params=filled), wanted, strict=True
    ):
        assert torch.equal(got, want)
    second = 6 if padded is None else 8
    assert wanted[1].sum() == sum(lengths) - 2 and not wanted[1][0, second - 1]
    if padded is None:
        got = sft_loss_func(labels, None, torch.randn(1, 16, 16), cu_seqlens=filled.cu_seqlens_q)
        assert got[1] == 14
