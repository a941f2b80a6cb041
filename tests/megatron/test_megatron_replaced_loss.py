"""`fused_cross_entropy`: the losses are the model's own, and the model is restored."""

import megatron_runs as runs
import pytest
import torch

from bench.megatron_cpu import build_model, config, init, layer_spec, run_ranks
from fused_sft_loss import shift_targets
from fused_sft_loss.megatron import (
    LinearHead,
    ResponseOnlyHead,
    fused_cross_entropy,
    make_forward_step,
    reports,
    versions,
    wrappers,
)

HEADS = {"all positions": None, "response only": ResponseOnlyHead(multiple=4)}
HEADS["linear"] = LinearHead(chunk_rows=3, multiple=4)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def language_model(dtype=torch.float32, mtp=None, seed=0, **options):
    """A tiny GPTModel, wrapped for `dtype`; with `mtp` layers of multi-token prediction."""
    more = {}
    cfg = config(dtype, **runs.SHAPE, mtp_num_layers=mtp, mtp_loss_scaling_factor=0.3, **options)
    if mtp:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        more["mtp_block_spec"] = get_gpt_mtp_block_spec(
            cfg, layer_spec(cfg), use_transformer_engine=False
        )
    return build_model(cfg, runs.VOCAB, runs.SEQ, seed=seed, **more)


def inputs(number=0):
    """((tokens, positions, None), {"labels", "loss_mask"}), shifted as Megatron's datasets do."""
    batch = runs.micro_batches()[number]
    labels, mask = shift_targets(batch["tokens"], batch["loss_mask"], ignore_index=0)
    return (batch["tokens"], batch["position_ids"], None), {"labels": labels, "loss_mask": mask}


def step(model, context=None):
    """(losses, gradients by name) of one batch; the loss is that of a trainer's loss_func."""
    arguments, targets = inputs()
    model.zero_grad()
    if context is None:
        losses = model(*arguments, **targets)
    else:
        with context:
            losses = model(*arguments, **targets)
    loss = losses.view(-1) * targets["loss_mask"].view(-1)
    loss.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def own_and_fused(tp, head, mtp):
    """The step with Megatron's cross-entropy and with ours, and the MTP losses that it logged."""
    init(tp)
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    model, results = language_model(mtp=mtp), []
    for fused in (False, True):
        context = fused_cross_entropy(model, head=HEADS[head]) if fused else None
        results.append(step(model, context))
        tracker = MTPLossLoggingHelper.tracker
        results[-1] += ([v.clone() for v in tracker.values() if isinstance(v, torch.Tensor)],)
        tracker.clear()
    return results, inputs()[1]["loss_mask"]


@pytest.mark.parametrize("mtp", [None, 2])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tp", [1, 2])
def test_losses_and_gradients_are_the_models_own(tp, head, mtp):
    """The losses of multi-token prediction keep their bits."""
    for results, mask in run_ranks(tp, own_and_fused, tp, head, mtp):
        (own, own_grads, own_mtp), (fused, fused_grads, fused_mtp) = results
        assert fused.dtype == torch.float32 and fused.is_contiguous()
        torch.testing.assert_close(fused, torch.where(mask != 0, own, 0.0), **CLOSE)
        for name, grad in own_grads.items():
            torch.testing.assert_close(fused_grads[name], grad, **CLOSE, msg=name)
        assert bool(own_mtp) == bool(mtp)
        assert all(map(torch.equal, own_mtp, fused_mtp))


def trained_in_place():
    """Gradients with multi-token prediction: Megatron's own loss, and make_forward_step's."""
    init()
    model, batch = language_model(mtp=2), runs.micro_batches()[0]
    own = step(model)[1]
    model.zero_grad()
    output, loss_func = make_forward_step(next, in_place=True)(iter([batch]), model)
    loss_func(output)[0].backward()
    return own, {n: p.grad for n, p in model.named_parameters()}


def test_multi_token_prediction_gets_shifted_labels_from_unshifted_ones():
    own, ours = run_ranks(1, trained_in_place)[0]
    for name, grad in own.items():
        torch.testing.assert_close(ours[name], grad, **CLOSE, msg=name)


