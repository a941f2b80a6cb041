"""Run programs that were compiled for the SIMT shim."""

import os
import subprocess

import pytest


def run_program(command):
    """Run a program, with or without sanitizers; skips if ThreadSanitizer cannot start."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not start here: sysctl vm.mmap_rnd_bits=28")
    return done
