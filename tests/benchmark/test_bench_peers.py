"""The adapters of GPU-only peers, called on a CPU with plain PyTorch losses of the same signatures.
If a peer is installed, its real signature is checked too."""

import importlib
import inspect
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import bench_providers as made
import pytest
import torch
import torch.nn.functional as F
from codegen_runs import PEERS as INSTALLED
from codegen_runs import needs_liger

from bench.kernels.cases import Model, model_case
from bench.kernels.oracle import Oracle, run_once
from bench.kernels.peers import PEERS
from bench.kernels.problem import Problem, Source
from bench.kernels.providers import PROVIDERS

GPU_ONLY = [peer for peer in PEERS if peer.devices == ("cuda",)]


def per_row(logits, target, ignore_index=-100):
    return F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="none")


def liger_cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    lse_square_scale=0.0,
    softcap=None,
    return_z_loss=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
):
    rows = input.float() if softcap is None else softcap * torch.tanh(input.float() / softcap)
    return F.cross_entropy(rows, target, ignore_index=ignore_index, reduction=reduction)


class LigerMegatronCrossEntropy(torch.nn.Module):
    def __init__(
        self,
        ignore_index=-100,
        label_smoothing=0.0,
        reduction="none",
        label_smoothing_formula="megatron",
        label_smoothing_mode="partition",
    ):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, vocab_parallel_logits, target, tp_group=None):
        s, b, v = vocab_parallel_logits.shape
        assert target.shape == (s, b)
        losses = per_row(vocab_parallel_logits.reshape(-1, v), target.view(-1), self.ignore_index)
        return losses.view(s, b)


def parallel_cross_entropy(
    inp,
    target,
    label_smoothing=0.0,
    reduce_loss=False,
    dist_process_group=None,
    ignore_idx=-100,
    is_cg_capturable=False,
    *,
    overwrite_input=False,
    _input=None,
):
    """TransformerEngine 2.20. By default it leaves the logits as they are."""
    assert inp.dim() == 3 and target.shape == inp.shape[:2] and not reduce_loss
    return _Written.apply(inp, inp if overwrite_input else inp.clone(), target, ignore_idx)


class _Old(torch.autograd.Function):
    """TransformerEngine 2.5 to 2.17: `parallel_cross_entropy` is its `apply`."""

    @staticmethod
    def forward(
        ctx,
        _input,
        target,
        label_smoothing=0.0,
        reduce_loss=False,
        dist_process_group=None,
        ignore_idx=-100,
        is_cg_capturable=False,
    ):
        losses, ctx.gradient = cross_entropy_forward(
            _input, target, label_smoothing, reduce_loss, dist_process_group, ignore_idx
        )
        return losses

    @staticmethod
    def backward(ctx, grad_output):
        return cross_entropy_backward(ctx.gradient, grad_output), *[None] * 6


class _Written(torch.autograd.Function):
    """A loss whose backward overwrites `memory`: the logits, or a copy of them."""

    @staticmethod
    def forward(ctx, logits, memory, target, ignore_idx):
        ctx.memory, ctx.target, ctx.ignore_idx = memory, target, ignore_idx
        return per_row(logits.flatten(0, 1), target.flatten(), ignore_idx).view(target.shape)

    @staticmethod
    def backward(ctx, upstream):
        ctx.memory.copy_(gradient_of(ctx.memory, ctx.target, ctx.ignore_idx) * upstream[..., None])
        return ctx.memory, None, None, None


def gradient_of(logits, target, ignore_idx):
    """fp32 gradient of each row's loss."""
    leaf = logits.detach().float().requires_grad_()
    with torch.enable_grad():
        loss = per_row(leaf.flatten(0, -2), target.flatten(), ignore_idx).sum()
    return torch.autograd.grad(loss, leaf)[0]


def cross_entropy_forward(_input, target, label_smoothing, reduce_loss, dist_group, ignore_idx):
    """aiter: all arguments are required; the gradient overwrites the logits."""
    assert _input.dim() == 3 and target.shape == _input.shape[:2] and not reduce_loss
    losses = per_row(_input.flatten(0, 1), target.flatten(), ignore_idx).view(target.shape)
    _input.copy_(gradient_of(_input, target, ignore_idx))
    return losses, _input


def cross_entropy_backward(_input, grad_output, is_cg_capturable=False):
    return _input.mul_(grad_output[..., None])


def cross_entropy_loss(
    logits,
    labels,
    precomputed_lse=None,
    label_smoothing=0.0,
    logit_scale=1.0,
    lse_square_scale=0.0,
    ignore_index=-100,
    inplace_backward=False,
    process_group=None,
):
    n_rows, _ = logits.shape
    assert labels.shape == (n_rows,)
    losses = per_row(logits, labels, ignore_index)
    return losses, torch.zeros_like(losses)


def cross_entropy(
    x,
    target,
    lse_partial=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    inplace_backward=False,
):
    assert x.dim() == 2 and target.dim() == 1 and reduction == "none"
    return per_row(x, target, ignore_index)


TRANSFORMER_ENGINE = "transformer_engine.pytorch.cross_entropy"
#: The functions of each peer's module, with the peer's signatures.
MODULES = {
    "liger_kernel.transformers.functional": [liger_cross_entropy],
    "liger_kernel.megatron.cross_entropy": [LigerMegatronCrossEntropy],
    TRANSFORMER_ENGINE: [parallel_cross_entropy],
    "flash_attn.ops.triton.cross_entropy": [cross_entropy_loss],
    "quack.cross_entropy": [cross_entropy],
    "aiter.ops.triton.cross_entropy": [cross_entropy_forward, cross_entropy_backward],
}