def each_way_of_backward():
    """The fused step for each option of where and when the logits' gradient is written."""
    init()
    model = language_model(torch.bfloat16)
    ways = [{}, {"inplace_backward": True}, {"grad_in_forward": 1.0}]
    ways.append({"grad_in_forward": 1.0, "inplace_backward": True})
    return [step(model, fused_cross_entropy(model, **options)) for options in ways]


def test_gradients_do_not_depend_on_where_they_are_written():
    (losses, grads), *others = run_ranks(1, each_way_of_backward)[0]
    for other_losses, other_grads in others:
        assert torch.equal(losses, other_losses)
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def seen_by_the_loss(dtype, in_place):
    """(dtype, shape) of the logits in the loss, and whether the output layer wrote them there."""
    init()
    model, seen, layers = language_model(dtype), [], []
    gpt = list(wrappers.wrapped(model))[-1]
    gpt.output_layer.register_forward_hook(lambda module, args, out: layers.append(out[0]))
    of = reports.Sums.of
    reports.Sums.of = lambda logits, *args: seen.append(logits) or of(logits, *args)
    batch = runs.micro_batches()[0]
    output, loss_func = make_forward_step(next, in_place=in_place)(iter([batch]), model)
    loss_func(output)
    (logits,), (written,) = seen, layers
    return logits.dtype, tuple(logits.shape), logits.data_ptr() == written.data_ptr()


def test_in_place_reads_what_the_output_layer_wrote():
    """No transpose copy, no cast: the same memory, [s, b, v] in bf16."""
    got = run_ranks(1, seen_by_the_loss, torch.bfloat16, True)[0]
    assert got == (torch.bfloat16, (runs.SEQ, runs.BATCH, runs.VOCAB), True)
    _, shape, same = run_ranks(1, seen_by_the_loss, torch.bfloat16, False)[0]
    assert shape == (runs.BATCH, runs.SEQ, runs.VOCAB) and not same, "the copy there is without it"


def with_poisoned_rows():
    """Loss and gradient of the hidden states with NaN in the logits of every masked position."""
    init()
    model, results = language_model(), []
    for poison in (False, True):
        arguments, targets = inputs()
        masked = (targets["loss_mask"] == 0).t().unsqueeze(-1)

        def hook(module, args, out, masked=masked, poison=poison):
            return (torch.where(masked & poison, torch.nan, out[0]), out[1])

        handle = model.output_layer.register_forward_hook(hook)
        results.append(step(model, fused_cross_entropy(model)))
        handle.remove()
    return results


def test_the_mask_reaches_the_kernel():
    """NaN times mask 0 is NaN: a loss that is masked afterwards would not survive this."""
    (clean, clean_grads), (poisoned, poisoned_grads) = run_ranks(1, with_poisoned_rows)[0]
    assert torch.equal(clean, poisoned)
    assert all(torch.equal(clean_grads[n], poisoned_grads[n]) for n in clean_grads)


def state(model):
    """The attributes that could be replaced on the model and on its output layer."""
    gpt = list(wrappers.wrapped(model))[-1]
    return set(vars(gpt)), set(vars(gpt.output_layer)), gpt.output_layer.sequence_parallel


def nested_and_broken():
    init()
    model, other = language_model(), language_model(seed=1)
    before, (arguments, targets) = state(model), inputs()
    own, others = model(*arguments, **targets), other(*arguments, **targets)
    with fused_cross_entropy(model, z_loss=0.1, head=ResponseOnlyHead()):
        outer = model(*arguments, **targets)
        with fused_cross_entropy(model):
            inner = model(*arguments, **targets)
        with pytest.raises(ZeroDivisionError), fused_cross_entropy(model, label_smoothing=0.1):
            raise ZeroDivisionError
        again = model(*arguments, **targets)
        with pytest.raises(IndexError):  # in the model itself: tokens outside the embedding
            model(arguments[0] + runs.VOCAB, *arguments[1:], **targets)
        untouched = torch.equal(other(*arguments, **targets), others)
        logits = model(*arguments)
    restored = state(model) == before and torch.equal(model(*arguments, **targets), own)
    keep = targets["loss_mask"] != 0
    plain = torch.allclose(inner[keep], own[keep], rtol=1e-5)
    differs = not torch.allclose(outer[keep], own[keep], rtol=1e-3)
    return {
        "restored": restored,
        "other model untouched": untouched,
        "innermost counts": plain and differs and torch.equal(outer, again),
        "logits without labels": torch.equal(logits, model(*arguments)),
    }


