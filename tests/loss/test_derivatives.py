"""Promise: every input that requires a gradient gets the right one, or the call is an error."""

import pytest
import torch
from backends import BUILT

import fused_sft_loss as fsl

LABELS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
one_reads = pytest.mark.parametrize("one_read", [False, True] if "cpu" in BUILT else [False])


def logits():
    return torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_mask_that_wants_a_gradient_is_refused(backend, reduction):
    mask = torch.rand(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="loss_mask without requires_grad.*detach"):
        fsl.sft_loss(logits(), LABELS, mask, backend=backend, reduction=reduction)
    with torch.no_grad():
        fsl.sft_loss(logits(), LABELS, mask, backend=backend, reduction=reduction)


def test_the_advice_for_weights_that_are_learnt():
    """The code that the error recommends has the gradient (loss_i - mean) / sum of weights."""
    weights = torch.rand(2, 4, requires_grad=True)
    losses = fsl.sft_loss(logits(), LABELS, reduction="none")[:, :-1]
    mean = (losses * weights).sum() / weights.sum()
    (grad,) = torch.autograd.grad(mean, weights)
    torch.testing.assert_close(grad, ((losses - mean) / weights.sum()).detach())


@pytest.mark.parametrize("name", ["logit_scale", "label_smoothing", "softcap", "z_loss"])
def test_options_that_want_a_gradient_are_refused(name):
    value = torch.tensor(0.5, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match=f"expected {name}"):
        fsl.sft_loss(logits(), LABELS, **{name: value})


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logit_scale_as_a_tensor(dtype, softcap, backend):
    """A tensor gives the same bits of loss and gradient as the same number."""
    results = []
    for scale in (0.75, torch.tensor(0.75, dtype=dtype)):
        leaf = logits().requires_grad_()
        options = {"logit_scale": scale, "softcap": softcap, "backend": backend}
        loss = fsl.sft_loss(leaf, LABELS, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for number, tensor in zip(*results, strict=True):
        assert torch.equal(number, tensor)


def test_a_logit_scale_that_changes_is_compiled_once():
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda x, scale: fsl.sft_loss(x * 1, LABELS, logit_scale=scale),
        fullgraph=True,
        backend=compiler,
    )
    for scale in (1.0, 0.9, 0.5):
        compiled, eager = (logits().requires_grad_() for _ in range(2))
        step(compiled, torch.tensor(scale)).backward()
        fsl.sft_loss(eager, LABELS, logit_scale=torch.tensor(scale).item()).backward()
        assert torch.equal(compiled.grad, eager.grad)
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="logit_scale positive"):
        step(logits(), torch.tensor(-1.0))


@pytest.mark.parametrize(
    "scale", [torch.ones(1), torch.tensor(1.0, device="meta")], ids=["1-d", "not on the CPU"]
)
def test_logit_scale_that_cannot_be_read_is_refused(scale):
    with pytest.raises(ValueError, match="0-d CPU tensor"):
        fsl.sft_loss(logits(), LABELS, logit_scale=scale)


@one_reads
def test_torch_func_grad(one_read):
    leaf = logits().requires_grad_()
    fsl.sft_loss(leaf * 1.5, LABELS).backward()
    options = {"grad_in_forward": one_read}
    grad = torch.func.grad(lambda x: fsl.sft_loss(x * 1.5, LABELS, **options))(logits())
    assert torch.equal(grad, leaf.grad)


def twice_by_create_graph(loss):
    leaf = logits().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    grad.square().sum().backward()


SECOND_DERIVATIVES = {
    "create_graph": twice_by_create_graph,
    "hvp": lambda loss: torch.autograd.functional.hvp(loss, logits(), logits()),
    "torch.func": lambda loss: torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(logits()),
}


@one_reads
@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
def test_a_second_derivative_is_refused_not_zero(way, one_read):
    with pytest.raises(NotImplementedError, match="expected one derivative"):
        SECOND_DERIVATIVES[way](lambda x: fsl.sft_loss(x, LABELS, grad_in_forward=one_read))


@one_reads
def test_a_first_derivative_with_create_graph(one_read):
    """Some trainers pass create_graph and never use the graph. They still get the gradient."""
    grads = []
    for create_graph in (False, True):
        leaf = logits().requires_grad_()
        loss = fsl.sft_loss(leaf, LABELS, grad_in_forward=one_read)
        grads += torch.autograd.grad(loss, leaf, create_graph=create_graph)
    assert torch.equal(grads[0], grads[1].detach())
