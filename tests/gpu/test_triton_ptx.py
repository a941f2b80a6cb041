"""Execute Triton's PTX of the kernels on the CPU and compare with the float64 oracle."""

import re

import pytest
import torch
from codegen_runs import PEERS, needs_liger
from ptx_problems import DTYPES, EVERYTHING, SHAPES, check, problem, rows_at, wide
from tiers import sampled, sampled_runs

pytest.importorskip("triton")

from fused_sft_loss.triton_kernels import launch  # noqa: E402
from fused_sft_loss.triton_kernels.arithmetic import INTERPRETED  # noqa: E402

if INTERPRETED.value:
    pytest.skip("Triton interprets kernels here, and compiles none", allow_module_level=True)

from bench.without_gpu.chips import NVIDIA, TRITON  # noqa: E402
from bench.without_gpu.launches.triton import Run, execute  # noqa: E402
from bench.without_gpu.ptx import Machine  # noqa: E402

TARGETS = tuple(name for name in NVIDIA if name in TRITON)
BARRIERS = 3  # least number of barriers in row_stats' PTX, on every target

#: Each shape once, each target with each dtype once, and all options on all three targets.
RUNS = sorted(
    {("sm_90", torch.bfloat16, shape) for shape in SHAPES}
    | {(target, dtype, "segments") for target in TARGETS for dtype in DTYPES}
    | {(target, torch.float16, "options") for target in TARGETS},
    key=str,
)


@pytest.mark.parametrize(
    ("target", "dtype", "shape"), sampled_runs(RUNS, lambda run: run[0] == "sm_90")
)
def test_loss_and_gradient(target, dtype, shape):
    columns, options = SHAPES[shape]
    logits, labels, mask = problem(dtype, columns, options.get("vocab_size"))
    run = Run(target, logits, labels, mask, **options)()
    check(run, dtype, **{k: v for k, v in options.items() if k != "split"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", sampled(TARGETS))
def test_bytes_of_a_training_step(target, dtype):
    """Each pass loads a scored element once, 16 bytes at a time; the gradient stores it once."""
    logits, labels, mask = problem(dtype, 8192)
    run = Run(target, logits, labels, mask)()
    size, scored, rows = logits.element_size(), 2, 4
    statistics, gradient = run.counts["statistics"], run.counts["gradient"]
    assert wide(statistics, "logits") == scored * 8192 * size
    # Also the target's own logit, by each warp of its program.
    assert 0 < statistics.loaded["logits"] - wide(statistics, "logits") <= scored * 32 * size
    assert statistics.stored["logits"] == 0
    assert gradient.loaded["logits"] == wide(gradient, "logits") == scored * 8192 * size
    assert gradient.stored["grad"] == wide(gradient, "grad") == rows * 8192 * size


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("target", sampled(TARGETS))
def test_masked_rows_are_not_read(target, split):
    logits, labels, _ = problem(torch.bfloat16, 17000)
    run = Run(target, logits, labels, torch.zeros(1, 4), split=split)()
    for name in ("statistics", "gradient"):
        assert run.counts[name].loaded["logits"] == 0
        if not split:  # the kernel that folds the parts handles masked rows too
            assert run.counts[name].exps == 0
    assert run.counts["gradient"].stored["grad"] == logits.numel() * 2
    assert not run.loss.count_nonzero() and not run.grad.count_nonzero()


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "options"])
@pytest.mark.parametrize("target", sampled(TARGETS))
def test_same_bits_for_every_dtype_and_address(target, options):
    """One loss and one gradient, bit for bit, for bf16 and the same numbers in fp32, in aligned and
    unaligned rows. A bf16 gradient is the fp32 gradient rounded once."""
    columns = 4099
    logits, labels, mask = problem(torch.bfloat16, columns)
    runs = [
        Run(target, copy, labels, mask, **options)()
        for numbers in (logits, logits.float())
        for copy in (rows_at(numbers, 4104), rows_at(numbers, columns))
    ]
    assert [launch.aligned(run.logits) for run in runs] == [True, False, True, False]
    exact = runs[-1].grad
    for run in runs:
        assert torch.equal(run.loss, runs[0].loss) and torch.equal(
            run.normalizer, runs[0].normalizer
        )
        assert torch.equal(run.grad, exact.to(run.grad.dtype))


