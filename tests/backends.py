"""The ways of running on a CPU: every backend, and the native one per instruction set."""

from contextlib import contextmanager

from fused_sft_loss.backends import choose


def _native_isas():
    return choose.load("cpu").isas() if choose.reason_against("cpu", "cpu") is None else []


ON_CPU = ["eager", *(f"cpu-{isa}" for isa in _native_isas())]


@contextmanager
def using(name: str):
    """Yield the `backend=` argument of one of ON_CPU, with its instruction set chosen."""
    backend, _, isa = name.partition("-")
    if not isa:
        yield backend
        return
    native = choose.load("cpu")
    native.use_isa(isa)
    try:
        yield backend
    finally:
        native.use_isa(native.isas()[0])
