"""Promise: with FSDP2 the gradients are those that FSDP gives the layer and sft_loss themselves."""

import pytest
import torch
import torch.distributed as dist
from tiers import sampled
from torch import nn

import fused_sft_loss as fsl
from bench.ranks import run_ranks

H, V, BATCH, SEQ = 8, 101, 2, 6  # two ranks: shards of 51 and 50 rows


class Model(nn.Module):
    """A body and an output layer, which FSDP shards apart from each other."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)

    def forward(self, x, use):
        return use(self.body(x), self.head)


def of_layer(labels, **options):
    """The reference: the layer's own logits."""
    return lambda hidden, head: fsl.sft_loss(head(hidden), labels)


def inside(labels, **options):
    """In the root's forward, where FSDP has gathered the weight."""
    return lambda hidden, head: fsl.linear_sft_loss(hidden, head.weight, labels, **options)


def step(model, x, labels, kind, **options):
    if kind == "outside":
        hidden = model(x, lambda hidden, head: hidden)
        weight = model.head.weight
        assert hasattr(weight, "full_tensor"), "expected a weight that is sharded again"
        return fsl.linear_sft_loss(hidden, weight, labels, **options)
    return model(x, {"of layer": of_layer, "inside": inside}[kind](labels, **options))


def sharded(kind):
    """The model after fully_shard."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = Model()
    if kind == "outside":
        fully_shard(model.head)  # never called, so its weight stays sharded
    return fully_shard(model)


def gradients(kind, options):
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(2)
    inputs = torch.randn(2, BATCH, SEQ, H, generator=generator)[rank]
    labels = torch.randint(0, V, (2, BATCH, SEQ), generator=generator)[rank]
    model = sharded(kind)
    loss = step(model, inputs, labels, kind, **options)
    loss.backward()
    grads = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    placements = {weight.grad.placements for weight in model.parameters()}
    return loss.item(), grads, placements == {model.body.weight.placements}


@pytest.mark.parametrize("kind", ["inside", "outside"])
@pytest.mark.parametrize("options", sampled([{}, {"grad_in_forward": True}], [{}]), ids=str)
def test_fully_shard(kind, options):
    reference = run_ranks(2, gradients, "of layer", {}, timeout=60)
    for got, want in zip(
        run_ranks(2, gradients, kind, options, timeout=60), reference, strict=True
    ):
        assert got[0] == pytest.approx(want[0], rel=1e-6) and got[2]
        for name, grad in want[1].items():
            torch.testing.assert_close(got[1][name], grad, rtol=1e-5, atol=1e-6)


def refusals():
    """The messages for DTensors that are not an FSDP shard, by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, two = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    whole = torch.randn(V, H)
    weights = {
        "replicated": distribute_tensor(whole, mesh, [Replicate()]),
        "by columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "partial": DTensor.from_local(whole, mesh, [Partial()]),
        "two dimensions": distribute_tensor(whole, two, [Replicate(), Shard(0)]),
    }
    hidden, labels, told = torch.randn(1, 4, H), torch.ones(1, 4, dtype=torch.long), {}
    for name, weight in weights.items():
        told[name] = error_of(hidden, weight, labels)
    by_rows = distribute_tensor(whole, mesh, [Shard(0)])
    told["with tp_group"] = error_of(hidden, by_rows, labels, tp_group=dist.group.WORLD)
    told["hidden"] = error_of(distribute_tensor(hidden, mesh, [Shard(1)]), whole, labels)
    told["right"] = fsl.linear_sft_loss(hidden, by_rows, labels).isfinite().item()
    return told


def error_of(*given, **options):
    try:
        return fsl.linear_sft_loss(*given, **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def test_other_placements_are_an_error_on_every_rank():
    for told in run_ranks(2, refusals, timeout=60):
        assert told.pop("right") is True
        assert "expected hidden to be a plain tensor" in told.pop("hidden")
        assert len(told) == 5
        for message in told.values():
            assert "ValueError: expected weight to be a plain tensor, or a DTensor" in message
            assert "weight.to_local() with tp_group" in message
