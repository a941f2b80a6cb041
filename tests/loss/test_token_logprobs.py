"""Promise: token_logprobs gives log-probabilities and entropies, both with a gradient, from one
read of the logits forward and one backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import BUILT, ON_CPU, using
from cases import build
from closeness import PRODUCT
from hypothesis import given, settings
from logprob_cases import (
    TEMPERATURES,
    assert_agrees,
    assert_figures,
    call,
    calls,
    oracle,
    temperature_of,
)
from tiers import sampled

import fused_sft_loss as fsl
from bench.memory import MemoryRecord
from fused_sft_loss import scoring

INF = float("inf")
VOCABULARIES = (1, 2, 31, 33, 1000)  # the long test has all


@pytest.mark.parametrize("name", ON_CPU)
@settings(PRODUCT, max_examples=12)
@given(drawn=calls(vocabularies=VOCABULARIES))
def test_values_and_gradients_agree_with_the_oracle(name, drawn):
    with using(name) as backend:
        case, temperature, *upstreams = drawn
        assert_agrees(case, temperature, backend, *upstreams)


@pytest.mark.long
@pytest.mark.parametrize("name", ON_CPU)
@settings(PRODUCT, max_examples=150)
@given(drawn=calls())
def test_more_values_and_gradients_agree_with_the_oracle(name, drawn):
    with using(name) as backend:
        case, temperature, *upstreams = drawn
        assert_agrees(case, temperature, backend, *upstreams)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_sft_loss_without_temperature_and_entropy(name, dtype):
    """A log-probability is a loss with another sign: to the bit, and so is its gradient."""
    case = build("sliced", dtype, 2, 6, 1000, 0, "bool", {})
    upstream = torch.randn(2, 6)
    results = []
    with using(name) as backend:
        for function, sign in ((fsl.token_logprobs, 1), (fsl.sft_loss, -1)):
            leaf = case.storage.clone().requires_grad_()
            options = {} if sign == 1 else {"reduction": "none"}
            given = case.logits(leaf), case.labels, case.loss_mask
            result = function(*given, backend=backend, **options)
            (result * (sign * upstream)).sum().backward()
            results.append((sign * result, leaf.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ON_CPU)
def test_a_number_has_the_bits_of_logit_scale_and_of_the_same_number_for_each_token(name):
    case = build("bsv", torch.bfloat16, 2, 5, 1000, 0, "bool", {})
    results = []
    with using(name) as backend:
        for temperature in (0.5, torch.tensor(0.5), torch.full((2, 5), 0.5)):
            leaf = case.storage.clone().requires_grad_()
            both = call(case, temperature, backend, leaf)
            torch.autograd.backward(both, (torch.ones(2, 5), torch.full((2, 5), 0.3)))
            results.append((*both, leaf.grad))
        scaled = fsl.sft_loss(
            case.storage,
            case.labels,
            case.loss_mask,
            logit_scale=2.0,
            reduction="none",
            backend=backend,
        )
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert torch.allclose(results[0][0], -scaled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_sixteen_bit_gradient_is_that_of_fp32_rounded_once(name):
    case = build("bsv", torch.bfloat16, 2, 5, 1000, 0, "bool", {})
    temperature, upstreams = temperature_of("tokens", case.labels), torch.randn(2, 2, 5)
    grads = []
    with using(name) as backend:
        for dtype in (torch.bfloat16, torch.float32):
            leaf = case.storage.detach().to(dtype).clone().requires_grad_()
            torch.autograd.backward(call(case, temperature, backend, leaf), tuple(upstreams))
            grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1].bfloat16())


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("temperature", ["none", "tokens"])
def test_masked_out_vocabulary_adds_nothing(name, temperature):
    """-inf columns: a leading tile, a whole chunk, all but two. p = 0 gives 0 and not NaN."""
    case = build("bsv", torch.float32, 1, 4, 20000, 0, "none", {"shift": False})
    case.labels[:] = torch.tensor([[19000, 19999, 5, 19000]])
    case.storage[0, 0, :9000] = -INF
    case.storage[0, 1, 8192:16384] = -INF
    case.storage[0, 2] = -INF
    case.storage[0, 2, [5, 12000]] = 1.0
    with using(name) as backend:
        given = temperature_of(temperature, case.labels)
        assert_agrees(case, given, backend, torch.randn(4), torch.randn(4))
        leaf = case.storage.clone().requires_grad_()
        log_probs, entropies = call(case, given, backend, leaf)
        entropies.sum().backward()
    torch.testing.assert_close(entropies[0, 2], torch.tensor(2.0).log())
    torch.testing.assert_close(log_probs[0, 2], -torch.tensor(2.0).log())
    assert (leaf.grad[case.storage == -INF] == 0).all()


@pytest.mark.parametrize("name", ON_CPU)
def test_entropy_of_sure_rows_is_not_negative_and_close(name):
    """Nearly one-hot rows, where lse - sum of p*z would cancel, and logits far from 0."""
    v, gaps = 5000, [0.0, 3.0, 8.0, 12.0, 17.0, 25.0, 60.0, 200.0]
    logits = torch.zeros(1, len(gaps), v)
    logits[0, :, 77] = torch.tensor(gaps)
    labels = torch.full((1, len(gaps)), 77)
    for offset in (0.0, 1024.0, -65536.0):
        leaf = (logits + offset).requires_grad_()
        with using(name) as backend:
            log_probs, entropies = fsl.token_logprobs(
                leaf, labels, shift=False, return_entropy=True, backend=backend
            )
            entropies.sum().backward()
        wanted = leaf.detach().double().requires_grad_()
        log_p = wanted.log_softmax(-1)
        want = -(log_p.exp() * log_p).sum(-1)
        size = 1 + torch.tensor(gaps)
        assert ((entropies - want).abs() <= 2e-6 * size).all()
        assert ((log_probs - log_p[..., 77]).abs() <= 1e-6 * size).all()
        assert (entropies >= -1e-7).all()
        want.sum().backward()
        torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("temperature", [1e-4, 1e3, 1e20])
def test_extreme_temperatures(name, temperature):
    """Each is given as a number and for each token."""
    case = build("bsv", torch.float32, 1, 4, 1000, 3, "none", {"shift": False, "ignore_index": -1})
    case.labels.clamp_(min=0)
    case.labels[0, 0] = case.storage[0, 0].argmax()
    for same in (temperature, torch.full((1, 4), temperature)):
        with using(name) as backend:
            assert_agrees(case, same, backend, torch.randn(4), torch.randn(4))


@pytest.mark.parametrize("name", ON_CPU)
def test_a_mask_selects_and_masked_rows_change_nothing(name):
    """Weights count as 1. NaN in logits, temperature and upstream gradient of masked tokens stays
    there, and so does the temperature 0 of a prompt."""
    case = build("bsv", torch.bfloat16, 2, 6, 500, 0, "float", {"shift": False})
    case.labels.clamp_(min=0)
    masked = case.loss_mask == 0
    assert 0 < masked.sum() < 12
    temperature = temperature_of("tokens", case.labels)
    dirty = case.storage.masked_fill(masked.unsqueeze(-1), float("nan"))
    dirty_temperature = temperature.clone()
    useless = torch.tensor([0.0, float("nan"), -1.0])
    dirty_temperature[masked] = useless[torch.arange(masked.sum()) % 3]
    results = []
    with using(name) as backend:
        for mask, logits, divisor, noise in (
            (case.loss_mask, dirty, dirty_temperature, float("nan")),
            (case.loss_mask != 0, case.storage, temperature, 0.0),
        ):
            leaf = logits.clone().requires_grad_()
            both = fsl.token_logprobs(
                leaf,
                case.labels,
                mask,
                temperature=divisor,
                return_entropy=True,
                shift=False,
                backend=backend,
            )
            upstream = torch.ones(2, 6).masked_fill(masked, noise)
            torch.autograd.backward(both, (upstream, 0.3 * upstream))
            results.append((*both, leaf.grad))
    assert all(map(torch.equal, *results))
    for result in results[0]:
        assert (result[masked] == 0).all() and not result[masked].signbit().any()
        assert result[~masked].isfinite().all() and result[~masked].any()


@pytest.mark.parametrize("name", ON_CPU)
def test_upstream_gradients_of_either_result_alone_and_of_stride_0(name):
    case = build("bsv", torch.float32, 2, 5, 300, 0, "bool", {})
    zero, one = torch.zeros(10), torch.ones(10)
    with using(name) as backend:
        for temperature in (None, temperature_of("tokens", case.labels)):
            for which, upstreams in enumerate([(one, zero), (zero, one)]):
                want = oracle(case, temperature, *upstreams)
                leaf = case.storage.clone().requires_grad_()
                call(case, temperature, backend, leaf)[which].sum().backward()
                grad = leaf.grad.view(10, -1).double()
                torch.testing.assert_close(grad, want.grad, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_detached_entropy_costs_no_bits_of_the_gradient(name):
    case = build("bsv", torch.bfloat16, 2, 5, 300, 0, "bool", {})
    grads = []
    with using(name) as backend:
        for both in (True, False):
            leaf = case.storage.clone().requires_grad_()
            given = leaf, case.labels, case.loss_mask
            result = fsl.token_logprobs(*given, return_entropy=both, backend=backend)
            (result[0] if both else result).mean().backward()
            grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("temperature", ["none", "tokens"])
@pytest.mark.parametrize("name", ON_CPU)
def test_in_place_gradient_has_the_same_bits_and_only_one_backward(name, temperature):
    case = build("sbv", torch.bfloat16, 2, 5, 300, 0, "bool", {})
    given = temperature_of(temperature, case.labels)
    upstreams = tuple(torch.randn(2, 2, 5))
    grads = []
    with using(name) as backend:
        for inplace in (False, True):
            leaf = case.storage.clone().requires_grad_()
            logits = leaf * 1
            both = call(case, given, backend, logits, inplace_backward=inplace)
            torch.autograd.backward(both, upstreams, retain_graph=True)
            grads.append(leaf.grad)
        assert torch.equal(*grads)
        assert torch.equal(logits.detach(), leaf.grad)  # the memory of the logits holds it
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(both, upstreams)


@pytest.mark.parametrize("temperature", ["none", "tokens"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", BUILT)
def test_nothing_else_of_the_size_of_the_logits(backend, inplace, temperature):
    b, s, v = 2, 32, 65536
    labels, size = torch.randint(0, v, (b, s)), b * s * v * 2
    scratch, vectors = {"eager": 64 * 2**20, "cpu": 0}[backend], 64 * 2**10
    given = temperature_of(temperature, labels)
    with MemoryRecord() as record:
        logits = torch.randn(b, s, v).bfloat16().requires_grad_() * 1
        logits.register_hook(lambda grad: record.mark("backward"))
        record.mark("begin")
        both = fsl.token_logprobs(
            logits,
            labels,
            temperature=given,
            return_entropy=True,
            inplace_backward=inplace,
            backend=backend,
        )
        record.mark("forward")
        torch.autograd.backward(both, (torch.ones(b, s), torch.ones(b, s)))
    forward = record.usage("begin", "forward")
    assert forward.peak <= scratch + vectors and forward.held <= vectors
    peak = record.usage("begin", "backward").peak
    assert peak <= (0 if inplace else size) + scratch + vectors


@pytest.mark.parametrize("name", ON_CPU)
def test_a_second_derivative_raises(name):
    case = build("bsv", torch.float32, 1, 4, 50, 0, "none", {})
    with using(name) as backend:
        leaf = case.storage.clone().requires_grad_()
        log_probs, entropies = call(case, None, backend, leaf)
        (grad,) = torch.autograd.grad((log_probs + entropies).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="expected one derivative"):
            grad.sum().backward()


def test_results_have_no_graph_under_no_grad_and_figures_need_no_gradient():
    case = build("bsv", torch.float32, 1, 4, 50, 0, "none", {})
    leaf = case.storage.clone().requires_grad_()
    with torch.no_grad():
        log_probs, entropies = fsl.token_logprobs(leaf, case.labels, return_entropy=True)
    assert not log_probs.requires_grad and not entropies.requires_grad
    assert fsl.token_logprobs(leaf, case.labels).requires_grad


def test_the_documented_lines_are_what_it_computes():
    logits, labels, temperature = torch.randn(2, 6, 40), torch.randint(0, 40, (2, 6)), 0.8
    got = fsl.token_logprobs(logits, labels, temperature=temperature, return_entropy=True)
    z = logits[:, :-1].float() / temperature
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(-1, labels[:, 1:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for result, want in zip(got, (logprobs, entropy), strict=True):
        torch.testing.assert_close(result, F.pad(want, (0, 1)))


@pytest.mark.parametrize("name", ON_CPU)
def test_wrong_values_are_nan_where_the_host_does_not_read_them(name, monkeypatch):
    """A label outside the vocabulary and temperatures that are not positive poison their token."""
    monkeypatch.setattr(scoring, "may_synchronise", lambda tensor: False)
    logits = torch.randn(1, 6, 300)
    labels = torch.tensor([[1, 300, 2, 3, 4, 5]])
    temperature = torch.tensor([[1.0, 1.0, 0.0, -1.0, INF, 2.0]])
    with using(name) as backend:
        leaf = logits.clone().requires_grad_()
        both = fsl.token_logprobs(
            leaf,
            labels,
            temperature=temperature,
            return_entropy=True,
            shift=False,
            backend=backend,
        )
        sum(result.sum() for result in both).backward()
    wrong = [[False, True, True, True, True, False]]
    for result in (*both, leaf.grad.sum(-1)):
        assert result.isnan().tolist() == wrong


def wrong(**given):
    labels = torch.randint(0, 9, (2, 4))
    return lambda: fsl.token_logprobs(torch.randn(2, 4, 9), labels, **given)


def at(index, value):
    temperature = torch.ones(2, 4)
    temperature[index] = value
    return temperature


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"temperature": 0}, ValueError, r"temperature positive.* got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature positive.* got -1.0"),
        ({"temperature": float("nan")}, ValueError, r"temperature positive.* got nan"),
        ({"temperature": INF}, ValueError, r"temperature positive.* got inf"),
        ({"temperature": torch.tensor(0.0)}, ValueError, r"temperature positive.* got 0.0"),
        ({"temperature": True}, TypeError, "expected temperature to be None, a number"),
        ({"temperature": "hot"}, TypeError, "expected temperature to be None, a number"),
        ({"temperature": torch.ones(2, 4).bool()}, TypeError, "real numbers, got torch.bool"),
        ({"temperature": torch.ones(2, 1)}, ValueError, r"labels' shape \[2, 4\], got \[2, 1\]"),
        ({"temperature": torch.ones(4)}, ValueError, r"got \[4\]; for one temperature per sequ"),
        ({"temperature": torch.ones(2, 4, device="meta")}, ValueError, "labels' device cpu, got"),
        ({"temperature": torch.ones(2, 4).requires_grad_()}, ValueError, "temperature.detach()"),
        ({"temperature": at((1, 2), 0.0)}, ValueError, r"got 0.0 at temperature\[1, 2\]; mask"),
        ({"temperature": at((0, 3), -2.0)}, ValueError, r"got -2.0 at temperature\[0, 3\]"),
        ({"temperature": at((0, 1), float("nan"))}, ValueError, r"got nan at temperature\[0, 1\]"),
        ({"return_entropy": 1}, TypeError, "expected return_entropy True or False, got 1"),
        ({"shift": 1}, TypeError, "expected shift to be a bool"),
        ({"vocab_size": 10}, ValueError, "expected at least vocab_size=10 columns"),
    ],
)
def test_wrong_arguments(given, error, message):
    with pytest.raises(error, match=message):
        wrong(**given)()


def test_a_temperature_at_the_first_token_is_ignored_as_that_token_is_never_scored():
    assert wrong(temperature=at((0, 0), 0.0))().isfinite().all()
    with pytest.raises(ValueError, match=r"at temperature\[0, 0\]"):
        wrong(temperature=at((0, 0), 0.0), shift=False)()


@pytest.mark.parametrize("kind", sampled(TEMPERATURES, ("tokens",)))
@pytest.mark.parametrize("backend", sampled(BUILT, BUILT[-1:]))
def test_compiled_step_equals_the_eager_one(backend, kind):
    torch._dynamo.reset()

    def step(x, labels, mask, temperature):
        return fsl.token_logprobs(
            x * 1.5, labels, mask, temperature=temperature, return_entropy=True, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    case = build("bsv", torch.float32, 2, 5, 1000, 0, "float", {})
    results = []
    for function in (step, compiled):
        leaf = case.storage.clone().requires_grad_()
        given = temperature_of(kind, case.labels)
        both = function(leaf, case.labels, case.loss_mask, given)
        torch.autograd.backward(both, (torch.full((2, 5), 0.7), torch.full((2, 5), -0.2)))
        results.append((*both, leaf.grad))
    assert all(map(torch.equal, *results))


def test_compiled_with_a_wrong_0_d_temperature_raises():
    torch._dynamo.reset()
    labels = torch.randint(0, 9, (2, 4))
    compiled = torch.compile(
        lambda x, t: fsl.token_logprobs(x, labels, temperature=t), fullgraph=True, backend="eager"
    )
    assert compiled(torch.randn(2, 4, 9), torch.tensor(0.5)).isfinite().all()
    with pytest.raises(ValueError, match="temperature positive"):
        compiled(torch.randn(2, 4, 9), torch.tensor(-0.5))


def test_vmapped_gradient_of_torch_func():
    case = build("bsv", torch.float32, 2, 5, 60, 0, "bool", {})

    def total(logits):
        log_probs, entropies = fsl.token_logprobs(
            logits, case.labels, case.loss_mask, return_entropy=True
        )
        return log_probs.sum() + 0.3 * entropies.sum()

    want = oracle(case, None, torch.ones(10), torch.full((10,), 0.3))
    got = torch.func.grad(total)(case.storage)
    torch.testing.assert_close(got.view(10, -1).double(), want.grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_numerical_derivative(name):
    """A finite difference along one direction, in the only precision there is."""
    torch.manual_seed(3)
    case = build("bsv", torch.float32, 1, 4, 40, 1, "none", {})
    temperature, step = temperature_of("tokens", case.labels), 2.0**-6
    direction = torch.randn_like(case.storage)
    with using(name) as backend:

        def total(logits):
            both = call(case, temperature, backend, logits)
            return both[0].double().sum() + 0.5 * both[1].double().sum()

        leaf = case.storage.clone().requires_grad_()
        total(leaf).backward()
        ends = [total(case.storage + sign * step * direction) for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) / (2 * step)).item()
    assert math.isclose(slope, (leaf.grad * direction).sum().item(), rel_tol=2e-3, abs_tol=2e-3)


def test_no_rows():
    leaf = torch.empty(2, 0, 50, requires_grad=True)
    for temperature in (None, torch.empty(2, 0)):
        both = fsl.token_logprobs(
            leaf,
            torch.empty(2, 0, dtype=torch.int64),
            temperature=temperature,
            return_entropy=True,
        )
        sum(result.sum() for result in both).backward()
        assert all(result.shape == (2, 0) for result in both)


@pytest.mark.parametrize("name", ON_CPU)
def test_rows_of_1_dimension(name):
    case = build("nv", torch.float32, 2, 4, 90, 0, "bool", {"shift": False})
    temperature = temperature_of("tokens", case.labels)
    want = oracle(case, temperature, torch.zeros(8), torch.zeros(8))
    with using(name) as backend:
        both = call(case, temperature, backend, case.storage)
    assert_figures(*both, want, (8,))
