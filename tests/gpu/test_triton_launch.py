"""Launch policy of the Triton kernels: valid lines, the choice of a line, the search."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from fused_sft_loss.triton_kernels import launch, row_stats, tune  # noqa: E402
from fused_sft_loss.triton_kernels.launch import USES, Chip, Shape  # noqa: E402

from bench.without_gpu import triton_offline as offline  # noqa: E402

H100 = offline.CHIPS["sm_90"]


@pytest.mark.parametrize("threads", [2048, 1536, 32, 0])
def test_2048_threads_cannot_be_written_down(threads):
    with pytest.raises(ValueError, match=f"expected 64 to 1024 threads.*got {threads}"):
        Shape("gfx", USES, None, threads, 2, 32768, "32 warps of 64 lanes")


def test_a_segment_is_whole_tiles():
    with pytest.raises(ValueError, match="whole tiles.*tiles of 4096 and a segment of 2048"):
        Shape("gfx", USES, None, 256, 2, 2048, "")


@pytest.mark.parametrize("chip", offline.CHIPS.values(), ids=lambda chip: chip.name)
def test_no_launch_has_more_than_1024_threads(chip):
    seen = set()
    for variant in offline.variants(chip):
        threads = variant.launch.options["num_warps"] * chip.warp
        assert 64 <= threads <= 1024 and variant.launch.options["enable_fp_fusion"] is False
        if variant.shape is not None:
            assert threads == variant.launch.arguments["THREADS"] == variant.shape.threads
            seen.add(variant.shape)
    assert seen == set(launch.lines(chip))  # the variants use every line of the table


def test_every_use_and_width_has_a_line_with_a_reason():
    chips = [*offline.CHIPS.values(), launch.INTERPRETER]
    for chip, use, columns in product(chips, USES, (1, 2048, 2049, 256_000)):
        shape = launch.shape_for(chip, use, columns)
        assert use in shape.uses and len(shape.why) > 5
        assert shape.columns is None or columns <= shape.columns


def test_every_line_of_the_table_is_taken_by_some_call():
    chips = [*offline.CHIPS.values(), launch.INTERPRETER]
    taken = {
        launch.shape_for(chip, use, columns)
        for chip, use, columns in product(chips, USES, (2048, 65536, 256_000))
    }
    assert taken == set(launch.SHAPES)


def test_uses_that_take_more_registers_have_lines_of_their_own():
    chip = offline.CHIPS["sm_100"]
    names = [row_stats.table_name(*use) for use in [(3, 0.0), (4, 0.0), (4, 5.0), (6, 5.0)]]
    lines = [launch.shape_for(chip, name, 128256) for name in names]
    assert lines[0] == lines[1] and len(set(lines)) == 3
    assert lines[2].runs < lines[0].runs and lines[3].runs < lines[0].runs
    on_h100 = {launch.shape_for(H100, name, 128256) for name in names}
    assert len(on_h100) == 1


@pytest.mark.parametrize(
    "name, warp, known",
    [
        ("sm_75", 32, "sm_80"),
        ("sm_86", 32, "sm_80"),
        ("sm_89", 32, "sm_80"),
        ("sm_103", 32, "sm_100"),
        ("sm_120", 32, "sm_100"),
        ("gfx908", 64, "gfx90a"),
        ("gfx1100", 32, "gfx90a"),
    ],
)
def test_a_chip_outside_of_the_table_is_launched_as_one_in_it(name, warp, known):
    chip = Chip(name, warp, 100)
    assert launch.lines(chip) == launch.lines(offline.CHIPS[known]) != []
    shape = launch.shape_for(chip, "row_stats", 128256)
    assert shape.options(chip)["num_warps"] * warp == shape.threads


def test_a_line_for_one_chip_serves_no_other():
    shape = Shape("sm_90", USES, None, 256, 2, 32768, "searched")
    served = [name for name, chip in offline.CHIPS.items() if shape.is_for(chip)]
    assert served == ["sm_90"]


def test_amd_options_flush_denormals_and_nvidia_does_not_know_the_word():
    shape = Shape("gfx", USES, None, 256, 2, 32768, "")
    amd = shape.options(offline.CHIPS["gfx942"])
    assert (amd["num_warps"], amd["waves_per_eu"], amd["allow_flush_denorm"]) == (4, 0, True)
    assert set(shape.options(H100)) == {"num_warps", "num_stages", "enable_fp_fusion"}


def test_search_returns_the_fastest_and_prints_its_line():
    times = {(256, 4): 1.5, (128, 2): 2.0}  # ms; all others take 3 ms
    launched, printed = [], []

    def timer(run):
        run()
        return times.get((launched[-1].threads, launched[-1].runs), 3.0)

    best = tune.search(
        H100, "row_stats", torch.bfloat16, 128256, launched.append, timer, printed.append
    )
    assert (best.threads, best.runs) == (256, 4)
    assert launched[0] == launch.shape_for(H100, "row_stats", 128256)  # the table's line competes
    assert len(set(launched)) == len(launched) > 10
    (line,) = printed
    assert "1.5000 ms, the table's line 2.0000 ms. At the head of SHAPES, for all dtypes:" in line
    written = eval(line.splitlines()[-1].strip().rstrip(","), {"Shape": Shape})
    assert (written.threads, written.runs, written.segment) == (256, 4, best.segment)
    assert written.columns == 128256 and written.uses == ("row_stats",)
    assert [name for name, chip in offline.CHIPS.items() if written.is_for(chip)] == ["sm_90"]


def test_the_variable_turns_the_search_on_once_per_problem(monkeypatch):
    searched, logits = [], torch.empty(1, 1, 3000)
    found = Shape("sm_90", USES, None, 512, 1, 8192, "found")
    monkeypatch.setattr(tune, "_found", {})
    monkeypatch.setattr(tune, "search", lambda *args: searched.append(args) or found)
    monkeypatch.delenv(tune.VARIABLE, raising=False)
    assert tune.choose(H100, "row_stats", logits, print) is not found and not searched
    monkeypatch.setenv(tune.VARIABLE, "1")
    for _ in range(3):
        assert tune.choose(H100, "row_stats", logits, print) is found
    assert len(searched) == 1
    tune.choose(H100, "row_stats", logits[..., :100], print)
    assert len(searched) == 2


def test_cpu_tensors_without_the_interpreter():
    if launch.INTERPRETED.value:
        pytest.skip("the interpreter is on")
    with pytest.raises(ValueError, match="on an NVIDIA or AMD GPU, got cpu.*TRITON_INTERPRET"):
        launch.chip_of(torch.device("cpu"))
