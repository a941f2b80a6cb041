"""`python -m bench codegen`, run by the tests in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "build/peers"


def codegen(folder, *arguments):
    """What it writes as JSON; run where kernels are compiled, not interpreted."""
    path = folder / "records.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "codegen", "--json", str(path), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode in (0, 1) and path.exists(), done.stderr[-4000:]
    return json.loads(path.read_text())
