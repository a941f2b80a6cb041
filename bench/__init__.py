"""Benchmarks and demonstrations of fused_sft_loss: `python -m bench --help` lists them."""

import importlib.util
import sys
from pathlib import Path

KERNELS = "fused_sft_loss.triton_kernels"
FOLDER = Path(__file__).parents[1] / "triton_kernels"


class _Checkout:
    """Finds the Triton kernels if the package is used in a checkout and is not installed.

    Their folder is beside the package. An installation puts it inside.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != KERNELS:
            return None
        init, places = FOLDER / "__init__.py", [str(FOLDER)]
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=places)


sys.meta_path.append(_Checkout())  # last: an installed package comes first
