"""Promise: logits that are a DTensor need no group, start or size: their placement states them."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backends import BUILT, using
from cases import build, expected
from closeness import assert_losses
from collectives import count_collectives
from tiers import sampled
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    loss_parallel,
    parallelize_module,
)

import fused_sft_loss as fsl
from bench.ranks import run_ranks

#: Columns over four ranks as torch.chunk cuts them: equal; uneven; the last empty; two empty.
COLUMNS = {12: [3, 3, 3, 3], 11: [3, 3, 3, 2], 9: [3, 3, 3, 0], 2: [1, 1, 0, 0]}
OPTIONS = ({}, {"label_smoothing": 0.1, "softcap": 5.0}, {"vocab_size": -1})
CLOSE = {"rtol": 0, "atol": 4e-6}


def mesh_of(*sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def gradient(leaf):
    """The gradient of a DTensor on all ranks, whose placement must be that of the leaf."""
    assert isinstance(leaf.grad, DTensor) and leaf.grad.placements == leaf.placements
    assert leaf.grad.shape == leaf.shape
    assert leaf.grad.to_local().shape == leaf.to_local().shape
    return leaf.grad.full_tensor()


def runs(jobs, sizes, placements, wrapped):
    """Per job: losses, the whole gradient, metrics, width, collectives forward and backward."""
    mesh, results, calls = mesh_of(*sizes), [], count_collectives()
    for name, case in jobs:
        leaf = distribute_tensor(case.full(), mesh, placements).requires_grad_()
        given = [case.labels, case.loss_mask]
        if wrapped:
            given = [DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim) for x in given]
        with using(name) as backend:
            options = {**case.options, "backend": backend}
            calls.clear()
            losses = fsl.sft_loss(leaf, *given, reduction="none", **options)
            forward = list(calls)
            losses.sum().backward()
            backward = calls[len(forward) :]
            metrics = fsl.token_metrics(leaf, *given, **options)
        width = leaf.to_local().shape[-1]
        results.append((losses, gradient(leaf), tuple(metrics), width, forward, backward))
        results[-1] = (losses.detach(), *results[-1][1:])
    return results


def jobs_of(columns):
    made = []
    for number, options in enumerate(OPTIONS):
        size = columns + options.get("vocab_size", 0)
        options = {**options, **({"vocab_size": size} if "vocab_size" in options else {})}
        case = build("bsv", torch.float32, 2, 5, columns, number, "float", options)
        made += [(name, case) for name in BUILT]
    return made


def assert_right(by_rank, jobs):
    for number, (_, case) in enumerate(jobs):
        want, first = expected(case), by_rank[0][number]
        for results in by_rank:
            losses, grad, metrics, *_ = results[number]
            assert type(losses) is torch.Tensor and torch.equal(losses, first[0])
            assert all(map(torch.equal, metrics, first[2]))
            torch.testing.assert_close(grad.double().view_as(want.grad), want.grad, **CLOSE)
        assert_losses(first[0], want)
        assert torch.equal(first[2][3].flatten(), want.correct)


@pytest.mark.parametrize("columns", sampled(COLUMNS, [9]))
def test_shards_as_torch_cuts_them_and_empty_ones(columns):
    jobs = jobs_of(columns)
    by_rank = run_ranks(4, runs, jobs, (4,), [Shard(2)], columns == 9, timeout=300)
    assert [results[0][3] for results in by_rank] == COLUMNS[columns]
    assert_right(by_rank, jobs)
    for results in by_rank:
        for *_, forward, backward in results:
            # On a CPU the ranks first compare their calls. Then: one all-gather, nothing backward.
            assert forward == ["all_gather_object", "all_gather"] and backward == []


@pytest.mark.parametrize("wrapped", sampled([False, True], [True]))
@pytest.mark.parametrize(
    "placements, collectives",
    [([Replicate(), Shard(2)], 2), ([Shard(2), Replicate()], 2), ([Replicate()] * 2, 0)],
    ids=str,
)
def test_a_mesh_of_two_dimensions(placements, collectives, wrapped):
    jobs = jobs_of(9)[: len(BUILT)]
    by_rank = run_ranks(4, runs, jobs, (2, 2), placements, wrapped, timeout=300)
    assert_right(by_rank, jobs)
    assert {len(results[0][4]) for results in by_rank} == {collectives}


# --- beside torch's own loss_parallel -------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, 8)
        self.head = torch.nn.Linear(8, vocab, bias=False)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).tanh())


def trained(ours, dp, tp, vocab, inplace):
    """(loss, gradients, collectives of the loss forward and backward) of FSDP2 and TP."""
    mesh = mesh_of(dp, tp)
    torch.manual_seed(0)
    model = Model(vocab)
    columns = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh["tp"], {"head": columns})
    if dp > 1:
        fully_shard(model, mesh=mesh["dp"])
    torch.manual_seed(1 + mesh.get_local_rank("dp"))  # another batch, the same on its tp ranks
    tokens = torch.randint(0, vocab, (2, 7))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    logits = model(tokens)
    head, calls = logits.detach().requires_grad_(), count_collectives()
    with contextlib.nullcontext() if ours else loss_parallel():
        with CommDebugMode() as counted:
            loss_of(ours, head * 1.0, labels, inplace).backward()
        # c10d functions that the loss called, and the functional collectives of DTensor operators
        functional = {str(name): number for name, number in counted.get_comm_counts().items()}
        collectives = list(calls), functional
        loss = loss_of(ours, logits, labels, inplace)
        loss.backward()
    gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    return full(loss.detach()), gradients, collectives


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_of(ours, logits, labels, inplace):
    if ours:
        return fsl.sft_loss(logits, labels, shift=False, inplace_backward=inplace)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    "dp, tp, vocab",
    [
        pytest.param(2, 2, 12, id="FSDP2 and TP"),
        pytest.param(1, 4, 11, id="TP, uneven", marks=pytest.mark.long),
    ],
)
def test_a_step_equals_that_with_loss_parallel(dp, tp, vocab):
    want = run_ranks(4, trained, False, dp, tp, vocab, False, timeout=200)
    for inplace in (False, True):
        got = run_ranks(4, trained, True, dp, tp, vocab, inplace, timeout=200)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
            # On a CPU the ranks first compare their calls, in all_gather_object.
            assert ours[2] == (["all_gather_object", "all_gather"], {})
            assert theirs[2] == ([], {"c10d_functional.all_reduce": 3})


# --- in place -------------------------------------------------------------------------------------


def overwritten(kinds):
    return [overwriting(kind) for kind in kinds]


def overwriting(kind):
    """What inplace_backward does with logits of nine columns; the last rank's part is empty."""
    torch.manual_seed(0)
    mesh = mesh_of(4)
    leaf = distribute_tensor(torch.randn(2, 5, 9), mesh, [Shard(2)]).requires_grad_()
    labels = torch.randint(0, 9, (2, 5))
    if kind == "leaf":
        logits = leaf
    elif kind == "view of a leaf":
        logits = leaf[:, :]
    elif kind == "saved by its operator":
        logits = leaf.exp()
    elif kind == "saved under hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            logits = leaf.exp()
    try:
        fsl.sft_loss(logits, labels, inplace_backward=True).backward()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