@pytest.fixture
def installed(monkeypatch):
    for path, functions in MODULES.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for function in functions:
            setattr(sys.modules[path], function.__name__, function)


def checked(peer, softcap=None):
    """(Check of a peer's loss and gradient, whether it wrote to the logits)."""
    case = model_case(Model("tiny", 500, 512, softcap), 1, 1, 2, 12, "bf16", 0.5, 1)
    problem = Problem(case, Source(case.source, "cpu", copies=1))
    peer = replace(peer, devices=("cpu",))
    check = Oracle(problem).check(*run_once(peer.function(problem), problem), peer.precision)
    return problem, check, not torch.equal(problem.source.take(), problem.source.logits)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("peer", GPU_ONLY, ids=lambda peer: peer.name)
def test_the_adapter_gives_the_oracle_s_loss_and_gradient(installed, peer, softcap):
    problem, check, _ = checked(peer, softcap)
    assert check.ok, check.reason
    # Proves that the check can fail: another gradient does not pass.
    wrong = made.provider(partial(made.changing, change=made.scaled))
    assert not Oracle(problem).check(*run_once(wrong.function(problem), problem), "fp32").ok


def test_transformer_engine_in_place_is_its_own_row_and_the_default_keeps_the_logits(installed):
    """A benchmark that times only the default times a copy of the logits."""
    peers = {peer.name: peer for peer in GPU_ONLY}
    assert not checked(peers["te"])[2] and checked(peers["te-inplace"])[2]
    assert peers["te"].predicted[0] == (0, 1, 0) and peers["te-inplace"].predicted[0] == (0, 0, 0)


def test_old_transformer_engine_takes_positional_arguments_alone(installed, monkeypatch):
    """A Function.apply has no keywords."""
    module = sys.modules[TRANSFORMER_ENGINE]
    monkeypatch.setattr(module, "parallel_cross_entropy", _Old.apply)
    peers = {peer.name: peer for peer in GPU_ONLY}
    _, check, written = checked(peers["te"])
    assert check.ok and written
    with pytest.raises(TypeError):
        checked(peers["te-inplace"])


def test_what_an_installed_peer_can_do_is_read_from_its_source(tmp_path, monkeypatch):
    """Importing TransformerEngine or aiter takes seconds, and may start a compiler."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    peers = {peer.name: peer for peer in GPU_ONLY}
    case = model_case(Model("tiny", 500, 500), 1, 1, 2, 12, "bf16", 0.5, 1)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        importlib.invalidate_caches()

    for package in ("transformer_engine", "aiter"):
        write(f"{package}/__init__.py", "raise RuntimeError('imported')")
    write("transformer_engine/pytorch/cross_entropy.py", "def parallel_cross_entropy(inp): ...")
    reasons = {name: peers[name].reason_against(case, "cuda") for name in ("te-inplace", "aiter")}
    assert "needs transformer_engine >= 2.20" in reasons["te-inplace"]
    assert "has no ops.triton.cross_entropy" in reasons["aiter"]
    assert peers["te"].reason_against(case, "cuda") is None
    write("transformer_engine/pytorch/cross_entropy.py", "overwrite_input: bool = False")
    write("aiter/ops/triton/cross_entropy.py", "def cross_entropy_forward(): ...")
    assert all(peers[name].reason_against(case, "cuda") is None for name in reasons)
    monkeypatch.setattr(torch.version, "hip", None)
    assert peers["aiter"].reason_against(case, "cuda").startswith("runs on AMD GPUs")


def test_on_this_cpu_each_keeps_its_row_with_the_reason():
    case = model_case(Model("tiny", 500, 500), 1, 1, 2, 12, "bf16", 0.5, 1)
    assert len(GPU_ONLY) == 9
    for peer in GPU_ONLY:
        assert peer.reason_against(case, "cpu") == "runs on GPUs"
        if not importlib.util.find_spec(peer.module):
            missing = peer.reason_against(case, "cuda")
            assert missing == f"not installed: pip install {peer.install}"


def test_those_for_one_process_say_so_under_sharding(monkeypatch):
    monkeypatch.setattr("bench.kernels.provider._found", lambda module: True)
    for nproc in (2, 1):  # also for one rank's shard, which needs a sharded loss, too
        case = model_case(Model("tiny", 500, 500), 2, nproc, 2, 12, "bf16", 0.5, 1)
        monkeypatch.setattr(
            "bench.kernels.peer_losses.source_of", lambda module, path: "overwrite_input"
        )
        monkeypatch.setattr(torch.version, "hip", "7.0")
        reasons = {peer.name: peer.reason_against(case, "cuda") for peer in GPU_ONLY}
        alone = {name for name, reason in reasons.items() if reason}
        assert alone == {"liger", "quack", "quack-inplace"}
        one_read = PROVIDERS["ours-cpu-oneread-new"]
        assert one_read.reason_against(case, "cpu") == "needs the whole vocabulary on one process"
        assert PROVIDERS["ours-cpu-new"].reason_against(case, "cpu") is None


@needs_liger
def test_liger_has_the_signatures_that_its_stand_ins_have():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(INSTALLED))
        for path in ("liger_kernel.transformers.functional", "liger_kernel.megatron.cross_entropy"):
            (ours,) = MODULES[path]
            theirs = getattr(importlib.import_module(path), ours.__name__)
            assert _names(theirs) == _names(ours)
        for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
            patch.delitem(sys.modules, name)


def _names(function):
    return list(inspect.signature(function).parameters)
