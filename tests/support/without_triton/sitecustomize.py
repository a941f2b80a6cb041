"""Hides Triton from every Python process that has this folder in PYTHONPATH.

csrc/toolchains/without.py says why.
"""

import sys

sys.modules["triton"] = None
