"""Promise: in place is right or refused, inside any graph, hooks or views."""

import pytest
import torch
from backends import BUILT
from tiers import sampled_runs
from torch.utils.checkpoint import checkpoint

import fused_sft_loss as fsl

IN_PLACE = {"inplace_backward": True}
ONE_READ = {"inplace_backward": True, "grad_in_forward": True}
MODES = [IN_PLACE, ONE_READ] if "cpu" in BUILT else [IN_PLACE]
#: Operators that save their result, the logits' memory, for backward. `mul` does not.
MAKERS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp}
MAKERS |= {"softmax": lambda x: x.softmax(-1), "mul": lambda x: x * 1.5}
LABELS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
modes = pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode))


def leaf():
    return torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()


def plain_loss(logits):
    """The same loss by PyTorch alone, in float64."""
    rows = logits[:, :-1].double().transpose(1, 2)
    return torch.nn.functional.cross_entropy(rows, LABELS[:, 1:])


def assert_gradient(step, plain_step, **tolerances):
    """`step` gives every element of the leaf the gradient that `plain_step` gives in float64."""
    got, want = leaf(), leaf().detach().double().requires_grad_()
    step(got).backward()
    plain_step(want).backward()
    torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-7, **tolerances)


# --- inside a graph -------------------------------------------------------------------------------


COMPILED = [(m, compiler) for compiler in ("aot_eager", "inductor") for m in sorted(MAKERS)]


@modes
@pytest.mark.parametrize(
    ("maker", "compiler"), sampled_runs(COMPILED, lambda run: "aot_eager" in run or "tanh" in run)
)
def test_compiled_operators_that_keep_their_result(maker, compiler, mode):
    torch._dynamo.reset()
    make = MAKERS[maker]
    step = torch.compile(
        lambda x: fsl.sft_loss(make(x), LABELS, **mode), fullgraph=True, backend=compiler
    )
    assert_gradient(step, lambda x: plain_loss(make(x)))


@modes
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_auxiliary_loss_of_the_same_logits(order, mode):
    torch._dynamo.reset()

    def step(x, loss):
        logits = x * 1.5
        parts = [lambda: logits.square().mean(), lambda: loss(logits)]
        return sum(part() for part in (parts if order == "before" else parts[::-1]))

    compiled = torch.compile(
        lambda x: step(x, lambda z: fsl.sft_loss(z, LABELS, **mode)),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_gradient(compiled, lambda x: step(x, plain_loss))


@modes
@pytest.mark.parametrize("detached", [False, True])
def test_compiled_function_that_returns_the_logits(detached, mode):
    torch._dynamo.reset()
    seen = []

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x):
        logits = x * 1.5
        loss = fsl.sft_loss(logits, LABELS, **mode)
        return loss, logits.detach() if detached else logits

    def step(x):
        loss, logits = both(x)
        seen.append(logits)
        return loss

    assert_gradient(step, lambda x: plain_loss(x * 1.5))
    assert torch.equal(seen[0], leaf() * 1.5)  # the caller's logits are not overwritten


@modes
def test_compiled_slice_with_the_default_compiler(mode):
    """The logits are a slice, which Inductor gives a new layout."""
    torch._dynamo.reset()
    wide = torch.randn(2, 5, 53)

    def step(x, loss):
        return loss((torch.cat([x, wide[..., 50:].to(x.dtype)], -1) * 1.5)[..., 1:51])

    compiled = torch.compile(
        lambda x: step(x, lambda z: fsl.sft_loss(z, LABELS, **mode)), fullgraph=True
    )
    assert_gradient(compiled, lambda x: step(x, plain_loss))


@modes
def test_loss_in_place_over_what_a_compiled_model_returned(mode):
    """The model's graph saves its result, so autograd's version counter raises."""
    torch._dynamo.reset()
    model = torch.compile(torch.tanh, fullgraph=True, backend="aot_eager")
    loss = fsl.sft_loss(model(leaf()), LABELS, **mode)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@modes
@pytest.mark.parametrize("maker", ["tanh", "mul"])
def test_compiled_autograd(maker, mode):
    """Backward is compiled separately from forward, in which one read has written already."""
    torch._dynamo.reset()
    make = MAKERS[maker]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        if maker == "tanh" and mode == ONE_READ:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                fsl.sft_loss(make(leaf()), LABELS, **mode).backward()
            return
        assert_gradient(
            lambda x: fsl.sft_loss(make(x), LABELS, **mode), lambda x: plain_loss(make(x))
        )


@modes
@pytest.mark.parametrize("maker", sorted(set(MAKERS) - {"mul"}))
def test_operators_that_keep_their_result_raise_in_eager_mode(maker, mode):
    loss = fsl.sft_loss(MAKERS[maker](leaf()), LABELS, **mode)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- under hooks ----------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("maker", ["tanh", "mul"])
def test_non_reentrant_checkpointing_is_refused(maker, mode):
    def step(x):
        return fsl.sft_loss(MAKERS[maker](x), LABELS, **mode)

    with pytest.raises(ValueError, match="saved_tensors_hooks.*checkpoint"):
        checkpoint(step, leaf(), use_reentrant=False)


