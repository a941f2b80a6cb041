"""Shared set-up: the seed, the check of the package under test, and the order of the tests."""

import importlib.util
import os
from pathlib import Path

# Inductor's disk cache identifies an operator by name. After a change to an operator it would run
# code compiled for the old one.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch
from backends import ON_CPU, using

import fused_sft_loss
from csrc.toolchains import without

pytest_plugins = ["skips"]


def pytest_configure():
    """Stop a run that would test another package or another set of tools than it should.

    `make sanitize` names the package's folder; csrc/toolchains/without.py explains the switch.
    """
    if (reason := without.absent("triton")) and importlib.util.find_spec("triton"):
        pytest.exit(
            f"{reason} needs PYTHONPATH=tests/support/without_triton; `make test` does it", 3
        )
    if wanted := os.environ.get("FSL_EXPECT_PACKAGE_IN"):
        found = Path(fused_sft_loss.__file__).resolve()
        if not found.is_relative_to(Path(wanted).resolve()):
            pytest.exit(f"expected fused_sft_loss from {wanted}, got {found}", returncode=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=ON_CPU)
def backend(request):
    """The `backend=` argument of every way to run on a CPU, one after the other."""
    with using(request.param) as name:
        yield name


#: Few tests that take many minutes. They start first, so that no worker ends up running one alone.
FIRST = (
    "test_triton_interpreted",
    "test_codegen_gpu",
    "test_simt_kernels",
    "test_bench_kernels_runs",
    "test_megatron_versions",
    "test_triton_offline",
    "test_bench_sft",
    "test_build",
)


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: FIRST.index(name) if (name := item.path.stem) in FIRST else len(FIRST)
    )
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # a keyword would also match the folder "gpu"
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; this machine has none"))
