"""In PYTHONPATH, this keeps every Python process from finding Triton.

See csrc/toolchains/without.py.
"""

import sys

sys.modules["triton"] = None