def test_nested_use_exceptions_and_other_models():
    held = run_ranks(1, nested_and_broken)[0]
    assert all(held.values()), held


def mask_of_the_context():
    """A trainer that does not pass the mask to the model, like Megatron-Bridge; two chunks."""
    init()
    chunks = [language_model(), language_model(seed=1)]
    arguments, targets = inputs()
    mask = targets.pop("loss_mask") / 2  # selects and does not weigh: the trainer multiplies
    own = [chunk(*arguments, **targets) for chunk in chunks]
    with fused_cross_entropy(chunks, loss_mask=mask):
        fused = [chunk(*arguments, **targets) for chunk in chunks]
    with fused_cross_entropy(chunks):
        whole = [chunk(*arguments, **targets) for chunk in chunks]
    return own, fused, whole, mask


def test_mask_given_to_the_context_and_a_list_of_chunks():
    own, fused, whole, mask = run_ranks(1, mask_of_the_context)[0]
    for of_model, masked, unmasked in zip(own, fused, whole, strict=True):
        torch.testing.assert_close(unmasked, of_model, **CLOSE)
        torch.testing.assert_close(masked, torch.where(mask != 0, of_model, 0.0), **CLOSE)


def misused():
    init()
    model, messages = language_model(), {}

    def note(name, call):
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    def enter(*args, **kwargs):
        with fused_cross_entropy(*args, **kwargs):
            pass

    arguments, targets = inputs()

    def inside(**more):
        with fused_cross_entropy(model):
            model(*arguments, **{**targets, **more})

    def plan():
        with fused_cross_entropy(model):
            model.build_schedule_plan(*arguments, **targets)

    note("option", lambda: enter(model, shift=True))
    note("model", lambda: enter(torch.nn.Linear(2, 2)))
    note("head", lambda: enter(model, head=3))
    if not versions.accepts(model, "output_processor"):
        note("plan", plan)
    note("mask", lambda: inside(loss_mask=targets["loss_mask"][:, 1:]))
    note("labels", lambda: inside(labels=targets["labels"] + runs.VOCAB))
    other = language_model()
    loss = other.compute_language_model_loss
    other.forward = lambda *args, labels: loss(labels.clone(), logits)
    logits = torch.zeros(runs.SEQ, runs.BATCH, runs.VOCAB)

    def elsewhere():
        with fused_cross_entropy(other):
            other(labels=targets["labels"])

    note("elsewhere", elsewhere)
    if versions.accepts(model, "output_processor"):
        note("processor", lambda: inside(output_processor=print))
    return messages


def test_errors_of_the_context():
    messages = run_ranks(1, misused)[0]
    assert messages["option"].startswith("TypeError") and "['shift']" in messages["option"]
    assert "compute_language_model_loss" in messages["model"] and "Linear" in messages["model"]
    assert messages["head"].endswith("expected a ResponseOnlyHead or a LinearHead, got int")
    plan = messages.get("plan", "NotImplementedError: from megatron-core 0.18 on")
    assert plan.startswith("NotImplementedError") and "from megatron-core 0.18 on" in plan
    assert "expected loss_mask of the labels' shape [2, 16], got [2, 15]" in messages["mask"]
    assert "expected labels in [0, 64)" in messages["labels"]
    assert messages["elsewhere"].startswith("RuntimeError: GPTModel was called with labels and did")
    assert messages.get("processor", "no output_processor of your own").count("of your own")
