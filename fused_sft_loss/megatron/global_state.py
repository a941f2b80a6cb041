"""Global state of a running Megatron, looked up without importing it.

A module that nobody has imported has no state, so each function looks in `sys.modules`.
"""

import sys
from typing import Any

from .protocols import ParallelState, RerunStateMachine


def parallel_state() -> ParallelState | None:
    """megatron.core.parallel_state, or None before it is initialised."""
    parallel: Any = sys.modules.get("megatron.core.parallel_state")
    return parallel if parallel is not None and parallel.model_parallel_is_initialized() else None


def context_parallel_size() -> int:
    """Ranks that share a sequence; 1 before Megatron is initialised."""
    parallel = parallel_state()
    return 1 if parallel is None else parallel.get_context_parallel_world_size()


def training_args() -> Any:
    """Megatron-LM's global arguments, or None outside its runs. They have the config's fields."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    try:
        return None if global_vars is None else global_vars.get_args()
    except AssertionError:  # not initialised
        return None


def rerun_state_machine() -> RerunStateMachine | None:
    """Megatron's rerun state machine, or None if its module was never imported."""
    module: Any = sys.modules.get("megatron.core.rerun_state_machine")
    return None if module is None else module.get_rerun_state_machine()
