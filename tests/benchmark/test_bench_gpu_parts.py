"""The real parts of `python -m bench gpu`: their commands, and why they are skipped."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_processes import ROOT
from bench_providers import case_of

from bench import __main__ as bench
from bench.gpu import found as looking
from bench.gpu import lines, parts
from bench.gpu.found import Found
from bench.kernels.cases import MODELS
from bench.kernels.command import device_slug
from bench.without_gpu.simt import build as build_shim
from csrc.toolchains import headers
from fused_sft_loss.backends import devices

NVIDIA = Found(
    device="cuda",
    slug="a-gpu",
    native="cuda",
    reasons={"cuda": None, "triton": None},
    built=True,
    target="9.0a",
    compiler="nvcc 13.0",
    sanitizer="/usr/local/cuda/bin/compute-sanitizer",
)
AMD = Found(
    device="cuda",
    slug="amd",
    native="hip",
    reasons={"hip": "not built", "triton": None},
    target="gfx942",
    missing="no hipcc",
)


def named(found, tmp_path):
    return {part.name: part for part in parts.all_parts(found, tmp_path)}


@pytest.mark.parametrize("found", [NVIDIA, AMD], ids=["nvidia", "amd"])
def test_the_arguments_of_every_benchmark_are_those_of_its_command(found, tmp_path, monkeypatch):
    seen = []
    for part in named(found, tmp_path).values():
        if part.command[1:3] != ["-m", "bench"]:
            continue
        parser, commands = bench._parsers()
        name = part.command[3]
        module = bench.importlib.import_module(bench.COMMANDS[name][0])
        module.add_arguments(commands[name])
        args = parser.parse_args(part.command[3:])
        assert args.device == "cuda"
        assert part.record and (part.stop is None or hasattr(args, part.stop.strip("-")))
        seen.append(name)
    assert seen == ["sft", "kernels", "linear", "kernels", "launches", "kernels", "kernels"]


def test_the_benchmarks_cover_every_model_shard_and_fraction_once():
    cases = [
        (model, tp, scored)
        for models, degrees, fractions in parts.BENCHMARKS.values()
        for model in (MODELS if models == ("all",) else models)
        for tp in degrees
        for scored in fractions
    ]
    assert len(cases) == len(set(cases)) == len(MODELS) * 2 * 4
    assert {tp for _, tp, _ in cases} == {"1", "8"}
    assert {scored for *_, scored in cases} == {"1.0", "0.5", "0.3", "0.1"}


@pytest.mark.long
def test_every_test_on_a_gpu_belongs_to_a_part(tmp_path):
    """What `-k` selects is compared with all tests: a name that is mistyped selects none."""
    chosen = [p for p in named(NVIDIA, tmp_path).values() if p.name.startswith("test-")]
    assert {part.name for part in chosen} == {
        "test-cuda", "test-triton", "test-graphs", "test-sharded", "test-compile"
    }  # fmt: skip
    ids = collected("tests/gpu/test_gpu.py", "tests/gpu/test_gpu_sharded.py")
    taken = []
    for part in chosen:
        file, expression = part.command[part.command.index("-k") - 1], part.command[-1]
        if "-n" in part.command:
            expression = part.command[part.command.index("-k") + 1]
        some = [one for one in ids if one.startswith(file) and selected(expression, one)]
        assert some, part.name
        taken += some
    ids = [one for one in ids if "on_a_cpu" not in one]  # alone it would pass without a GPU
    assert sorted(taken) == sorted(one for one in ids if "hip" not in one or "graph" in one or (
        "compiled_step" in one))  # fmt: skip
    assert any(selected(parts.SANITIZED, one) for one in ids)


def selected(expression, name):
    from _pytest.mark.expression import Expression

    return Expression.compile(expression).evaluate(lambda word, **_: word in name.lower())


def collected(*files):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_the_build_is_for_this_gpu_and_only_where_it_is_needed(tmp_path):
    assert "here already" in named(NVIDIA, tmp_path)["build"].skip
    assert "no hipcc" in named(AMD, tmp_path)["build"].skip
    missing = replace(NVIDIA, reasons={"cuda": "cannot be loaded", "triton": None})
    build = named(missing, tmp_path)["build"]
    assert build.skip is None and ("TORCH_CUDA_ARCH_LIST", "9.0a") in build.environment
    assert named(missing, tmp_path)["test-cuda"].skip is None  # it will be there
    assert named(AMD, tmp_path)["test-hip"].skip == "not built"
    assert named(AMD, tmp_path)["test-triton"].skip is None


def test_launch_tables_are_skipped_where_no_backend_can_try_a_line(tmp_path, monkeypatch):
    neither = {"hip": "not built", "triton": "cannot be imported"}
    alone = named(replace(AMD, reasons=neither), tmp_path)["launches"]
    assert alone.skip == "hip: not built; triton: cannot be imported"
    assert named(AMD, tmp_path)["launches"].skip is None
    compiled = replace(AMD, reasons=neither, compiler="hipcc")
    assert named(compiled, tmp_path)["launches"].skip is None
    rehearsed = replace(NVIDIA, device="cpu", reasons={"cuda": "no GPU", "triton": "no GPU"})
    monkeypatch.setattr(build_shim, "missing", lambda: "no Boost.Context")
    assert "no Boost.Context" in named(rehearsed, tmp_path)["launches"].skip
    monkeypatch.setattr(build_shim, "missing", lambda: None)
    part = named(rehearsed, tmp_path)["launches"]
    assert part.skip is None and part.limit > named(NVIDIA, tmp_path)["launches"].limit


def test_one_process_for_tests_gets_fewer_examples(tmp_path, monkeypatch):
    """Without pytest-xdist the tests of Triton alone would take longer than their limit."""
    monkeypatch.setattr(looking, "_is_there", lambda module: module != "xdist")
    alone = named(NVIDIA, tmp_path)["test-triton"]
    assert "-n" not in alone.command and alone.skip is None
    program = "import closeness; print(closeness.PRODUCT.max_examples)"
    environment = {**os.environ, **dict(alone.environment), "PYTHONPATH": "tests/support"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{parts.EXAMPLES}\n", done.stderr
    monkeypatch.undo()
    assert named(NVIDIA, tmp_path)["test-triton"].environment == ()


def test_an_image_without_pybind11_builds_with_the_headers_that_torch_ships(tmp_path, monkeypatch):
    """Otherwise an MI300X without a network could be measured with Triton alone."""
    real = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name in away else real(name, package)

    away = {"pybind11"}
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    folder = Path(headers.pybind11())
    assert folder == Path(torch.__file__).parent / "include"
    assert "PYBIND11_MODULE" in (folder / "pybind11/detail/common.h").read_text()
    missing = replace(NVIDIA, reasons={"cuda": "cannot be loaded", "triton": None})
    assert named(missing, tmp_path)["build"].skip is None
    away.add("torch")
    assert headers.pybind11() is None
    assert named(missing, tmp_path)["build"].skip == "needs pybind11: pip install pybind11"


def test_a_sanitizer_is_skipped_with_the_reason(tmp_path):
    assert "for NVIDIA GPUs" in named(AMD, tmp_path)["sanitize-racecheck"].skip
    without = replace(NVIDIA, sanitizer=None)
    assert "comes with the CUDA toolkit" in named(without, tmp_path)["sanitize-memcheck"].skip
    with_it = named(NVIDIA, tmp_path)["sanitize-memcheck"]
    assert with_it.skip is None and with_it.command[:3] == [NVIDIA.sanitizer, "--tool", "memcheck"]


def test_a_missing_library_skips_its_parts_with_the_line_that_installs_it(tmp_path, monkeypatch):
    """torch is all that a cluster's image may have."""
    away = {"rich", "pytest", "hypothesis", "matplotlib", "megatron.core", "pybind11"}
    monkeypatch.setattr(looking, "_is_there", lambda module: module not in away)
    skips = {name: part.skip for name, part in named(NVIDIA, tmp_path).items()}
    assert skips["kernels-1"] is skips["linear"] is skips["launches"] is None  # need torch alone
    assert skips["test-cuda"].endswith("pip install pytest hypothesis")
    assert skips["train"].endswith("pip install rich matplotlib megatron-core")


