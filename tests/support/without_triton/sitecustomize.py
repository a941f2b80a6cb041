"""Hides Triton from every Python process that has this folder in PYTHONPATH.

csrc/toolchains/without.py explains the switch that needs it.
"""

import sys

sys.modules["triton"] = None