@modes
def test_loss_outside_of_a_checkpointed_model(mode):
    """Backward recomputes the model from its input, so the overwritten logits are not used."""
    assert_gradient(
        lambda x: fsl.sft_loss(checkpoint(torch.tanh, x, use_reentrant=False), LABELS, **mode),
        lambda x: plain_loss(torch.tanh(x)),
    )


@modes
def test_reentrant_checkpointing(mode):
    assert_gradient(
        lambda x: checkpoint(
            lambda x: fsl.sft_loss(x * 1.5, LABELS, **mode), x, use_reentrant=True
        ),
        lambda x: plain_loss(x * 1.5),
    )


def same(tensor):
    return tensor


@modes
@pytest.mark.parametrize(
    "hooks",
    [
        lambda: torch.autograd.graph.saved_tensors_hooks(same, same),
        torch.autograd.graph.save_on_cpu,
    ],
    ids=["saved_tensors_hooks", "save_on_cpu"],
)
def test_hooks_around_the_loss_are_refused(hooks, mode):
    logits = leaf() * 1.5
    with hooks(), pytest.raises(ValueError, match="expected no inplace_backward under saved_ten"):
        fsl.sft_loss(logits, LABELS, **mode)


class KeepsItsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        result = x.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


@modes
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("make", [torch.tanh, KeepsItsResult.apply], ids=["operator", "Function"])
@pytest.mark.parametrize("pack", [same, lambda tensor: ("kept", tensor)], ids=["same", "packed"])
def test_logits_that_their_operator_saved_under_hooks_are_refused(pack, make, view, mode):
    def unpack(packed):
        return packed if isinstance(packed, torch.Tensor) else packed[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        logits = make(leaf())
    with pytest.raises(ValueError, match="saved for its backward under saved_tensors_hooks"):
        fsl.sft_loss(logits.view_as(logits) if view else logits, LABELS, **mode)


@modes
def test_hooks_upstream_that_saved_other_tensors_are_no_trouble(mode):
    """Activation offloading of a model's layers does this."""

    def step(x, loss):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), same):
            logits = x @ torch.eye(50, dtype=x.dtype).mul(1.5) * x.tanh()
        return loss(logits)

    assert_gradient(
        lambda x: step(x, lambda z: fsl.sft_loss(z, LABELS, **mode)), lambda x: step(x, plain_loss)
    )


@modes
def test_a_second_backward_raises(mode):
    loss = fsl.sft_loss(leaf() * 1.5, LABELS, **mode)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@modes
def test_transforms_are_refused(mode):
    with pytest.raises(ValueError, match="torch.func"):
        torch.func.grad(lambda x: fsl.sft_loss(x * 1.5, LABELS, **mode))(leaf().detach())


@modes
def test_nothing_is_refused_where_nothing_is_written(mode):
    """An evaluation with the options of training, under hooks."""
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(same, same):
        loss = fsl.sft_loss(leaf(), LABELS, **mode)
    torch.testing.assert_close(loss.double(), plain_loss(leaf()), check_dtype=False)


# --- whose memory ---------------------------------------------------------------------------------

VIEWS_OF_A_LEAF = {
    "view_as": lambda x: x.view_as(x),
    "slice": lambda x: x[:, :],
    "part": lambda x: x[:1, :, 3:],
    "transpose": lambda x: x.transpose(0, 1),
    "view of a view": lambda x: x.flatten().view(2, 5, 50),
}


@modes
@pytest.mark.parametrize("name", VIEWS_OF_A_LEAF)
def test_views_of_a_leaf_are_refused(name, mode):
    logits = VIEWS_OF_A_LEAF[name](leaf())
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    with pytest.raises(ValueError, match="expected non-leaf logits.*a view of a leaf"):
        fsl.sft_loss(logits, labels, **mode)


@modes
@pytest.mark.parametrize("stride", [1, 7, 49])
def test_rows_that_overlap_are_refused(stride, mode):
    logits = (torch.randn(1, 400, requires_grad=True) * 1).unfold(1, 50, stride)
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    with pytest.raises(ValueError, match="rows do not share memory"):
        fsl.sft_loss(logits, labels, **mode)


@modes
def test_rows_that_interleave_without_overlap_are_taken(mode):
    def step(x, loss):
        return loss(torch.cat([x, x], -1)[..., 20:70].transpose(0, 1).contiguous().transpose(0, 1))

    assert_gradient(
        lambda x: step(x, lambda z: fsl.sft_loss(z, LABELS, **mode)), lambda x: step(x, plain_loss)
    )


# --- hooks on the logits --------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("when", ["before the loss", "before backward", "after backward"])
@pytest.mark.parametrize("view", [False, True])
def test_hooks_on_the_logits(view, when, mode):
    """torch 2.13 crashes in register_hook on a view whose memory was written to."""
    base = leaf() * 1.5
    logits = base.view(2, 5, 50) if view else base
    seen = []

    def register(now):
        if now == when:
            logits.register_hook(lambda grad: seen.append(grad.clone()))

    register("before the loss")
    loss = fsl.sft_loss(logits, LABELS, **mode)
    register("before backward")
    loss.backward()
    register("after backward")
    assert len(seen) == (when != "after backward")
    want = (leaf().detach().double() * 1.5).requires_grad_()
    plain_loss(want).backward()
    for grad in seen:
        torch.testing.assert_close(grad.double(), want.grad, rtol=1e-5, atol=1e-7)
