"""The parts of `python -m bench gpu`, in order of priority: tests first, then what is measured.

Limits are seconds of a budget of 600. What a part does not use, later ones may.
"""

import sys

from csrc.toolchains import headers

from . import outcomes
from .found import lacking
from .runner import Part

BACKENDS_TEST = "tests/gpu/test_gpu.py"
SHARDED_TEST = "tests/gpu/test_gpu_sharded.py"
TEST_MODULES = ("pytest", "hypothesis")
EXAMPLES = 30  # of each test of many, in place of 120, without pytest-xdist
#: What pip calls a module, if it has another name.
PACKAGES = {"megatron.core": "megatron-core", "mistral_common": "mistral-common"}
#: Small, because the tools make kernels a hundred times slower.
SANITIZED = "cuda and (metrics_agree or graph_capture)"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PYTHON = sys.executable

#: Cases of `bench kernels`, most wanted first: the README's, then every model, shards, fractions.
BENCHMARKS = {
    "kernels-1": (("mistral-nemo",), ("1",), ("1.0", "0.3")),
    "kernels-2": (("llama3-8b", "qwen2.5", "gemma2", "gpt2"), ("1",), ("1.0", "0.3")),
    "kernels-3": (("all",), ("8",), ("1.0", "0.3")),
    "kernels-4": (("all",), ("1", "8"), ("0.5", "0.1")),
}
LIMITS = {"kernels-1": (150, 120), "kernels-2": (180, 60), "kernels-3": (180, 0)}
LIMITS["kernels-4"] = (400, 0)  # what is left
#: torch.compile takes half a minute for every shape. The README's and the full ones have it.
WITHOUT = {"kernels-3": ("reference-compiled",), "kernels-4": ("reference-compiled",)}
SECONDS = "0.04"  # to time a row
STOP = "--stop"  # of `bench kernels` and `bench linear`
#: What a rehearsal on a CPU measures in place of each benchmark's models.
REHEARSAL = ("--shape", "1,16,4096", "--provider", "reference", "ours-eager")
#: Its weights are 131072 x 32, three times in fp32; most of its time is that of imports.
SMALL_TRAINING = ("--steps", "2", "--seq-length", "16", "--layers", "1", "--hidden", "32")


def lacks(modules):
    """Why a part that needs Python modules cannot run, with the line that installs them; or None"""
    names = [PACKAGES.get(name, name) for name in lacking(modules)]
    return f"needs {', '.join(names)}: pip install {' '.join(names)}" if names else None


def all_parts(found, folder):
    """Every Part on the machine `found`; files are written below `folder`."""
    return [
        _build(found),
        *_tests(found),
        _training(found, folder),
        _benchmark("kernels-1", found, folder),
        *_sanitizers(found),
        _linear(found, folder),
        _benchmark("kernels-2", found, folder),
        _launches(found, folder),
        *(_benchmark(name, found, folder) for name in ("kernels-3", "kernels-4")),
    ]


def _build(found):
    """In place, for this GPU alone. What else is built in this checkout stays."""
    variable = {"cuda": "TORCH_CUDA_ARCH_LIST", "hip": "PYTORCH_ROCM_ARCH"}[found.native]
    environment = (("FUSED_SFT_LOSS_BUILD", f"cpu,{found.native}"), (variable, found.target))
    skip = None
    if found.device != "cuda":
        skip = "a rehearsal builds nothing"
    elif found.reasons[found.native] is None:
        skip = "the compiled kernels are here already"
    elif found.compiler is None:
        skip = f"Triton is checked alone: {found.missing}"
    return Part(
        "build",
        f"build of _{found.native}",
        [PYTHON, "setup.py", "-q", "build_ext", "--inplace"],
        limit=180,
        skip=skip or lacks(_of_the_build()),
        environment=environment,
    )


def _of_the_build():
    """torch ships pybind11's headers."""
    return ("setuptools", "ninja", *(() if headers.pybind11() else ("pybind11",)))


def _pytest(name, title, file, chosen, limit, skip=None, workers=1):
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
    environment = ()
    if workers > 1 and lacking(("xdist",)):
        environment = (("FSL_EXAMPLES", str(EXAMPLES)),)
    elif workers > 1:
        command += ["-n", str(workers)]
    return Part(
        name,
        title,
        command,
        limit,
        skip=skip or lacks(TEST_MODULES),
        outcome=outcomes.tests,
        environment=environment,
    )


