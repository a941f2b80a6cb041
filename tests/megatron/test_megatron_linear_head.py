"""`LinearHead`: the output layer computes the losses, and stays Megatron's module in all else."""

import megatron_runs as runs
import pytest
import torch
from test_megatron_replaced_loss import CLOSE, inputs, language_model, step

from bench.megatron_cpu import RankError, build_model, config, init, run_ranks
from fused_sft_loss.megatron import LinearHead, fused_cross_entropy, make_forward_step, wrappers
from fused_sft_loss.megatron.linear_head import HostCount

HEAD = LinearHead(chunk_rows=3)


def gpt_of(model):
    return list(wrappers.wrapped(model))[-1]


def refused(prepare):
    """The step with a LinearHead, on a model that `prepare(model)` has changed."""
    init()
    model = language_model()
    prepare(gpt_of(model))
    step(model, fused_cross_entropy(model, head=HEAD))


def gathered_by_a_hook():
    """The weight is empty until a forward pre-hook of the module fills it, as Megatron's
    overlap_param_gather does."""
    init()
    model = language_model()
    own = step(model)
    layer = gpt_of(model).output_layer
    held = layer.weight.detach().clone()
    called = []

    def gather(module, args):
        called.append("gather")
        with torch.no_grad():
            module.weight.copy_(held)

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(lambda *_: called.append("after"))
    with torch.no_grad():
        layer.weight.zero_()
    return own, step(model, fused_cross_entropy(model, head=HEAD)), called


def test_trap_a_chunked_loss_that_goes_round_the_module():
    """NeMo-RL's chunked loss had to forbid overlap_param_gather, whose hooks it did not run."""
    (own, own_grads), (ours, grads), called = run_ranks(1, gathered_by_a_hook)[0]
    assert called == ["gather", "after"]
    mask = inputs()[1]["loss_mask"]
    torch.testing.assert_close(ours, torch.where(mask != 0, own, 0.0), **CLOSE)
    for name, grad in own_grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


def main_grads(head, **flags):
    """main_grad of each parameter after two micro-batches; gradient_accumulation_fusion is on."""
    init()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    cfg = config(**runs.SHAPE)
    in_fp32 = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(cfg, in_fp32, build_model(cfg, runs.VOCAB, runs.SEQ, seed=3))
    layer = gpt_of(model).output_layer
    if head is not None:
        layer.gradient_accumulation_fusion = True
        for name, value in flags.items():
            setattr(layer.weight, name, value)
    forward_step = make_forward_step(next, in_place=True, head=head)
    for batch in runs.micro_batches()[:2]:
        output, loss_func = forward_step(iter([batch]), model)
        loss_func(output)[0].backward()
    grads = {n: p.main_grad.clone() for n, p in model.named_parameters()}
    return grads, layer.weight.grad is None, getattr(layer.weight, "grad_added_to_main_grad", None)


@pytest.mark.parametrize("flags", [{}, {"zero_out_wgrad": True}], ids=str)
def test_the_weight_gradient_is_added_to_main_grad(flags):
    """As gradient_accumulation_fusion does, which adds up micro-batches in fp32."""
    wanted, _, _ = run_ranks(1, main_grads, None)[0]
    grads, nothing_left, added = run_ranks(1, main_grads, HEAD, **flags)[0]
    assert nothing_left and added is True
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


def without_main_grad(layer_of):
    layer_of.output_layer.gradient_accumulation_fusion = True


def test_fusion_without_main_grad_is_an_error():
    with pytest.raises(RankError, match="expected weight.main_grad"):
        run_ranks(1, refused, without_main_grad)


def frozen():
    """A LoRA run: the output layer's weight wants no gradient."""
    init()
    results = []
    for head in (None, HEAD):
        model = language_model()
        gpt_of(model).output_layer.weight.requires_grad_(False)
        arguments, targets = inputs()
        with fused_cross_entropy(model, head=head):
            losses = model(*arguments, **targets)
        losses.sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((losses.detach(), grads, gpt_of(model).output_layer.weight.grad))
    return results


def test_a_frozen_weight_gets_no_gradient():
    (own, own_grads, _), (ours, grads, none) = run_ranks(1, frozen)[0]
    assert none is None
    torch.testing.assert_close(ours, own, **CLOSE)
    for name, grad in own_grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


def with_an_adapter(gpt):
    class Adapted(type(gpt.output_layer)):
        def forward(self, *args, **kwargs):
            out, bias = super().forward(*args, **kwargs)
            return out * 2, bias

    gpt.output_layer.__class__ = Adapted


def reducing_nothing(gpt):
    gpt.output_layer.disable_grad_reduce = True


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            with_an_adapter,
            "expected Megatron's ColumnParallelLinear as output layer, got .*Adapted",
        ),
        (reducing_nothing, "expected an output layer with disable_grad_reduce=False"),
    ],
)
def test_an_output_layer_that_does_more_is_refused(prepare, message):
    with pytest.raises(RankError, match=message):
        run_ranks(1, refused, prepare)


def deferred():
    init()
    cfg = config(**runs.SHAPE)
    cfg.defer_embedding_wgrad_compute = True
    model = build_model(cfg, runs.VOCAB, runs.SEQ)
    make_forward_step(next, head=HEAD)(iter(runs.micro_batches()), model)


def test_deferred_weight_gradients_are_refused():
    with pytest.raises(RankError, match="LinearHead with defer_embedding_wgrad_compute=True"):
        run_ranks(1, deferred)


@pytest.mark.parametrize(
    "given",
    [{"chunk_rows": 0}, {"multiple": 0}, {"rows": 1.5}, {"rows": True}, {"rows": 8, "multiple": 4}],
    ids=str,
)
def test_errors_of_the_head(given):
    with pytest.raises(ValueError, match="expected"):
        LinearHead(**given)


def too_few_rows():
    init()
    model = language_model()
    return step(model, fused_cross_entropy(model, head=LinearHead(rows=2)))


def test_more_scored_positions_than_rows():
    with pytest.raises(RankError, match="expected at most rows=2 scored tokens, got"):
        run_ranks(1, too_few_rows)


def one_number():
    init()
    model = language_model()
    return [
        step(model, fused_cross_entropy(model, head=head))
        for head in (HEAD, LinearHead(rows=runs.SEQ * runs.BATCH), LinearHead(multiple=7))
    ]


def test_rows_that_fill_up_change_nothing():
    (losses, grads), *others = run_ranks(1, one_number)[0]
    for other_losses, other_grads in others:
        torch.testing.assert_close(other_losses, losses, **CLOSE)
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, **CLOSE, msg=name)


def test_the_count_of_a_cpu_tensor():
    assert HostCount(torch.tensor([True, False, True]).sum()).value() == 2
