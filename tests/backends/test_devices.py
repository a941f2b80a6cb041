"""A compiled module is chosen for a GPU by the module's targets and the driver's version.

Devices, modules and the driver are faked, so the tests run anywhere.
"""

from types import SimpleNamespace

import pytest
import torch

import fused_sft_loss.__main__ as command
from fused_sft_loss.backends import devices, loader, selection


@pytest.fixture
def machine(monkeypatch):
    """machine(capabilities or gfx names, targets, ...) makes this process see such a machine."""
    cached = (selection.reason_against, selection.load)

    def pretend(gpus, targets, toolkit="nvcc 13.0.88", driver=(13, 0)):
        vendor = "hip" if str(gpus[0]).startswith("gfx") else "cuda"
        info = {"version": "0.1.0", "toolkit": toolkit, "targets": targets}
        modules = {vendor: SimpleNamespace(build_info=lambda: info)}

        def load(name):
            if name not in modules:
                raise ImportError(f"no _{name} here")
            return modules[name]

        monkeypatch.setattr(torch.version, "cuda", "13.0" if vendor == "cuda" else None)
        monkeypatch.setattr(torch.version, "hip", "7.0" if vendor == "hip" else None)
        monkeypatch.setattr(loader, "load", load)
        monkeypatch.setattr(devices, "driver_version", lambda: driver)
        properties = [SimpleNamespace(gcnArchName=gpu) for gpu in gpus]
        pairs = [tuple(map(int, gpu.split("."))) for gpu in gpus] if vendor == "cuda" else []
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: len(gpus),
            "get_device_name": lambda index: f"GPU {index}",
            "get_device_properties": properties.__getitem__,
            "get_device_capability": pairs.__getitem__,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for function in cached:
            function.cache_clear()
        return vendor

    yield pretend
    for function in cached:
        function.cache_clear()


DEFAULT = "8.0 9.0a 10.0+PTX"
AMD = "gfx90a gfx942"


@pytest.mark.parametrize(
    "gpu, targets, runs",
    [
        ("8.0", DEFAULT, True),
        ("8.6", DEFAULT, True),  # runs machine code of 8.0
        ("8.9", DEFAULT, True),
        ("9.0", DEFAULT, True),
        ("10.0", DEFAULT, True),
        ("10.3", DEFAULT, True),
        ("12.0", DEFAULT, True),  # through PTX
        ("7.5", DEFAULT, False),
        ("8.0", "9.0a", False),
        ("7.5", "9.0a", False),
        ("12.0", "9.0a", False),
        ("10.0", "9.0a", False),
        ("9.0", "9.0a", True),
        ("12.0", "8.0 9.0", False),
        ("9.0", "8.0", False),
        ("8.0", "8.6", False),  # code of a minor version runs on that one and later ones
        ("8.6", "8.6", True),
        ("9.0", "8.0+PTX", True),
        ("7.5", "8.0+PTX", False),
        ("10.0", "9.0a+PTX", False),  # PTX of 9.0a runs on 9.0 only
        ("10.3", "10.0a", False),
        ("10.3", "10.0f", True),
        ("12.0", "10.0f+PTX", False),
        ("10.0", "8.0", False),  # versions compare as numbers, not as text
        ("gfx942:sramecc+:xnack-", AMD, True),
        ("gfx90a:sramecc+:xnack-", AMD, True),
        ("gfx950:sramecc+:xnack-", AMD, False),
        ("gfx90c", AMD, False),
        ("gfx9", AMD, False),
        ("gfx90a:sramecc+:xnack-", "gfx90a:xnack-", True),
        ("gfx90a:sramecc+:xnack-", "gfx90a:xnack+", False),
    ],
)
def test_a_module_is_chosen_only_where_its_targets_run(machine, gpu, targets, runs):
    name = machine([gpu], targets)
    reason = selection.reason_against(name, "cuda")
    assert (reason is None) == runs, reason
    assert (selection.best("cuda") == name) == runs
    if not runs:
        assert f"has code for {targets}, and cuda:0 (GPU 0) is {gpu}; " in reason
        advice = "its kernels need 8.0" if gpu == "7.5" else f"ARCH.*={gpu.partition(':')[0]}, or "
        with pytest.raises(NotImplementedError, match=f"{advice}.* Here backend='"):
            selection.resolve(name, "cuda")


def test_one_gpu_that_it_does_not_run_on_is_enough(machine):
    """The choice is a constant of a compiled graph, which may run on either GPU."""
    machine(["9.0", "7.5"], DEFAULT)
    reason = selection.reason_against("cuda", "cuda")
    assert "cuda:1 (GPU 1) is 7.5" in reason and "CUDA_VISIBLE_DEVICES" in reason
    machine(["9.0", "8.6"], DEFAULT)
    assert selection.reason_against("cuda", "cuda") is None


@pytest.mark.parametrize(
    "toolkit, driver, gpu, words",
    [
        ("nvcc 13.0.88", (12, 8), "9.0", "by CUDA 13.0, and this driver is for CUDA 12.8 at most"),
        ("nvcc 13.0.88", (13, 0), "9.0", None),
        ("nvcc 13.1.20", (13, 0), "9.0", None),  # minor versions are compatible
        ("nvcc 13.1.20", (13, 0), "12.0", "is 12.0; build"),  # but a driver rejects newer PTX
        ("nvcc 13.0.88", (14, 0), "9.0", None),
        ("nvcc 12.8.93", (13, 0), "12.0", None),
        ("nvcc of unknown version", (12, 8), "9.0", None),
        ("nvcc 13.0.88", None, "12.0", None),
    ],
)
def test_a_driver_older_than_the_runtime_inside_is_a_reason(machine, toolkit, driver, gpu, words):
    machine([gpu], DEFAULT, toolkit, driver)
    reason = selection.reason_against("cuda", "cuda")
    assert reason is None if words is None else words in reason


def test_the_report_shows_the_reason_and_the_devices(machine):
    machine(["8.0", "12.0"], "9.0a", driver=(12, 8))
    report = "\n".join(command.environment())
    assert "  cuda    no: its compiled module is made by CUDA 13.0, and this driver" in report
    assert "  cuda:1 is GPU 1, 12.0\n" in report and "the driver runs CUDA 12.8" in report
    assert "backend=None takes 'cuda'" not in report


@pytest.mark.parametrize("outcome, version", [(0, (13, 2)), (1, None)])
def test_the_driver_is_asked_for_its_version(monkeypatch, outcome, version):
    def ask(number):
        number._obj.value = 13020
        return outcome

    library = SimpleNamespace(cuDriverGetVersion=ask)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: library)
    assert devices.driver_version.__wrapped__() == version


def test_without_a_driver_there_is_no_version(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    assert devices.driver_version.__wrapped__() is None