def _tests(found):
    """Most of their time is Triton's compiler, so several processes share the GPU."""
    native = found.native
    title = {"cuda": "CUDA kernels", "hip": "HIP kernels", "triton": "Triton kernels"}
    reasons = {native: None if found.compiler else found.reasons[native]}
    reasons["triton"] = found.reasons["triton"]
    for name, reason in reasons.items():
        chosen = f"{name} and not compiled_step and not graph_capture"
        args = f"test-{name}", f"tests of the {title[name]}", BACKENDS_TEST, chosen, 150, reason
        yield _pytest(*args, workers=4)
    title = "graph capture, without a synchronisation"
    yield _pytest("test-graphs", title, BACKENDS_TEST, "graph_capture", 45)
    yield _pytest("test-sharded", "TP 2 and TP 4 on one device", SHARDED_TEST, "one_device", 75)
    yield _pytest("test-compile", "torch.compile", BACKENDS_TEST, "compiled_step", 60)


def _sanitizers(found):
    if found.native != "cuda":
        skip = "compute-sanitizer is for NVIDIA GPUs"
    elif found.sanitizer is None:
        skip = "there is no compute-sanitizer on PATH (it comes with the CUDA toolkit)"
    elif found.reasons["cuda"] and not found.compiler:
        skip = "there are no compiled kernels"
    else:
        skip = None
    for tool in TOOLS:
        part = _pytest(
            f"sanitize-{tool}", f"compute-sanitizer, {tool}", BACKENDS_TEST, SANITIZED, 40
        )
        prefix = [found.sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        yield Part(
            part.name,
            part.title,
            [*prefix, *part.command],
            part.limit,
            skip=skip or part.skip,
            outcome=outcomes.sanitized,
        )


def _training(found, folder):
    size = SMALL_TRAINING if found.device == "cpu" else ("--steps", "12")
    path = folder / "sft" / "result.json"
    command = [*_bench("sft", found), *size, "--out", str(path.parent)]
    modules = ("rich", "matplotlib", "megatron.core", "mistral_common")
    return Part(
        "train",
        "bf16 training agrees with the reference",
        command,
        75,
        skip=lacks(modules),
        outcome=outcomes.of_training(path),
        record=path,
    )


def _benchmark(name, found, folder):
    models, degrees, scored = BENCHMARKS[name]
    chosen = REHEARSAL if found.device == "cpu" else ("--model", *models)
    path = record_path(folder, name)
    command = [*_bench("kernels", found), *chosen, "--tp", *degrees, "--scored", *scored]
    if found.device != "cpu" and name in WITHOUT:
        command += ["--without", *WITHOUT[name]]
    command += ["--seconds", SECONDS, "--json", str(path)]
    limit, least = LIMITS[name]
    what = f"{', '.join(models)}, TP {' and '.join(degrees)}, {' and '.join(scored)} scored"
    outcome = outcomes.of_record(path, outcomes.of_kernels)
    title = f"benchmark: {what}"
    return Part(name, title, command, limit, least, outcome=outcome, stop=STOP, record=path)


def _linear(found, folder):
    small = ["--rows", "16", "--hidden", "32", "--vocab", "500"] if found.device == "cpu" else []
    path = linear_path(folder, found.slug)
    command = [*_bench("linear", found), *small, "--seconds", SECONDS, "--json", str(path)]
    title = "benchmark without logits: 8192 x 4096 x 131072, bf16"
    outcome = outcomes.of_record(path, outcomes.of_linear)
    return Part("linear", title, command, 90, 45, outcome=outcome, stop=STOP, record=path)


def _launches(found, folder):
    path = launches_path(folder, found.slug)
    command = [*_bench("launches", found), "--json", str(path)]
    outcome = outcomes.of_record(path, outcomes.of_launches)
    return Part(
        "launches",
        "other lines of the launch tables",
        command,
        limit=90 if found.device == "cuda" else 240,  # a rehearsal compiles the shim for a minute
        least=45,
        skip=_no_lines(found),
        outcome=outcome,
        record=path,
    )


def _no_lines(found):
    """Why there is no backend whose launch table can be tried, or None."""
    reasons = dict(found.reasons)
    if found.device == "cpu":
        from ..without_gpu.simt import build

        reasons["cuda"] = build.missing()
    elif found.compiler:  # the part `build` makes it
        reasons[found.native] = None
    if all(reasons.values()):
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return None


def _bench(name, found):
    return [PYTHON, "-m", "bench", name, "--device", found.device or "cuda"]


def record_path(folder, name):
    return folder / "parts" / f"{name}.json"


def linear_path(folder, slug):
    return folder / "linear" / f"{slug}.json"


def launches_path(folder, slug):
    return folder / "launches" / f"{slug}.json"