IN_PLACE = {
    "leaf": "ValueError: expected non-leaf logits",
    "view of a leaf": "ValueError: expected non-leaf logits",
    "saved by its operator": "RuntimeError: one of the variables needed for gradient",
    "saved under hooks": "ValueError: expected logits that nobody needs after the loss",
}


def test_in_place_is_refused_on_every_rank_where_another_needs_the_logits():
    """The DTensor has a version counter of its own, which a write to the local part leaves as it
    is: the gradient of exp would be silently wrong."""
    for messages in run_ranks(4, overwritten, list(IN_PLACE)):
        for message, words in zip(messages, IN_PLACE.values(), strict=True):
            assert message is not None and message.startswith(words), message


# --- errors ---------------------------------------------------------------------------------------


REFUSED = [
    ({"placements": [Shard(0)]}, "expected logits sharded on the vocabulary"),
    ({"placements": [Partial()]}, "expected logits sharded on the vocabulary"),
    ({"placements": "another cut"}, "columns on this rank, of 8 in shards as torch.chunk cuts"),
    ({"labels": [Shard(0)]}, "expected labels to be a plain tensor or a replicated DTensor"),
    ({"loss_mask": [Shard(0)]}, "expected loss_mask to be a plain tensor or a replicated DTensor"),
    ({"tp_group": None}, "expected no tp_group with logits that are a DTensor"),
    ({"vocab_start": 0}, "expected no vocab_start with logits that are a DTensor"),
    ({"vocab_size": 9}, "expected vocab_size of at most 8"),
    ({"vocab_size": 9, "odd": True}, "expected vocab_size of at most 8"),
    ({"grad_in_forward": True}, "expected no grad_in_forward with a vocabulary sharded"),
]


def refusals():
    """The error of each wrong call. A rank that one of them left waiting would break the next."""
    mesh, messages = mesh_of(4), []
    for change, _ in REFUSED:
        try:
            wrong_call(mesh, dict(change))
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


def wrong_call(mesh, change):
    whole, labels = torch.zeros(4, 4, 8), torch.zeros(4, 4, dtype=torch.int64)
    placements = change.pop("placements", [Shard(2)])
    if placements == "another cut":  # 1, 1, 1 and 5 columns
        part = torch.zeros(4, 4, 5 if dist.get_rank() == 3 else 1)
        logits = DTensor.from_local(
            part, mesh, [Shard(2)], shape=whole.shape, stride=whole.stride()
        )
    elif placements == [Partial()]:
        logits = DTensor.from_local(whole, mesh, placements)
    else:
        logits = distribute_tensor(whole, mesh, placements)
    for name in {"labels", "loss_mask"} & change.keys():
        change[name] = distribute_tensor(labels, mesh, change[name])
    if "tp_group" in change:
        change["tp_group"] = dist.group.WORLD
    if change.pop("odd", False) and dist.get_rank():  # rank 0 alone is wrong
        change["vocab_size"] = 8
    fsl.sft_loss(logits, **{"labels": labels, **change})


def test_what_the_placement_does_not_allow_is_an_error_on_every_rank():
    for messages in run_ranks(4, refusals, timeout=100):
        for message, (change, words) in zip(messages, REFUSED, strict=True):
            assert message is not None and words in message, (change, message)


def summed_while_called():
    """Loss and gradient of logits whose sum over the ranks is still under way, and those of it."""
    mesh = mesh_of(2)
    torch.manual_seed(0)
    whole, labels = torch.randn(2, 5, 8), torch.randint(0, 8, (2, 5))
    leaf = whole.clone().requires_grad_()
    partial = DTensor.from_local(leaf / 2, mesh, [Partial()])
    logits = partial.redistribute(placements=[Replicate()], async_op=True)
    assert isinstance(logits.to_local(), AsyncCollectiveTensor)
    loss = fsl.sft_loss(logits, labels)
    loss.backward()
    plain = whole.requires_grad_()
    want = fsl.sft_loss(plain, labels)
    want.backward()
    return loss.detach(), want.detach(), leaf.grad, plain.grad / 2


def test_logits_that_a_collective_is_still_writing_are_waited_for():
    for loss, want, grad, wanted in run_ranks(2, summed_while_called):
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(grad, wanted)
