"""All ways to run the loss on a CPU: the native backend per instruction set, the eager backend also
as on an accelerator, and the GPU backends on the SIMT shim."""

from contextlib import contextmanager
from unittest import mock

from bench.without_gpu.simt import build as build_shim
from fused_sft_loss.backends import loader, selection


def _native_isas():
    if selection.reason_against("cpu", "cpu") is not None:
        return []
    return selection.load("cpu").build_info()["isas"]


#: The CUDA and HIP backends, with device code run by the shim, if the shim can be built here.
ON_SHIM = [] if build_shim.missing() else ["cuda-simt", "hip-simt"]
_ISAS = _native_isas()
BUILT = ["eager", "cpu"] if _ISAS else ["eager"]
ON_CPU = ["eager", "eager-accelerator", *(f"cpu-{isa}" for isa in _ISAS), *ON_SHIM]


@contextmanager
def using(name: str):
    """Set up one of ON_CPU and yield its `backend=` argument."""
    backend, _, variant = name.partition("-")
    if variant == "simt":
        with on_shim(backend):
            yield backend
    elif variant == "accelerator":
        with mock.patch("fused_sft_loss.backends.eager.chooses_rows", lambda tensor: False):
            yield backend
    elif variant:
        native = loader.load("cpu")
        native.use_isa(variant)
        try:
            yield backend
        finally:
            native.use_isa(_ISAS[0])
    else:
        yield backend


@contextmanager
def on_shim(name: str, chip=None):
    """Make the backend "cuda" or "hip" run CPU tensors on the shim. For tests only."""
    from bench.without_gpu.simt import module

    shim = module.backend(name, chip)
    load, reason = selection.load, selection.reason_against

    def loaded(wanted):
        return shim if wanted == name else load(wanted)

    def reason_against(wanted, device_type):
        return None if wanted == name else reason(wanted, device_type)

    with mock.patch.multiple(selection, load=loaded, reason_against=reason_against):
        yield