class _Module:
    """Stands for a compiled module with the hooks of a checkout."""

    def __init__(self, rounds):
        self.rounds, self.tried = rounds, []

    def launch_line(self, kernel, columns, chip):
        return 128, 16384, self.rounds if kernel == "row_stats_grad" else 0

    def try_line(self, kernel, threads, segment, rounds):
        assert threads % 64 == 0 and threads <= 1024 and (not threads or segment % threads == 0)
        self.tried.append((kernel, threads, segment, rounds))


def test_native_candidates_are_lines_that_can_be_launched():
    kernels = SimpleNamespace(module=_Module(4), chip_of=lambda device: (90, 132))
    native = lines.Native("cuda", kernels)
    case = case_of(MODELS["mistral-nemo"])
    for kernel in ("row_stats", "row_grad", "row_stats_grad"):
        found = list(native.candidates(kernel, case))
        assert found[0] == lines.Line(*kernels.module.launch_line(kernel, 0, None))
        assert len(set(found)) == len(found) > 10
        assert {line.rounds for line in found} == (
            {0} if kernel != "row_stats_grad" else {0, 1, 4, 16}
        )
        assert all(line.segment % (lines.TILE * line.threads) == 0 for line in found)
    with pytest.raises(RuntimeError), native.trying("row_grad", found[1]):
        raise RuntimeError("too many resources")
    assert kernels.module.tried[-1] == ("row_grad", 0, 0, 0)  # the table's line again
    kernels.module = _Module(0)
    amd = list(lines.Native("hip", kernels).candidates("row_stats_grad", case))
    assert {line.segment for line in amd[1:]} == {lines.WHOLE_ROW}


@pytest.mark.parametrize(
    ("name", "slug"), [("AMD Instinct MI300X", "amd-instinct-mi300x"), ("", "gpu-gfx942")]
)
def test_a_gpu_without_a_name_has_a_record(monkeypatch, name, slug):
    """Images without amdgpu.ids: the record would be a hidden file, which no page reads."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(devices, "architecture", lambda index: "gfx942")
    assert device_slug("cuda") == slug
