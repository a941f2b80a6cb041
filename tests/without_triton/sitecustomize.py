"""In PYTHONPATH, this keeps every Python process from finding Triton (see csrc/without.py)."""

import sys

sys.modules["triton"] = None
