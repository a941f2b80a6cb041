"""Calls under one global setting, for test_global_defaults.py, in a separate process.

    python tests/support/global_defaults.py SETTING CASES RESULTS

torch.save wrote CASES under PyTorch's own defaults. No input is made here.
"""

import sys

import torch
from backends import ON_CPU, using

import fused_sft_loss as fsl
from fused_sft_loss.backends import selection
from fused_sft_loss.megatron import ResponseOnlyHead, sft_loss_func

BACKENDS = [name for name in ON_CPU if not name.startswith("cpu-")] + ["cpu"] * (
    selection.reason_against("cpu", "cpu") is None
)
FIGURES = ("lm loss", "accuracy", "entropy", "nll", "perplexity")


def default_dtype(dtype):
    return lambda: torch.set_default_dtype(dtype)


SETTINGS = {
    "as it comes": lambda: None,
    "float16": default_dtype(torch.float16),
    "bfloat16": default_dtype(torch.bfloat16),
    "float32": default_dtype(torch.float32),
    "float64": default_dtype(torch.float64),
    "meta": lambda: torch.set_default_device("meta"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16).__enter__(),
}


def losses_and_gradients(case, backend, **more):
    leaf = case.storage.clone().requires_grad_()
    options = {**case.call_options(), **more, "backend": backend}
    losses = fsl.sft_loss(
        case.logits(leaf), case.labels, case.loss_mask, reduction="none", **options
    )
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    leaf = case.storage.clone().requires_grad_()
    mean = fsl.sft_loss(case.logits(leaf), case.labels, case.loss_mask, **options)
    (grad_of_mean,) = torch.autograd.grad(mean, leaf)
    return losses, grad, mean, grad_of_mean


def megatron(case, backend):
    """Both conventions with all figures, and the rows selected by a response-only head."""
    options = {**case.call_options(), "backend": backend}
    logits = case.logits(case.storage)
    for returns in ("per_token", "mean"):
        loss, *rest, reports = sft_loss_func(
            case.labels, case.loss_mask, logits, returns=returns, report=FIGURES, **options
        )
        yield from (loss, *rest, *reports.values())
    yield from sft_loss_func(
        case.labels, case.loss_mask, logits, non_loss_data=True, **options
    ).values()
    if case.labels.dim() == 2:
        rows = ResponseOnlyHead(rows=12).select(case.labels, case.loss_mask, -100)
        yield from rows[:3]
        yield ResponseOnlyHead.scatter(rows.mask.float(), rows, case.labels.shape)


def backends(number):
    """The shim runs thread by thread and is slow, so it gets every fourth case only."""
    return [name for name in BACKENDS if not name.endswith("simt") or number % 4 == 1]


def results(case, name):
    """Every tensor that the public functions return for a case."""
    shifted = fsl.shift_targets(case.labels, case.loss_mask, case.options.get("cu_seqlens"))
    with using(name) as backend:
        yield from shifted
        yield from losses_and_gradients(case, backend)
        if backend in selection.ONE_READ:
            yield from losses_and_gradients(case, backend, grad_in_forward=True)
        logits = case.logits(case.storage)
        yield from fsl.token_metrics(
            logits, case.labels, case.loss_mask, backend=backend, **case.call_options()
        )
        yield from megatron(case, backend)
        with torch.inference_mode():
            yield fsl.sft_loss(
                logits, case.labels, case.loss_mask, backend=backend, **case.call_options()
            )


def main(setting, cases_file, results_file):
    cases = torch.load(cases_file, weights_only=False)
    SETTINGS[setting]()
    got = {
        (number, name): [tensor.detach() for tensor in results(case, name)]
        for number, case in enumerate(cases)
        for name in backends(number)
    }
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    torch.save(got, results_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
