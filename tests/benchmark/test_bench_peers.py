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


class _TransformerEngine(torch.autograd.Function):
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
        b, s, v = _input.shape
        assert target.shape == (b, s) and not reduce_loss
        with torch.enable_grad():
            ctx.logits = _input.detach().requires_grad_()
            ctx.losses = per_row(ctx.logits.view(-1, v), target.reshape(-1), ignore_idx).view(b, s)
        return ctx.losses.detach()

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = torch.autograd.grad(ctx.losses, ctx.logits, grad_output)
        return gradient, None, None, None, None, None, None


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


#: The function of each peer's module, with the peer's signature.
MODULES = {
    "liger_kernel.transformers.functional": liger_cross_entropy,
    "liger_kernel.megatron.cross_entropy": LigerMegatronCrossEntropy,
    "transformer_engine.pytorch.cross_entropy": _TransformerEngine.apply,
    "flash_attn.ops.triton.cross_entropy": cross_entropy_loss,
    "quack.cross_entropy": cross_entropy,
}


@pytest.fixture
def installed(monkeypatch):
    for path, function in MODULES.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        name = "parallel_cross_entropy" if "engine" in path else function.__name__
        setattr(sys.modules[path], name, function)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("peer", GPU_ONLY, ids=lambda peer: peer.name)
def test_the_adapter_gives_the_oracle_s_loss_and_gradient(installed, peer, softcap):
    case = model_case(Model("tiny", 500, 512, softcap), 1, 1, 2, 12, "bf16", 0.5, 1)
    problem = Problem(case, Source(case.source, "cpu"))
    peer = replace(peer, devices=("cpu",))
    check = Oracle(problem).check(*run_once(peer.function(problem), problem), peer.precision)
    assert check.ok, check.reason
    # Proves that the check can fail: another gradient does not pass.
    wrong = made.provider(partial(made.changing, change=made.scaled))
    assert not Oracle(problem).check(*run_once(wrong.function(problem), problem), "fp32").ok


def test_on_this_cpu_each_keeps_its_row_with_the_reason():
    case = model_case(Model("tiny", 500, 500), 1, 1, 2, 12, "bf16", 0.5, 1)
    assert len(GPU_ONLY) == 7
    for peer in GPU_ONLY:
        assert peer.reason_against(case, "cpu") == "runs on GPUs"
        if not importlib.util.find_spec(peer.module):
            missing = peer.reason_against(case, "cuda")
            assert missing == f"not installed: pip install {peer.install}"


def test_those_for_one_process_say_so_under_sharding(monkeypatch):
    monkeypatch.setattr("bench.kernels.provider._found", lambda module: True)
    for nproc in (2, 1):  # also for one rank's shard, which needs a sharded loss, too
        case = model_case(Model("tiny", 500, 500), 2, nproc, 2, 12, "bf16", 0.5, 1)
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
            theirs = getattr(importlib.import_module(path), MODULES[path].__name__)
            assert _names(theirs) == _names(MODULES[path])
        for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
            patch.delitem(sys.modules, name)


def _names(function):
    return list(inspect.signature(function).parameters)
