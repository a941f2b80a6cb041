"""Promise: a model with an SFTLoss and its tp_group can be deep-copied (EMA), pickled and saved."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist

import fused_sft_loss as fsl
from bench.ranks import run_ranks


class Model(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.head = torch.nn.Linear(8, 25, bias=False)
        self.loss = fsl.SFTLoss(tp_group=group, label_smoothing=0.1)

    def forward(self, hidden, labels):
        return self.loss(self.head(hidden), labels)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def copies(kind):
    """(losses of the model and its copies, same group, state, bytes)."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    group = {
        "world": lambda: dist.group.WORLD,
        "new": lambda: dist.new_group([0, 1]),
        "mesh": lambda: init_device_mesh("cpu", (2,)),
    }[kind]()
    model = Model(group)
    hidden, labels = torch.randn(2, 4, 8), torch.randint(0, 50, (2, 4))
    copied = copy.deepcopy(model)
    models = [model, copied, loaded(saved(model)), pickle.loads(pickle.dumps(copied))]
    models.append(copy.deepcopy(models[-1]))
    losses = [each(hidden, labels).item() for each in models]
    wanted = group.get_group() if kind == "mesh" else group
    same = copied.loss.options["tp_group"] is wanted and model.loss.options["tp_group"] is group
    return losses, same, list(model.loss.state_dict()), saved(model)


@pytest.fixture(scope="module")
def by_kind():
    return {kind: run_ranks(2, copies, kind, timeout=100) for kind in ("world", "new", "mesh")}


@pytest.mark.parametrize("kind", ["world", "new", "mesh"])
def test_trap_copies_of_a_module_with_a_group(by_kind, kind):
    for losses, same, state, _ in by_kind[kind]:
        assert len(set(losses)) == 1 and same and state == []


def test_a_module_loaded_without_its_group_says_so_when_called(by_kind):
    model = loaded(by_kind["new"][0][3])
    hidden, labels = torch.randn(2, 4, 8), torch.randint(0, 25, (2, 4))
    with pytest.raises(ValueError, match='ranks \\[0, 1\\].*options\\["tp_group"\\]') as caught:
        model(hidden, labels)
    assert "got a process without it" in str(caught.value)
    assert "NamedGroup" in repr(model)
    again = loaded(saved(model))
    again.loss.options["tp_group"] = None
    assert again(hidden, labels).isfinite()


def load_elsewhere(data):
    """Load in a process where another group has the saved group's name."""
    name = loaded(data).loss.options["tp_group"].name
    while (group := dist.new_group([0])).group_name != name:
        pass
    try:
        loaded(data)(torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.int64))
    except ValueError as error:
        return str(error), group.group_name


def test_a_group_of_that_name_with_other_ranks_is_not_taken(by_kind):
    message, name = run_ranks(1, load_elsewhere, by_kind["new"][0][3], timeout=100)[0]
    assert f"group {name!r} of ranks [0, 1], got ranks [0] under that name" in message


def test_a_module_without_a_group_is_copied_as_ever():
    module = fsl.SFTLoss(z_loss=1e-3)
    for other in (copy.deepcopy(module), loaded(saved(module))):
        assert other.options == module.options and other.options is not module.options
