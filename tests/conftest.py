"""Shared set-up: one seed, the package under test, and a count of what a device would have run."""

import os
from pathlib import Path

import pytest
import torch
from backends import ON_CPU, using

import fused_sft_loss


def pytest_configure():
    """A run meant for a certain copy of the package (`make sanitize`) must not test another."""
    if wanted := os.environ.get("FSL_EXPECT_PACKAGE_IN"):
        found = Path(fused_sft_loss.__file__).resolve()
        if not found.is_relative_to(Path(wanted).resolve()):
            pytest.exit(f"expected fused_sft_loss from {wanted}, got {found}", returncode=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=ON_CPU)
def backend(request):
    """The `backend=` argument of every way of running on a CPU, one after the other."""
    with using(request.param) as name:
        yield name


#: Few tests and many minutes: begun last, they would run when one worker has nothing left to do.
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
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; this machine has none"))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "gpu" in r.keywords]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} GPU tests were skipped: no accelerator here, nothing ran on one.",
            yellow=True,
        )
    everything = terminalreporter.stats.get("skipped", [])
    peers = [r for r in everything if isinstance(r.longrepr, tuple) and "peer:" in r.longrepr[2]]
    if peers:
        terminalreporter.write_line(
            f"{len(peers)} tests beside a peer were skipped: it is not installed in build/peers.",
            yellow=True,
        )
    reasons = [r.longrepr[2] for r in everything if isinstance(r.longrepr, tuple)]
    absent = {r.partition("toolchain: ")[2] for r in reasons if "toolchain: " in r}
    for reason in sorted(absent):
        terminalreporter.write_line(f"Code for GPUs was not looked at: {reason}.", yellow=True)
