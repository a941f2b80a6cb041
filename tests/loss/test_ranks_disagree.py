"""Promise: if ranks that share a vocabulary make different calls, all raise and none waits.

One process group makes all wrong calls of a test, one after the other. A rank that was left
waiting, or out of step, would break every later call.
"""

import copy
import time

import pytest
import torch
import torch.distributed as dist

import fused_sft_loss as fsl
from bench.ranks import run_ranks
from fused_sft_loss.agreement import fingerprint
from fused_sft_loss.megatron import sft_loss_func

ODD = 1  # the rank that makes a different call
SHAPE = (2, 4)


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def call(labels, mask, logits):
    """The arguments that all ranks pass."""
    return {"logits": logits, "labels": labels, "loss_mask": mask, "tp_group": dist.group.WORLD}


#: What the odd rank passes instead, and words that every rank's message must contain.
DIFFERENCES = {
    "labels": (lambda a: {"labels": changed(a["labels"], (1, 2), 3)}, "other labels on ranks"),
    "mask": (lambda a: {"loss_mask": changed(a["loss_mask"], (0, 1), 0.5)}, "other loss_mask on"),
    "no mask": (lambda a: {"loss_mask": None}, "other loss_mask on ranks"),
    "packing": (lambda a: {"cu_seqlens": torch.tensor([0, 3, 8])}, "other cu_seqlens on ranks"),
    "batch": (
        lambda a: {name: a[name][:1] for name in ("logits", "labels", "loss_mask")},
        "labels' shape: [2, 4] on ranks",
    ),
    "dtype": (lambda a: {"logits": a["logits"].bfloat16()}, "logits: 'torch.float32' on ranks"),
    "smoothing": (lambda a: {"label_smoothing": 0.1}, "label_smoothing: 0.0 on ranks"),
    "softcap": (lambda a: {"softcap": 30.0}, "softcap: 0.0 on ranks"),
    "z_loss": (lambda a: {"z_loss": 1e-3}, "z_loss: 0.0 on ranks"),
    "scale": (lambda a: {"logit_scale": 2.0}, "logit_scale: 1.0 on ranks"),
    "shift": (lambda a: {"shift": False}, "shift: True on ranks"),
    "ignored": (lambda a: {"ignore_index": 5}, "ignore_index: -100 on ranks"),
    "reduction": (lambda a: {"reduction": "sum"}, "call: 'mean loss' on ranks"),
    "metrics": (lambda a: {"function": fsl.token_metrics}, "call: 'mean loss' on ranks"),
    "a wider shard": (lambda a: {"logits": torch.randn(*SHAPE, 60)}, "tile [0, vocab_size)"),
    "vocabulary": (
        lambda a: {"vocab_size": 50 * dist.get_world_size() - 3},
        "tile [0, vocab_size)",
    ),
}

#: Wrong on the odd rank alone, which raises by itself; the others pass on its message.
ERRORS = {
    "label": (lambda a: {"labels": changed(a["labels"], (1, 2), 900)}, "got 900 at labels[1, 2]"),
    "weight": (lambda a: {"loss_mask": changed(a["loss_mask"], (0, 3), -1.0)}, "got -1.0 at loss"),
    "labels missing": (lambda a: {"labels": None}, "expected labels to be a torch.Tensor"),
    "logits missing": (lambda a: {"logits": None}, "expected logits to be a torch.Tensor"),
    "option": (lambda a: {"z_loss": -1.0}, "expected z_loss"),
    "mask's shape": (lambda a: {"loss_mask": a["loss_mask"][:, 1:]}, "of the labels' shape"),
    "backend": (lambda a: {"backend": "cuda"}, "cannot run on cpu"),
    "leaf": (
        lambda a: {"logits": a["logits"].clone().requires_grad_(), "inplace_backward": True},
        "leaf",
    ),
    "too large": (lambda a: {"vocab_size": 10**6}, "expected"),
}


def arguments(masked=0):
    """The same labels and mask on every rank, other logits. `masked` is a label under the mask."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 100, SHAPE, generator=generator)
    mask = torch.ones(SHAPE)
    mask[0, 2] = 0
    labels[0, 2] = masked
    torch.manual_seed(dist.get_rank())
    return call(labels, mask, torch.randn(*SHAPE, 50))


def outcome(function, given):
    """The error of a call or its result, and the seconds it took."""
    start = time.monotonic()
    try:
        result = function(**given)
        told = result.item() if isinstance(result, torch.Tensor) else "no error"
    except (TypeError, ValueError, NotImplementedError) as error:
        told = f"{type(error).__name__}: {error}"
    return told, time.monotonic() - start


def plain_calls(wrong):
    """The outcome of every wrong call, each followed by a right call."""
    outcomes = {}
    for name, (change, _) in wrong.items():
        given = arguments()
        if dist.get_rank() == ODD:
            given |= change(given)
        function = given.pop("function", fsl.sft_loss)
        right = arguments(masked=dist.get_rank())  # labels under the mask may differ
        outcomes[name] = outcome(function, given), outcome(fsl.sft_loss, right)[0]
    return outcomes


def messages(name, by_rank):
    """Every rank's message. The right call afterwards must give the same number on all ranks."""
    outcomes = [outcomes[name] for outcomes in by_rank]
    assert all(seconds < 30 for (_, seconds), _ in outcomes), "a rank was left waiting"
    after = {number for _, number in outcomes}
    assert len(after) == 1 and isinstance(after.pop(), float)
    return [told for (told, _), _ in outcomes]


