"""The programs in examples/ run, and their gradients match the loss written by hand."""

import copy
import importlib
from pathlib import Path

import megatron_runs as runs
import pytest
import torch
import torch.nn.functional as F

from bench.megatron_cpu import build_model, config, init, run_ranks
from examples import packed_sequences, pytorch_step
from examples.small_run import SEQ, VOCAB, make_batches

FOLDER = Path(pytorch_step.__file__).parent
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_a_page(path):
    most = 45 if path.stem == "small_run" else 39  # small_run is a helper, not an example to copy
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


def test_pytorch_step():
    model, (tokens, mask) = pytorch_step.make_model(), pytorch_step.make_batch()
    exact = copy.deepcopy(model).double()
    loss = pytorch_step.training_step(model, torch.optim.SGD(model.parameters(), 0.0), tokens, mask)
    losses = F.cross_entropy(exact(tokens)[:, :-1].mT, tokens[:, 1:], reduction="none")
    want = losses[mask[:, 1:]].mean()
    want.backward()
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=0)
    for got, right in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=1e-4, atol=1e-9)
    trained = pytorch_step.main(steps=3)
    assert trained == sorted(trained, reverse=True)  # the loss of its only batch falls


def by_hand(packed):
    """(summed loss, scored tokens, gradients of the mean) of an unsharded model, in float64."""
    init()
    model, batches = build_model(config(), VOCAB, SEQ).double(), make_batches()
    total, tokens = 0.0, 0
    for batch in batches:
        batch = packed_sequences.pack(batch) if packed else batch
        logits = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
        mask = batch["loss_mask"].clone()
        mask[:, 0] = 0
        if packed:
            mask[batch["position_ids"] == 0] = 0  # a document's first token has no predecessor
        losses = F.cross_entropy(logits[:, :-1].mT, batch["tokens"][:, 1:], reduction="none")
        total, tokens = total + (losses * mask[:, 1:]).sum(), tokens + int(mask.sum())
    (total / tokens).backward()
    return total.item(), tokens, {name: p.grad for name, p in model.named_parameters()}


def trained(program):
    """The result of a program, in the form that `runs.whole_grads` takes."""
    model, loss, tokens = importlib.import_module(f"examples.{program}").main()
    from megatron.core import parallel_state

    grads = {n: (p.main_grad, runs.shard_dim(p)) for n, p in model.module.named_parameters()}
    rank = {"tp": parallel_state.get_tensor_model_parallel_rank()}
    return {"rank": rank, "loss": loss, "tokens": tokens, "grads": grads}


@pytest.mark.parametrize(
    "program, processes, shares",  # shares: number of ranks with different tokens
    [("megatron_step", 2, 1), ("context_parallel", 2, 2), ("packed_sequences", 1, 1)],
)
def test_megatron_program(program, processes, shares):
    ranks = run_ranks(processes, trained, program)
    loss, tokens, grads = run_ranks(1, by_hand, program == "packed_sequences")[0]
    assert sum(rank["tokens"] for rank in ranks[:shares]) == tokens
    assert sum(rank["loss"] for rank in ranks[:shares]) == pytest.approx(loss, rel=1e-5)
    for name, grad in runs.whole_grads(ranks if shares == 1 else ranks[:1]).items():
        torch.testing.assert_close(grad.double(), grads[name], **CLOSE)
