"""Trap: torch.compile or checkpoint_wrapper around the model whose loss is replaced, or in it."""

import pytest
import torch
from test_megatron_replaced_loss import CLOSE, inputs, language_model, step
from tiers import sampled

from bench.megatron_cpu import init, run_ranks
from fused_sft_loss.megatron import (
    ResponseOnlyHead,
    fused_cross_entropy,
    make_forward_step,
    wrappers,
)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_inside(model):
    """A Float16Module around a compiled GPTModel."""
    model.module = torch.compile(model.module, backend="eager")
    return model


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


WHOLE = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled inside": compiled_inside,
    "checkpointed": checkpointed,
    "both": lambda model: checkpointed(torch.compile(model, backend="eager")),
}


def refused():
    """The message for every wrapper of a whole model, in both ways to replace its loss."""
    init()
    messages = {}
    for name, wrap in WHOLE.items():
        model = wrap(language_model(torch.bfloat16))
        arguments, targets = inputs()
        batch = {"tokens": arguments[0], "position_ids": arguments[1], "attention_mask": None}
        for way in ("context", "in place"):
            try:
                if way == "context":
                    with fused_cross_entropy(model):
                        model(*arguments, **targets)
                else:
                    make_forward_step(next, in_place=True)(iter([batch]), model)
            except NotImplementedError as error:
                messages[name, way] = str(error)
    return messages


def test_trap_a_wrapper_of_the_whole_model_is_refused():
    messages = run_ranks(1, refused)[0]
    assert len(messages) == 2 * len(WHOLE), messages.keys()
    for (name, _), message in messages.items():
        word = "torch.compile" if name.startswith("compiled") else "checkpoint_wrapper"
        assert f"expected the model itself, got one under {word}" in message
        assert "model.decoder.layers" in message


def of_layers(wrap, head):
    """The model's own step, and the fused one with a wrapper in every layer."""
    init()
    model = language_model()
    own = step(model)
    layers = model.decoder.layers
    for number, layer in enumerate(layers):
        if wrap == "compiled":
            layers[number] = WHOLE["compiled"](layer)
        else:  # the layer's backward would need more of CUDA than these tests imitate
            layer.mlp = checkpointed(layer.mlp)
    losses, gradients = step(model, fused_cross_entropy(model, head=head))
    for inner in (wrappers.COMPILED, wrappers.CHECKPOINTED):
        gradients = {name.replace(f"{inner}.", ""): grad for name, grad in gradients.items()}
    return own, (losses, gradients), inputs()[1]["loss_mask"]


@pytest.mark.parametrize("head", [None, ResponseOnlyHead()], ids=["all positions", "response only"])
@pytest.mark.parametrize("wrap", sampled(["checkpointed", "compiled"], ["checkpointed"]))
def test_wrappers_of_layers_change_nothing(wrap, head):
    (own, own_grads), (fused, grads), mask = run_ranks(1, of_layers, wrap, head)[0]
    torch.testing.assert_close(fused, torch.where(mask != 0, own, 0.0), **CLOSE)
    assert grads.keys() == own_grads.keys()
    for name, grad in own_grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


def logits_of_a_compiled_model():
    """make_forward_step without in_place only calls the model."""
    init()
    model, losses = language_model(torch.bfloat16), []
    arguments, targets = inputs()
    batch = {"tokens": arguments[0], "position_ids": arguments[1], "attention_mask": None}
    for called in (model, WHOLE["compiled"](model)):
        output, loss_func = make_forward_step(next)(iter([batch | {"loss_mask": None}]), called)
        losses.append(loss_func(output)[0].item())
    return losses


@pytest.mark.long
def test_a_compiled_model_that_returns_logits():
    eager, compiled = run_ranks(1, logits_of_a_compiled_model)[0]
    # Under torch.compile, Float16Module of megatron-core 0.14 leaves the logits in bf16.
    assert compiled == pytest.approx(eager, rel=1e-3)