def test_in_place():
    logits, labels, mask = problem(torch.bfloat16, 5000)
    apart = Run("sm_90", logits, labels, mask)()
    together = Run("sm_90", logits.clone(), labels, mask, inplace=True)()
    assert together.grad is together.logits and torch.equal(together.grad, apart.grad)
    assert together.counts["gradient"].stored["logits"] == logits.numel() * 2


@pytest.mark.parametrize("target", sampled(TARGETS))
def test_same_bits_in_whatever_order_warps_run(target):
    logits, labels, mask = problem(torch.bfloat16, 2500)
    in_step = Run(target, logits, labels, mask)()
    for seed in range(2):
        run = Run(target, logits, labels, mask, seed=seed)()
        assert torch.equal(run.loss, in_step.loss) and torch.equal(run.grad, in_step.grad)


@pytest.mark.parametrize("target", sampled(TARGETS))
def test_a_missing_barrier_shows(target):
    """Proves that the test above can fail: it does without one of row_stats' barriers."""
    logits, labels = torch.randn(1, 2, 1000).bfloat16(), torch.tensor([[3, 5]])
    whole = Run(target, logits, labels)
    whole.targets()
    whole.statistics()
    wrong = [_without_barrier(whole, n, seed) for n in range(BARRIERS) for seed in range(4)]
    assert any(wrong)


def _without_barrier(whole, number, seed):
    def edit(text):
        return drop(text, r"bar\.sync\s+0;", number)

    broken = Run(whole.chip.name, whole.logits, whole.labels, whole.loss_mask, seed=seed, edit=edit)
    broken.target, broken.weight = whole.target, whole.weight
    try:
        broken.statistics()
    except (MemoryError, RuntimeError):
        return True
    return not torch.equal(broken.stats, whole.stats)


def drop(text, pattern, number):
    """`text` without match `number` of `pattern`."""
    match = list(re.finditer(pattern, text))[number]
    return text[: match.start()] + text[match.end() :]


@needs_liger
@pytest.mark.parametrize("target", sampled(TARGETS))
def test_executed_beside_liger(target):
    """A training step's kernels and Liger's on the same two whole rows; Liger's rescaling alone."""
    from bench.without_gpu.codegen import peers

    columns = 32768 + 512
    logits, labels = torch.randn(1, 3, columns).bfloat16(), torch.tensor([[5, 9, 11]])
    ours = Run(target, logits[:, :2], labels[:, 1:], shift=False)()
    theirs = logits[0, :2].clone()
    machines = [Machine(), Machine()]
    launches = peers.step(target, str(PEERS), theirs, labels[0, 1:])
    for machine, one in zip(machines, launches, strict=True):
        execute(machine, ours.chip, [one])
    expected = ours.grad[0].float() * (peers.UPSTREAM / 2)  # the mean of two rows
    torch.testing.assert_close(theirs.detach().float(), expected, rtol=2**-7, atol=1e-7)
    elements = 2 * columns
    fused, rescaling = (machine.counts for machine in machines)
    passes = [ours.counts["statistics"], ours.counts["gradient"]]
    assert wide(fused, "X_ptr") == 6 * elements and wide(rescaling, "X_ptr") == 4 * elements
    assert sum(wide(c, "logits") + wide(c, "grad") for c in passes) == 6 * elements
    instructions = [32 * c.warp_instructions / elements for c in (*passes, fused, rescaling)]
    ours_text = " + ".join(f"{n:.2f}" for n in instructions[:2])
    print(f"{target}: PTX instructions per element: {ours_text}, Liger {instructions[2]:.2f}")
    assert instructions[0] + instructions[1] <= instructions[2]
