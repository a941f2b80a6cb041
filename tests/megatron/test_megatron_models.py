"""`fused_cross_entropy` on other models than a plain GPTModel, and masks that come late."""

import importlib
from contextlib import nullcontext

import megatron_runs as runs
import pytest
import torch
from test_megatron_conventions import Returning
from test_megatron_replaced_loss import CLOSE, HEADS, inputs, language_model, step

from bench.megatron_cpu import RankError, config, init, layer_spec, run_ranks
from fused_sft_loss.megatron import fused_cross_entropy, make_forward_step


class VisionModel(torch.nn.Module):
    """Like LLaVAModel: embeds the tokens itself, and holds a GPTModel as `language_model`."""

    def __init__(self, language, name="language_model"):
        super().__init__()
        self.name = name
        self.add_module(name, language)

    def forward(self, tokens, positions, attention_mask, labels=None, loss_mask=None, **more):
        language = getattr(self, self.name)
        embedded = language.embedding(input_ids=tokens, position_ids=positions)
        return language(None, None, attention_mask, decoder_input=embedded, labels=labels, **more)


class Wrapper(torch.nn.Module):
    """Like DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **keywords):
        return self.module(*arguments, **keywords)


def hybrid_model():
    """A HybridModel (0.19), or a MambaModel (before), of attention layers: no Mamba on a CPU."""
    cfg = config(**runs.SHAPE)
    try:
        part = importlib.import_module("megatron.core.models.hybrid.hybrid_block")
        models = importlib.import_module("megatron.core.models.hybrid.hybrid_model")
        stack, parts, model = part.HybridStack, part.HybridStackSubmodules, models.HybridModel
        layers = {"hybrid_layer_pattern": "**"}
    except ImportError:
        part = importlib.import_module("megatron.core.ssm.mamba_block")
        models = importlib.import_module("megatron.core.models.mamba.mamba_model")
        stack, parts, model = part.MambaStack, part.MambaStackSubmodules, models.MambaModel
        layers = {"hybrid_override_pattern": "**", "hybrid_attention_ratio": 1.0}
    from megatron.core.transformer.spec_utils import ModuleSpec

    part.TENorm = lambda config, hidden_size, eps=1e-5: torch.nn.LayerNorm(hidden_size, eps)
    spec = ModuleSpec(module=stack, submodules=parts(attention_layer=layer_spec(cfg)))
    torch.manual_seed(0)
    return model(cfg, spec, runs.VOCAB, runs.SEQ, parallel_output=True, **layers)


MODELS = {
    "vision": lambda: Wrapper(VisionModel(language_model())),
    "hybrid": hybrid_model,
}


def losses_and_grads(model, context):
    """Of one batch. The mask is the context's, because these models do not hand theirs on."""
    arguments, targets = inputs()
    model.zero_grad()
    with context:
        losses = model(*arguments, labels=targets["labels"])
    (losses * targets["loss_mask"]).sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def own_and_fused(kind, head):
    init()
    model, mask = MODELS[kind](), inputs()[1]["loss_mask"]
    fused = fused_cross_entropy(model, loss_mask=mask, head=HEADS[head])
    return losses_and_grads(model, nullcontext()), losses_and_grads(model, fused), mask


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_the_models_own(kind, head):
    (own, own_grads), (fused, grads), mask = run_ranks(1, own_and_fused, kind, head)[0]
    torch.testing.assert_close(fused, torch.where(mask != 0, own, 0.0), **CLOSE)
    assert grads.keys() == own_grads.keys()
    for name, grad in own_grads.items():
        torch.testing.assert_close(grads[name], grad, **CLOSE, msg=name)


def held_elsewhere():
    init()
    model = Wrapper(VisionModel(language_model(), name="thinker"))
    with fused_cross_entropy(model):
        pass


def test_a_language_model_under_another_name_is_named():
    with pytest.raises(RankError) as caught:
        run_ranks(1, held_elsewhere)
    kind, message = caught.value.exceptions[0]
    assert kind == "TypeError"
    assert "got Wrapper, which holds one as module.thinker: pass that" in message


