"""Execute nvcc's PTX of the CUDA kernels (sm_90) on the CPU and compare with the float64 oracle."""

import re
import subprocess

import pytest
import torch
from oracle import evaluate
from ptx_problems import DTYPES, EVERYTHING, SHAPES, check, problem, rows_at, wide
from tiers import sampled, sampled_runs

pytest.importorskip("rich")

from bench.without_gpu.codegen import instances, toolchains  # noqa: E402

if not toolchains.find("cuda"):
    pytest.skip(f"no nvcc: {toolchains.advice('cuda')}", allow_module_level=True)

from bench.without_gpu.launches.cuda import Run, kernel, line, modules  # noqa: E402
from bench.without_gpu.launches.cuda_structs import STRUCTS  # noqa: E402

MINUS_INFINITY = float("-inf")


def test_structs_are_laid_out_as_in_cpp(tmp_path):
    """The compiler checks offsets and sizes of all fields."""
    checks = [
        f"static_assert(offsetof({name}, {field}) == {getattr(struct, field).offset}"
        f" && sizeof({name}::{field}) == {getattr(struct, field).size});\n"
        for name, struct in STRUCTS.items()
        for field, _ in struct._fields_
    ]
    includes = "".join(
        f'#include "{instances.FOLDER}/{n}"\n' for n in ("row_stats_grad.cuh", "row_rescale.cuh")
    )
    program = tmp_path / "offsets.cu"
    program.write_text(f"#include <cstddef>\n{includes}{''.join(checks)}")
    assert len(checks) > 60
    command = [toolchains.need("cuda").compiler, "-std=c++17", "-cuda", "-o", "/dev/null"]
    done = subprocess.run([*command, program], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_every_kernel_is_known():
    names = {instances.instance(mangled) for mangled in modules()}
    assert len(names) == len(modules())


RUNS = [(dtype, shape) for shape in SHAPES for dtype in DTYPES]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    sampled_runs(RUNS, lambda run: run[0] == torch.bfloat16 or run[1] == "options"),
)
def test_loss_and_gradient(dtype, shape):
    columns, options = SHAPES[shape]
    logits, labels, mask = problem(dtype, columns, options.get("vocab_size"))
    run = Run(logits, labels, mask, **options)()
    check(run, dtype, **{k: v for k, v in options.items() if k != "split"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_a_training_step(dtype):
    """Each pass loads a scored element once, 16 bytes at a time; the gradient stores it once."""
    logits, labels, mask = problem(dtype, 8192)
    run = Run(logits, labels, mask)()
    size, scored, rows = logits.element_size(), 2, 4
    statistics, gradient = run.counts["statistics"], run.counts["gradient"]
    for counts in (statistics, gradient):
        assert wide(counts, "logits") == scored * 8192 * size
        # Also the target's own logit.
        assert counts.loaded["logits"] - wide(counts, "logits") == scored * size
    assert statistics.stored["logits"] == 0
    assert wide(gradient, "grad") == rows * 8192 * size
    assert gradient.stored["grad"] - wide(gradient, "grad") == scored * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_unaligned_rows(dtype):
    """Loads exactly the bytes of the scored rows, 16 at a time except in a tile at each end.

    A lane loads one chunk more than eight logits fill, and the next lane loads the same chunk. So
    the L1 cache serves more bytes; memory does not.
    """
    tile = 32 * line("row_stats", 1 << 20).threads
    columns = 12 * tile + 3
    logits, labels, mask = problem(dtype, columns)
    run = Run(rows_at(logits, columns), labels, mask)()
    size, scored, ends = logits.element_size(), 2 * columns, 2 * 2 * tile
    for name in ("statistics", "gradient"):
        counts = run.counts[name]
        assert counts.touched("logits") == scored * size
        whole = 8 * wide(counts, "logits") / (8 * size + 16)
        assert scored - ends <= whole <= scored
        # Statistics load each logit at the ends twice: once for the maximum, once for the sum.
        assert counts.loaded["logits"] - wide(counts, "logits") <= 2 * ends * size
    assert wide(run.counts["gradient"], "grad") >= (logits.numel() - 2 * ends) * size


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("columns", [17000, 17001])
def test_masked_rows_are_not_read(columns, split):
    logits, labels, _ = problem(torch.bfloat16, columns)
    run = Run(logits, labels, torch.zeros(1, 4), split=split)()
    for name in ("statistics", "gradient"):
        assert run.counts[name].loaded["logits"] == 0
        assert run.counts[name].exps == 0
    assert run.counts["gradient"].stored["grad"] == logits.numel() * 2
    assert not run.loss.count_nonzero() and not run.grad.count_nonzero()


@pytest.mark.long
@pytest.mark.parametrize(
    ("columns", "options"), [(17003, {}), (4099, EVERYTHING)], ids=["segments", "options"]
)
def test_same_bits_for_every_dtype_address_and_split(columns, options):
    """One loss and one gradient, bit for bit, for bf16 and the same numbers in fp32, in aligned and
    unaligned rows, split over blocks or not. A bf16 gradient is the fp32 gradient rounded once."""
    logits, labels, mask = problem(torch.bfloat16, columns)
    runs = [
        Run(copy, labels, mask, split=split, **options)()
        for numbers, split in ((logits, True), (logits, False), (logits.float(), False))
        for copy in (rows_at(numbers, -(-columns // 8) * 8), rows_at(numbers, columns))
    ]
    exact = runs[-1].grad
    for run in runs:
        assert torch.equal(run.loss, runs[0].loss) and torch.equal(
            run.normalizer, runs[0].normalizer
        )
        assert torch.equal(run.grad, exact.to(run.grad.dtype))


@pytest.mark.parametrize("columns", [5000, 5001])
def test_in_place(columns):
    logits, labels, mask = problem(torch.bfloat16, columns)
    apart = Run(logits, labels, mask)()
    copy = logits.clone()
    together = Run(copy, labels, mask, grad=copy)()
    assert together.grad is together.logits and torch.equal(together.grad, apart.grad)
    assert together.counts["gradient"].stored["logits"] >= logits.numel() * 2


def test_metrics_of_a_row_that_holds_infinities():
    """The statistics: maximum, sum, target, sum of logits, index of the maximum, weighted sum."""
    logits, labels, mask = problem(torch.float32, 4500)
    logits[0, 0, 4:4000] = MINUS_INFINITY
    run = Run(logits, labels, mask)
    run.targets()
    run.statistics(6)
    z = logits[0, :2].double()
    top, at = z.max(1)
    shifted = z - top[:, None]
    weights = shifted.exp()
    moment = torch.where(weights == 0, 0.0, weights * shifted).sum(1)
    for column, expected in ((0, top), (1, weights.sum(1)), (4, at.double()), (5, moment)):
        torch.testing.assert_close(run.stats[:2, column].double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("columns", sampled([2500, 2501], [2501]))
def test_same_bits_in_whatever_order_warps_run(columns):
    logits, labels, mask = problem(torch.bfloat16, columns)
    in_step = Run(logits, labels, mask)()
    for seed in range(2):
        run = Run(logits, labels, mask, seed=seed)()
        assert torch.equal(run.loss, in_step.loss) and torch.equal(run.grad, in_step.grad)


def test_a_missing_barrier_shows():
    """Proves that the test above can fail: it does without one of row_stats' barriers."""
    logits, labels = torch.randn(1, 2, 6000).bfloat16(), torch.tensor([[3, 5]])
    whole = Run(logits, labels)
    whole.targets()
    whole.statistics()
    code = kernel("row_stats", statistics=3, **whole.options)
    barriers = [i.text for i in code.code if i.name == "bar"]
    assert barriers and any(_wrong_without_barrier(whole, n) for n in range(len(barriers)))


def _wrong_without_barrier(whole, number):
    def edit(code):
        start = code.text.index(f".entry {code.name}(")
        match = list(re.finditer(r"bar\.sync\s+0;", code.text[start:]))[number]
        return code.text[: start + match.start()] + code.text[start + match.end() :]

    for seed in range(3):
        broken = Run(whole.logits, whole.labels, whole.loss_mask, seed=seed, edit=edit)
        broken.target, broken.weight = whole.target, whole.weight
        try:
            broken.statistics()
        except (MemoryError, RuntimeError):
            return True
        if not torch.equal(broken.stats, whole.stats):
            return True
    return False


@pytest.mark.parametrize(
    ("dtype", "shape"),
    sampled_runs(RUNS, lambda run: run[0] == torch.bfloat16 or run[1] == "options"),
)
def test_loss_and_gradient_from_one_read(dtype, shape):
    columns, options = SHAPES[shape]
    options = {key: value for key, value in options.items() if key != "split"}
    logits, labels, mask = problem(dtype, columns, options.get("vocab_size"))
    run = one_read(logits, labels, mask, **options)
    check(run, dtype, **options)
    copy = logits.clone()
    assert torch.equal(one_read(copy, labels, mask, grad=copy, **options).grad, run.grad)


def one_read(*problem, held=None, blocks=1, **options):
    run = Run(*problem, **options)
    run.targets()
    return run.one_read(held, blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_one_read(dtype):
    """Each scored element is loaded once in all, to shared memory, and stored once."""
    logits, labels, mask = problem(dtype, 8192)
    counts = one_read(logits, labels, mask).counts["one read"]
    size, scored, rows = logits.element_size(), 2, 4
    assert wide(counts, "logits") == scored * 8192 * size
    assert wide(counts, "grad") == rows * 8192 * size
    # Also the target's own logit, by each warp.
    assert counts.loaded["logits"] - wide(counts, "logits") == scored * size * 4
    assert counts.stored["grad"] - wide(counts, "grad") == scored * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_however_much_is_held_and_wherever_it_lies(dtype):
    columns = 9004
    logits, labels, mask = problem(dtype, columns)
    whole = one_read(logits, labels, mask)
    tile = 32 * line("row_stats_grad", columns).threads
    for run in (
        one_read(logits, labels, mask, held=tile),
        one_read(rows_at(logits, columns + 1), labels, mask),
    ):
        assert torch.equal(run.loss, whole.loss) and torch.equal(run.grad, whole.grad)


@pytest.mark.parametrize("columns", sampled([2500, 2501], []))
def test_one_read_in_whatever_order_warps_run(columns):
    logits, labels, mask = problem(torch.bfloat16, columns)
    in_step = one_read(logits, labels, mask)
    for seed in range(2):
        run = one_read(logits, labels, mask, seed=seed)
        assert torch.equal(run.loss, in_step.loss) and torch.equal(run.grad, in_step.grad)


@pytest.mark.parametrize("scored", sampled([0.3, 1.0], [0.3]))
def test_blocks_take_the_rows_of_one_read_in_turn(scored):
    """Wherever the masked rows lie, every row is written by one block, with the same bits."""
    logits = (torch.randn(2, 17, 136) * 4).to(torch.bfloat16)
    labels, mask = torch.randint(0, 136, (2, 17)), (torch.rand(2, 17) < scored).float()
    logits[mask == 0] = float("nan")  # must not be read
    options = {"shift": False, "label_smoothing": 0.1}
    alone = one_read(logits, labels, mask, blocks=34, **options)
    expected = evaluate(logits, labels, mask, **options)
    torch.testing.assert_close(alone.loss.double(), expected.losses, rtol=1e-6, atol=1e-6)
    found = alone.grad.double().flatten(0, 1)
    torch.testing.assert_close(found, expected.grad, rtol=2**-8 * 1.01, atol=1e-9)
    for blocks in (1, 3):
        grad = logits.clone()
        run = one_read(grad, labels, mask, grad=grad, blocks=blocks, seed=blocks, **options)
        for name in ("loss", "grad", "normalizer"):
            assert torch.equal(getattr(run, name), getattr(alone, name)), (blocks, name)


def test_a_copy_that_is_not_waited_for_shows():
    logits, labels, mask = problem(torch.bfloat16, 2504)

    def edit(code):
        text = code.text
        if "cp.async.wait_all" in text and "row_stats_grad" in code.name:
            start = text.index(f".entry {code.name}(")
            at = text.index("cp.async.wait_all;", start)
            text = text[:at] + text[at + len("cp.async.wait_all;") :]
        return text

    with pytest.raises(RuntimeError, match="copy under way"):
        one_read(logits, labels, mask, edit=edit)
