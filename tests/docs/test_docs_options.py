"""The option tables list every option, and the code refuses each combination they rule out."""

import inspect
import re

import pytest
import snippets
import torch
from torch.utils.checkpoint import checkpoint

import fused_sft_loss as fsl
from bench.megatron_cpu import run_ranks
from fused_sft_loss.megatron import sft_loss_func

NAMES = re.compile(r"`(\w+)")


def table(page, head):
    """Maps each option to the last cell of its row, in `page`'s table that begins with `head`."""
    lines = (snippets.ROOT / page).read_text(encoding="utf-8").splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in NAMES.findall(cells[0]):
            rows[name] = cells[-1]
    return rows


def call(logits=None, **options):
    """Loss and backward on small non-leaf logits, or on `logits`."""
    if logits is None:
        logits = torch.randn(2, 5, 8, requires_grad=True) * 1
    labels = options.pop("labels", torch.randint(0, 8, (2, 5)))
    loss = fsl.sft_loss(logits, labels, **options)
    loss.backward()
    return loss


def overlapping():
    storage = torch.randn(1, 5, 8, requires_grad=True) * 1
    return call(storage.expand(2, 5, 8), inplace_backward=True)


def second_backward():
    logits = torch.randn(2, 5, 8, requires_grad=True) * 1
    loss = fsl.sft_loss(logits, torch.randint(0, 8, (2, 5)), inplace_backward=True)
    loss.backward(retain_graph=True)
    loss.backward()


def under_hooks():
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        call(inplace_backward=True)


def checkpointed():
    labels = torch.randint(0, 8, (2, 5))
    leaf = torch.randn(2, 5, 8, requires_grad=True)

    def part(leaf):
        return fsl.sft_loss(leaf * 1, labels, inplace_backward=True)

    checkpoint(part, leaf, use_reentrant=False).backward()


def transformed():
    torch.func.grad(lambda logits: call(logits * 1, inplace_backward=True))(torch.randn(2, 5, 8))


def reporting():
    logits, labels = torch.randn(2, 5, 8), torch.randint(0, 8, (2, 5))
    report = ("lm loss", "accuracy")
    sft_loss_func(labels, None, logits, report=report, grad_in_forward=True, tp_group=None)


def on_another_device():
    name = "cuda" if not torch.version.cuda or not torch.cuda.is_available() else "hip"
    return call(backend=name)


def sharded(**options):
    """A call on each of two ranks, with half of a vocabulary of 16 each."""
    call(tp_group=torch.distributed.group.WORLD, **options)


def in_ranks(**options):
    """Raise the error that both of two ranks raise."""
    errors = run_ranks(2, told, options)
    assert errors[0] == errors[1] and errors[0] is not None
    raise {"ValueError": ValueError}[errors[0][0]](errors[0][1])


def told(options):
    try:
        sharded(**options)
    except Exception as error:  # the caller checks the kind
        return type(error).__name__, str(error)


def cut(cu_seqlens=(0, 4, 10)):
    return torch.tensor(cu_seqlens, dtype=torch.int32)


REFUSALS = {  # (option, an entry of its last column) -> (the call, the error it raises)
    ("cu_seqlens", "`shift=False`"): (lambda: call(cu_seqlens=cut(), shift=False), ValueError),
    ("tp_group", "`grad_in_forward`"): (lambda: in_ranks(grad_in_forward=True), ValueError),
    ("vocab_start", "no `vocab_size`"): (lambda: in_ranks(vocab_start=0), ValueError),
    ("vocab_start", "no `tp_group`"): (lambda: call(vocab_start=4, vocab_size=12), ValueError),
    ("inplace_backward", "leaf logits"): (
        lambda: call(torch.randn(2, 5, 8, requires_grad=True), inplace_backward=True),
        ValueError,
    ),
    ("inplace_backward", "views of a leaf"): (
        lambda: call(torch.randn(2, 5, 8, requires_grad=True)[:, :], inplace_backward=True),
        ValueError,
    ),
    ("inplace_backward", "`torch.func`"): (transformed, ValueError),
    ("inplace_backward", "overlapping rows"): (overlapping, ValueError),
    ("inplace_backward", "a second backward"): (second_backward, RuntimeError),
    ("inplace_backward", "`saved_tensors_hooks`"): (under_hooks, ValueError),
    ("inplace_backward", "non-reentrant checkpointing"): (checkpointed, ValueError),
    ("grad_in_forward", "`tp_group`"): (lambda: in_ranks(grad_in_forward=True), ValueError),
    ("grad_in_forward", '`backend="eager"`'): (
        lambda: call(grad_in_forward=True, backend="eager"),
        NotImplementedError,
    ),
    ("grad_in_forward", '`backend="triton"`'): (
        lambda: call(grad_in_forward=True, backend="triton"),
        NotImplementedError,
    ),
    ("grad_in_forward", "Megatron's `report=` of more than the loss"): (
        reporting,
        NotImplementedError,
    ),
    ("backend", "other devices"): (on_another_device, NotImplementedError),
}


def test_the_tables_name_every_option():
    options = {
        name
        for name, parameter in inspect.signature(fsl.sft_loss).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert set(table("README.md", "option")) == options


def test_every_entry_of_the_table_is_tested():
    listed = {
        (option, entry)
        for option, cell in table("README.md", "option").items()
        for entry in filter(None, cell.split(", "))
    }
    assert listed == set(REFUSALS)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: f"{case[0]} with {case[1]}")
def test_what_the_table_calls_impossible_is_refused(case):
    attempt, raises = REFUSALS[case]
    with pytest.raises(raises):
        attempt()
