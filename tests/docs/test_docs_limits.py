"""The code refuses every combination that docs/megatron.md lists under "Limits"."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_docs_options import table

from fused_sft_loss import linear_sft_loss
from fused_sft_loss.megatron import (
    LinearHead,
    ResponseOnlyHead,
    forward_step,
    fused_cross_entropy,
    global_state,
    make_forward_step,
    preconditions,
    sft_loss_func,
    shift_packed_targets,
    vocab_parallel_cross_entropy,
)

LOGITS, LABELS = torch.randn(2, 5, 8), torch.randint(0, 8, (2, 5))
POSITIONS = torch.arange(5).expand(2, 5)
BOUNDS = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED = SimpleNamespace(cu_seqlens_q=BOUNDS, cu_seqlens_q_padded=None)
REPORT = ("lm loss", "accuracy")


class Model(torch.nn.Module):
    """The attributes that `fused_cross_entropy` needs of a model, as in megatron-core 0.18 on."""

    config = SimpleNamespace(mtp_num_layers=None)

    def forward(self, tokens, labels=None, output_processor=None):
        return self.compute_language_model_loss(labels, LOGITS)

    def compute_language_model_loss(self, labels, logits):
        return logits.sum(-1)

    def build_schedule_plan(self, labels=None):
        return "a plan"


def loss(**options):
    return sft_loss_func(LABELS, None, LOGITS, **{"tp_group": None, **options})


operator = partial(vocab_parallel_cross_entropy, LOGITS, LABELS)  # [s, b, v] and [s, b]


def inside(what, **options):
    """Call `what(model)` inside the context."""
    model = Model()
    with fused_cross_entropy(model, **options):
        what(model)


PER_TOKEN = SimpleNamespace(calculate_per_token_loss=True)
LIMITS = {  # option -> (a call for each entry of the last column, the errors they raise)
    "reduction": ([partial(loss, reduction="sum")], TypeError),
    "returns": (
        [
            partial(loss, returns="mean", config=PER_TOKEN),
            partial(loss, returns="mean", num_tokens=torch.tensor(1)),
            partial(loss, returns="per_sample", num_tokens=torch.tensor(1)),
        ],
        ValueError,
    ),
    "shift": (
        [
            partial(loss, shift=False, packed_seq_params=PACKED),
            partial(loss, shift=False, position_ids=POSITIONS),
            partial(loss, shift=False, cu_seqlens=BOUNDS),
        ],
        ValueError,
    ),
    "packed_seq_params": (
        [partial(shift_packed_targets, LABELS, packed_seq_params=PACKED, cu_seqlens=BOUNDS)],
        ValueError,
    ),
    "report": ([partial(loss, report=REPORT, grad_in_forward=True)], NotImplementedError),
    "in_place": (
        [partial(forward_step._in_place_loss, None, None, LOGITS, non_loss_data=True)],
        ValueError,
    ),
    "fused_cross_entropy": (
        [
            partial(inside, print, tp_group=None),
            partial(inside, print, shift=True),
            partial(inside, lambda model: model.build_schedule_plan(labels=LABELS)),
            partial(inside, lambda model: model(LABELS, labels=LABELS, output_processor=print)),
            lambda: fused_cross_entropy(torch.nn.Linear(2, 2)).__enter__(),
        ],
        (TypeError, ValueError, NotImplementedError),
    ),
    "return_schedule_plan": (
        [partial(make_forward_step(next), None, None, return_schedule_plan=True)],
        NotImplementedError,
    ),
    "vocab_parallel_cross_entropy": (
        [
            partial(operator, shift=True),
            partial(operator, layout="bsv"),
            partial(operator, cu_seqlens=BOUNDS),
            partial(operator, reduction="sum"),
            partial(vocab_parallel_cross_entropy, LOGITS, LABELS.t()),
        ],
        (TypeError, ValueError),
    ),
    "LinearHead": (
        [
            partial(LinearHead, multiple=2, rows=4),
            partial(LinearHead.check, SimpleNamespace(defer_embedding_wgrad_compute=True)),
            partial(linear_sft_loss, LOGITS, torch.randn(9, 8), LABELS, inplace_backward=True),
            partial(preconditions.plain_output_layer, torch.nn.Linear(2, 2)),
        ],
        (ValueError, NotImplementedError),
    ),
    "ResponseOnlyHead": (
        [
            partial(ResponseOnlyHead, multiple=2, rows=4),
            partial(ResponseOnlyHead.check, SimpleNamespace(defer_embedding_wgrad_compute=True)),
        ],
        (ValueError, NotImplementedError),
    ),
}


def test_every_row_of_the_table_is_tested():
    """tp_group is tested over several processes in test_megatron_errors.py."""
    assert set(table("docs/megatron.md", "limit")) == {*LIMITS, "tp_group"}


CALLS = [(name, call) for name, (calls, _) in LIMITS.items() for call in calls]


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda n: f"{CALLS[n][0]}-{n}")
def test_what_the_table_calls_impossible_is_refused(number):
    name, call = CALLS[number]
    with pytest.raises(LIMITS[name][1]):
        call()


@pytest.mark.parametrize(
    "options",
    [{}, {"packed_seq_params": PACKED}, {"position_ids": POSITIONS}],
    ids=["per micro-batch", "packed_seq_params", "position_ids"],
)
def test_samples_under_context_parallelism_are_refused(monkeypatch, options):
    two = SimpleNamespace(get_context_parallel_world_size=lambda: 2)
    monkeypatch.setattr(global_state, "parallel_state", lambda: two)
    config = PER_TOKEN if options else SimpleNamespace(calculate_per_token_loss=False)
    with pytest.raises(ValueError, match="returns='per_sample'.*under context parallelism"):
        loss(returns="per_sample", shift=False, config=config, **options)


def test_shifting_under_context_parallelism_is_refused(monkeypatch):
    two = SimpleNamespace(get_context_parallel_world_size=lambda: 2)
    monkeypatch.setattr(global_state, "parallel_state", lambda: two)
    with pytest.raises(ValueError, match="shift=True under context parallelism"):
        loss()
