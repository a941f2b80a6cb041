"""Every supported megatron-core passes all Megatron tests, each in a fresh process."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import megatron_docs
import pytest

from csrc.toolchains import without

VERSIONS = ("0.14.0", "0.16.1", "0.19.2")
TESTS = Path(__file__).parent


def test_the_versions_are_those_that_the_makefile_installs():
    makefile = (megatron_docs.ROOT / "Makefile").read_text()
    assert re.search(r"^MEGATRONS := (.*)$", makefile, re.M).group(1).split() == [*VERSIONS]


def python(version, *arguments):
    """The output of a Python that imports this megatron-core; a failure shows all of it."""
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(
        command,
        env=megatron_docs.environment(version),
        cwd=megatron_docs.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_everything_of_megatron_passes_on(version):
    if reason := without.absent("megatrons"):
        pytest.skip(f"further versions of megatron-core are absent: {reason}")
    if version not in megatron_docs.versions():
        pytest.skip(f"megatron-core {version} is not in build/megatron: make check installs it")
    asked = "import megatron.core; print(megatron.core.__version__)"
    assert python(version, "-c", asked).strip().partition("+")[0] == version
    if version == metadata.version("megatron-core").partition("+")[0]:
        return  # make test and make check run the files themselves on it
    files = sorted({*TESTS.glob("test_megatron_*.py")} - {Path(__file__)})
    said = python(version, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files))
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed.group(1)) >= 600 and "skipped" not in said, said