def with_a_loss_of_the_trainers():
    """Like Primus' enable_fused_linear_ce: GPTModel's end is replaced by chunks of the sequence."""
    init()
    from megatron.core.models.gpt.gpt_model import GPTModel

    def postprocess(self, hidden_states, labels, **_):
        weight, losses = self.output_layer.weight, []
        for hidden, part in zip(hidden_states.chunk(2), labels.chunk(2, dim=1), strict=True):
            losses.append(self.compute_language_model_loss(part, hidden @ weight.t()))
        return torch.cat(losses, dim=1)

    GPTModel._postprocess = postprocess
    model = language_model()
    step(model)  # the trainer's own loss runs
    step(model, fused_cross_entropy(model))


def test_trap_another_fused_loss_is_switched_on():
    with pytest.raises(RankError) as caught:
        run_ranks(1, with_a_loss_of_the_trainers)
    kind, message = caught.value.exceptions[0]
    assert kind == "RuntimeError" and "nothing to replace" in message
    for option in ("enable_fused_linear_ce=false", "FUSED_LINEAR_CE=1", "fused_ce_mode=0"):
        assert option in message


def late_masks(head):
    """Losses where the mask is a function: called in each forward, with labels only."""
    init()
    model, (arguments, targets) = language_model(), inputs()
    mask = targets.pop("loss_mask")
    with fused_cross_entropy(model, loss_mask=mask, head=HEADS[head]):
        wanted = model(*arguments, **targets)
    loaded = []
    with fused_cross_entropy(model, loss_mask=lambda: loaded[-1], head=HEADS[head]):
        model(*arguments)
        losses = []
        for late in (mask, None):
            loaded.append(late)  # as a trainer's forward step does
            losses.append(model(*arguments, **targets))
            losses.append(model(*arguments, loss_mask=mask, **targets))
    return wanted, mask, losses


@pytest.mark.parametrize("head", HEADS)
def test_a_mask_that_is_loaded_after_the_context_is_open(head):
    wanted, mask, losses = run_ranks(1, late_masks, head)[0]
    assert torch.equal(losses[0], wanted) and torch.equal(losses[1], wanted)
    assert (losses[2] != 0).all(), "None, and none from the model: all positions"
    assert torch.equal(losses[3], wanted), "None: the mask that the model is called with"
    assert not wanted[mask == 0].any()


def bad_late_mask(what):
    parallel = init(tp=2)
    model, (arguments, targets) = language_model(), inputs()
    mask, second = targets.pop("loss_mask"), parallel.get_tensor_model_parallel_rank() == 1
    wrong = {"number": 1.0, "values": mask.roll(1)}[what]
    with fused_cross_entropy(model, loss_mask=lambda: wrong if second else mask):
        model(*arguments, **targets)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("number", r"loss_mask(): expected a mask [b, s] or None, got float"),
        ("values", "got other loss_mask on ranks [1] than on ranks [0]"),
    ],
)
def test_a_late_mask_that_is_wrong_on_one_rank_stops_all(what, says):
    with pytest.raises(RankError) as caught:
        run_ranks(2, bad_late_mask, what, timeout=60)
    assert sorted(caught.value.exceptions) == [0, 1]
    assert all(says in message for _, message in caught.value.exceptions.values())


def test_trap_shifted_labels_are_shifted_again():
    """The loss would be that of the token after the next one, without an error."""
    tokens = torch.tensor([[3, 4, 5, 6], [7, 8, 8, 9]])
    shifted = tokens.roll(-1, 1)
    shifted[:, -1] = -100
    batch = {"tokens": tokens, "position_ids": tokens, "attention_mask": None, "labels": shifted}

    model = Returning(torch.randn(2, 4, 10))
    with pytest.raises(ValueError, match=r"expected labels that are not shifted.*shift=False"):
        make_forward_step(lambda _: batch)(None, model)
    masked = torch.where(tokens > 5, tokens, -100)  # labels of the response only
    for labels in (tokens.clone(), masked, torch.full_like(tokens, -100), tokens.flip(0)):
        make_forward_step(lambda _, labels=labels: {**batch, "labels": labels})(None, model)
    make_forward_step(lambda _: batch, shift=False)(None, model)
