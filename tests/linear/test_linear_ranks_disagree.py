"""Promise: ranks that share a layer make the same call, or all of them raise and none waits.

One process group makes all wrong calls of a test, one after the other. A rank that was left
waiting, or out of step, would break every later call.
"""

import time

import pytest
import torch
import torch.distributed as dist

import fused_sft_loss as fsl
from bench.ranks import run_ranks

ODD = 1  # the rank that makes a different call
BATCH, SEQ, H, V = 2, 6, 8, 50


def arguments(parts=False):
    """The arguments that all ranks pass. With `parts` hidden is a part of the sequence."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 100, (BATCH, SEQ), generator=generator)
    ranks = dist.get_world_size() if parts else 1
    hidden = torch.randn(BATCH, SEQ, H, generator=generator)
    torch.manual_seed(dist.get_rank())
    return {
        "hidden": hidden.chunk(ranks, 1)[dist.get_rank() % ranks].clone().requires_grad_(),
        "weight": torch.randn(V, H, requires_grad=True),
        "labels": labels,
        "loss_mask": torch.ones(BATCH, SEQ),
        "tp_group": dist.group.WORLD,
        "sequence_parallel": parts,
    }


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def narrow(a):
    """A layer of another width."""
    return {"hidden": a["hidden"][..., :4].contiguous(), "weight": torch.randn(V, 4)}


def half(a):
    return {"hidden": a["hidden"].bfloat16(), "weight": a["weight"].bfloat16()}


#: What the odd rank passes instead, and words that every rank's message must contain.
DIFFERENCES = {
    "labels": (lambda a: {"labels": changed(a["labels"], (1, 2), 3)}, "other labels on ranks"),
    "mask": (lambda a: {"loss_mask": changed(a["loss_mask"], (0, 1), 0.5)}, "other loss_mask on"),
    "rows": (lambda a: {"rows": 12}, "rows=12"),
    "multiple": (lambda a: {"multiple": 8}, "multiple=8"),
    "chunk_rows": (lambda a: {"chunk_rows": 3}, "chunk_rows=3"),
    "schedule": (lambda a: {"grad_in_forward": True}, "grad_in_forward=yes"),
    "parts": (lambda a: {"sequence_parallel": False, **arguments_of_whole(a)}, "parallel=False"),
    "frozen hidden": (lambda a: {"hidden": a["hidden"].detach()}, "a gradient of hidden: no"),
    "width": (narrow, "h=4"),
    "dtype": (half, "'torch.bfloat16' on ranks"),
    "reduction": (lambda a: {"reduction": "sum"}, "sum linear loss"),
    "softcap": (lambda a: {"softcap": 30.0}, "softcap: 0.0 on ranks"),
    "another loss": (lambda a: {"function": fsl.sft_loss}, "call: "),
    "a wider shard": (lambda a: {"weight": torch.randn(60, H)}, "tile [0, vocab_size)"),
}


def arguments_of_whole(a):
    return {"hidden": torch.randn(BATCH, SEQ, H, requires_grad=True)}


#: Wrong on the odd rank alone, which raises by itself; the others pass on its message.
ERRORS = {
    "label": (lambda a: {"labels": changed(a["labels"], (1, 2), 900)}, "got 900 at labels[1, 2]"),
    "hidden missing": (lambda a: {"hidden": None}, "expected hidden to be a torch.Tensor"),
    "weight missing": (lambda a: {"weight": None}, "expected weight to be a torch.Tensor"),
    "labels missing": (lambda a: {"labels": None}, "expected labels to be a torch.Tensor"),
    "option": (lambda a: {"z_loss": -1.0}, "expected z_loss"),
    "h": (lambda a: {"weight": a["weight"][:, 1:].contiguous()}, "with one h"),
    "dtype": (lambda a: {"weight": a["weight"].bfloat16()}, "in the dtype of hidden"),
    "bias": (lambda a: {"bias": torch.zeros(V + 1)}, "expected bias [50]"),
    "chunk_rows": (lambda a: {"chunk_rows": 0}, "expected chunk_rows to be an integer >= 1"),
    "stride": (
        lambda a: {"hidden": torch.randn(H, *a["hidden"].shape[:2]).permute(1, 2, 0)},
        "last stride",
    ),
    "sequence": (lambda a: {"hidden": a["hidden"][:, :-1]}, "expected labels"),
    "backend": (lambda a: {"backend": "cuda"}, "cannot run on cpu"),
    "too large": (lambda a: {"vocab_size": 10**6}, "expected"),
}


def outcome(function, given):
    """The error of a call or its result, and the seconds it took."""
    start = time.monotonic()
    try:
        told = function(**given).item()
    except (TypeError, ValueError, NotImplementedError) as error:
        told = f"{type(error).__name__}: {error}"
    return told, time.monotonic() - start


def calls(wrong, parts):
    """The outcome of every wrong call, each followed by a right call with its backward."""
    outcomes = {}
    for name, (change, _) in wrong.items():
        given = arguments(parts)
        if dist.get_rank() == ODD:
            given |= change(given)
        function = given.pop("function", fsl.linear_sft_loss)
        if function is fsl.sft_loss:
            given["logits"] = given.pop("hidden") @ given.pop("weight").t()
            del given["sequence_parallel"]
        told = outcome(function, given)
        right = fsl.linear_sft_loss(**arguments(parts))
        right.backward()
        outcomes[name] = told, right.item()
    return outcomes


def differences(parts):
    left_out = ("another loss",) if parts else ("parts",)
    return calls({k: v for k, v in DIFFERENCES.items() if k not in left_out}, parts)


def errors(parts):
    return calls(ERRORS, parts)


def messages(name, by_rank):
    """Every rank's message. The right call afterwards must give the same number on all ranks."""
    outcomes = [outcomes[name] for outcomes in by_rank]
    assert all(seconds < 30 for (_, seconds), _ in outcomes), "a rank was left waiting"
    assert len({number for _, number in outcomes}) == 1
    return [told for (told, _), _ in outcomes]


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "sequence parallel"])
def test_trap_a_difference_is_named_on_every_rank(parts):
    by_rank = run_ranks(2, differences, parts, timeout=100)
    for name in by_rank[0]:
        words, told = DIFFERENCES[name][1], messages(name, by_rank)
        assert len(set(told)) == 1 and told[0].startswith("ValueError: "), (name, told)
        assert words in told[0], (name, told[0])
        if "tile" not in words:
            assert f"ranks [{ODD}]" in told[0] and "ranks [0]" in told[0]


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "sequence parallel"])
def test_trap_an_error_of_one_rank_is_told_to_the_others(parts):
    by_rank = run_ranks(2, errors, parts, timeout=100)
    for name, (_, words) in ERRORS.items():
        told = messages(name, by_rank)
        own = told.pop(ODD)
        assert words in own and "Error: " in own, (name, own)
        passed_on = f"ValueError: rank {ODD}, which shares this vocabulary, stopped: "
        assert told == [passed_on + own.partition(": ")[2]], name


def more_rows_than_allowed():
    """Every rank counts the same rows, so all raise by themselves."""
    given = {**arguments(), "rows": 3}
    return outcome(fsl.linear_sft_loss, given)[0], outcome(fsl.linear_sft_loss, arguments())[0]


def test_too_few_rows_are_an_error_on_every_rank():
    (told, right), other = run_ranks(2, more_rows_than_allowed, timeout=60)
    assert "expected at most rows=3 scored tokens, got 10" in told
    assert (told, right) == other and isinstance(right, float)
