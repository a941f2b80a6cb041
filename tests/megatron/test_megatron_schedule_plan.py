"""overlap_moe_expert_parallel_comm: a schedule plan computes our loss when it runs.

Megatron's own schedule runs here, on a CPU, with stand-ins for CUDA's streams and events.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import megatron_runs as runs
import pytest
import torch
from test_megatron_replaced_loss import HEADS, inputs, language_model

from bench.megatron_cpu import init, run_ranks
from fused_sft_loss.megatron import fused_cross_entropy, make_forward_step, versions

STEPS = {
    "make": {},
    "inplace_backward": {"inplace_backward": True},
    "response only": {"head": HEADS["response only"]},
    "linear": {"head": HEADS["linear"]},
    "per_sample": {"returns": "per_sample"},
}


@contextlib.contextmanager
def streams_on_cpu():
    """One stream that runs everything in order, as a CPU does."""
    event = mock.Mock(spec=["record", "wait"])
    with (
        mock.patch.object(torch.cuda, "Event", lambda *args, **kwargs: event),
        mock.patch.object(torch.cuda, "Stream", SimpleNamespace),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
    ):
        yield


def schedule(step, batches, model, overlap):
    """(reports, gradients) of two micro-batches under Megatron's own schedule."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    model.zero_grad()
    model.config.overlap_moe_expert_parallel_comm = overlap
    model.config.calculate_per_token_loss = True
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=2,
        seq_length=runs.SEQ,
        micro_batch_size=runs.BATCH,
        forward_only=False,
    )
    return reports, {name: p.grad.clone() for name, p in model.named_parameters()}


def trainers_step(data_iterator, model, return_schedule_plan=False):
    """A step as in pretrain_gpt.py, in the context; the loss_func is the trainer's."""
    (tokens, positions, attention), targets = inputs(next(data_iterator))
    build = model.build_schedule_plan if return_schedule_plan else model
    with fused_cross_entropy(model, head=HEADS["response only"], inplace_backward=True):
        output = build(tokens, positions, attention, **targets)

    def loss_func(losses):
        loss = (losses * targets["loss_mask"]).sum()
        count = targets["loss_mask"].sum().int()
        return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}

    return output, loss_func


def planned(name, **parallel):
    """The plain step and the planned one; None where megatron-core's plan takes no processor."""
    init(**parallel)
    model = language_model()
    if not versions.accepts(model, "output_processor"):
        return None
    # Megatron's plan applies it after experts only, and this model has dense layers.
    model.decoder.final_layernorm = None
    step, batches = trainers_step, (0, 1)
    if name != "trainer":
        step, batches = make_forward_step(next, **STEPS[name]), runs.micro_batches()[:2]
    with streams_on_cpu():
        return [schedule(step, batches, model, overlap) for overlap in (False, True)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", [*STEPS, "trainer"])
def test_the_plans_loss_is_that_of_the_plain_step(name, tp):
    for found in run_ranks(tp, planned, name, tp=tp):
        if found is None:
            continue
        (reports, grads), (planned_reports, planned_grads) = found
        assert len(reports) == len(planned_reports) == 2
        for plain, ours in zip(reports, planned_reports, strict=True):
            torch.testing.assert_close(ours["lm loss"], plain["lm loss"], rtol=1e-6, atol=0)
        for parameter, grad in grads.items():
            size = grad.abs().max()
            error = (planned_grads[parameter] - grad).abs().max()
            assert size > 0 and error <= 1e-6 * size, parameter