@pytest.mark.parametrize("ranks", [2, 4])
def test_trap_a_difference_is_named_on_every_rank(ranks):
    by_rank = run_ranks(ranks, plain_differences, timeout=200)
    for name, (_, words) in DIFFERENCES.items():
        told = messages(name, by_rank)
        assert len(set(told)) == 1 and told[0].startswith("ValueError: "), (name, told)
        assert words in told[0], (name, told[0])
        if "tile" not in words:
            others = [rank for rank in range(ranks) if rank != ODD]
            assert f"ranks [{ODD}]" in told[0] and f"ranks {others}" in told[0]


def plain_differences():
    return plain_calls(DIFFERENCES)


def plain_errors():
    return plain_calls(ERRORS)


@pytest.mark.parametrize("ranks", [2, 4])
def test_trap_an_error_of_one_rank_is_told_to_the_others(ranks):
    by_rank = run_ranks(ranks, plain_errors, timeout=200)
    for name, (_, words) in ERRORS.items():
        told = messages(name, by_rank)
        own = told.pop(ODD)
        assert words in own and "Error: " in own, (name, own)
        passed_on = f"ValueError: rank {ODD}, which shares this vocabulary, stopped: "
        assert set(told) == {passed_on + own.partition(": ")[2]}, name


def megatron_differences():
    """The same for the loss_func, which makes checks before the call."""
    odd, outcomes = dist.get_rank() == ODD, {}
    changes = {
        "labels": lambda a: {"labels": changed(a["labels"], (1, 2), 3)},
        "none": lambda a: {"labels": None},
        "unknown option": lambda a: {"shfit": True},
    }
    for name, change in changes.items():
        given = arguments()
        given["output_tensor"] = given.pop("logits")
        given |= change(given) if odd else {}
        outcomes[name] = outcome(sft_loss_func, given)[0], dist.get_rank()
    return outcomes


def test_the_loss_func_tells_as_well_and_exchanges_once():
    zero, one = run_ranks(2, megatron_differences, timeout=100)
    assert "other labels on ranks" in zero["labels"][0] == one["labels"][0]
    for name, words in (("none", "this is the last one"), ("unknown option", "shfit")):
        assert words in one[name][0] and "rank 1, which shares" in zero[name][0]


def exchanges():
    """How often ranks communicate: in a loss, in the loss_func, in an error of both ranks."""
    talks, gather = [], dist.all_gather_object
    dist.all_gather_object = lambda *a, **k: talks.append(1) or gather(*a, **k)
    counts, given = [], arguments()
    fsl.sft_loss(**given)
    counts.append(len(talks))
    logits = given.pop("logits")
    sft_loss_func(output_tensor=logits, **given)
    counts.append(len(talks))
    outcome(fsl.sft_loss, {**given, "logits": logits, "softcap": -1.0})
    counts.append(len(talks))
    return counts


def test_one_exchange_a_call():
    assert run_ranks(2, exchanges, timeout=100) == [[1, 2, 3]] * 2


def tp_groups():
    """The outcome for each kind of tp_group."""
    from torch.distributed.device_mesh import init_device_mesh

    rank, given = dist.get_rank(), arguments()
    ours, alone = dist.new_group([0, 1]), [dist.new_group([0]), dist.new_group([1])]
    kinds = {
        "group": ours,
        "mesh": init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)),
        "submesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))["tp"],
        "two dimensions": init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")),
        "string": "tp",
        "list": [0, 1],
        "size": 2,
        "without this rank": alone[1 - rank],
    }
    return {name: outcome(fsl.sft_loss, {**given, "tp_group": k})[0] for name, k in kinds.items()}


def test_trap_a_tp_group_that_is_none():
    for told in run_ranks(2, tp_groups, timeout=100):
        assert isinstance(told["group"], float)
        assert told["mesh"] == told["submesh"] == told["group"]
        assert "DeviceMesh of one dimension, got 2" in told["two dimensions"]
        assert 'mesh["tp"]' in told["two dimensions"]
        for name, kind in (("string", "str"), ("list", "list"), ("size", "int")):
            assert told[name].startswith("TypeError: tp_group: expected") and kind in told[name]
        assert "a group with this rank" in told["without this rank"]


def compiled():
    """The check is in an operator, so a compiled call also makes it."""
    given = arguments()
    step = torch.compile(fsl.sft_loss, fullgraph=True, backend="aot_eager")
    right = outcome(step, given)[0]
    if dist.get_rank() == ODD:
        given["labels"] = changed(given["labels"], (1, 2), 3)
    return right, outcome(step, given)[0]


def test_ranks_agree_inside_a_compiled_call():
    (right, wrong), (other_right, other_wrong) = run_ranks(2, compiled, timeout=200)
    assert isinstance(right, float) and right == other_right
    assert wrong == other_wrong and "other labels on ranks [1] than on ranks [0]" in wrong


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32])
def test_a_fingerprint_knows_every_value_and_its_place(dtype):
    values = torch.randint(0, 2, (3, 50)).to(dtype)
    same = values.t().contiguous().t()
    assert fingerprint(values) == fingerprint(same) == fingerprint(copy.deepcopy(values))
    seen = {fingerprint(values), fingerprint(values.flatten())}
    for place in range(150):
        other = values.clone()
        other.view(-1)[place] = 1 - int(other.view(-1)[place])
        seen.add(fingerprint(other))
    assert len(seen) == 152
