"""Where megatron-core's versions differ, and how its state is found without importing it.

    0.14   the logits of a Float16Module always become fp32; a 3-tuple's loss is divided by
           num_tokens unclamped (0.16 and 0.19 clamp it to 1), which a gradient of 0 survives
    0.15   Float16Module.forward(fp32_output=...)
    0.18   GPTModel.forward(output_processor=...): a callback in place of output layer and loss
    0.19   get_batch_on_this_cp_rank(batch, is_hybrid_cp, ...): see `context_parallel_slice`

Versions are told apart by what a signature accepts, never by a number: forks carry patches.
"""

import inspect
import sys


def parallel_state():
    """megatron.core.parallel_state, or None where it is not initialised."""
    parallel = sys.modules.get("megatron.core.parallel_state")
    return parallel if parallel is not None and parallel.model_parallel_is_initialized() else None


def training_args():
    """Megatron-LM's global arguments, which hold the config's fields, or None outside its runs."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    try:
        return None if global_vars is None else global_vars.get_args()
    except AssertionError:  # not initialised
        return None


def rerun_state_machine():
    """Megatron's rerun state machine, or None where its module was never imported."""
    module = sys.modules.get("megatron.core.rerun_state_machine")
    return None if module is None else module.get_rerun_state_machine()


#: Where a wrapper of torch's keeps its model: torch.compile and checkpoint_wrapper.
COMPILED, CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"


def wrapped(model):
    """The model, then what it wraps: DistributedDataParallel, Float16Module, GPTModel."""
    while model is not None:
        yield model
        # Not by getattr: those two pass on what they do not have to the model inside.
        own = getattr(model, "__dict__", {}).get("_modules") or {}
        inner = own.get(COMPILED, own.get(CHECKPOINTED))
        model = getattr(model, "module", None) if inner is None else inner


def attribute(model, name):
    """The first `name` that is not None on the model or in its wrappings, else None."""
    values = (getattr(part, name, None) for part in wrapped(model))
    return next((value for value in values if value is not None), None)


def accepts(model, name):
    """Whether the model or something it wraps takes the keyword argument `name` in forward."""
    return any(name in inspect.signature(part.forward).parameters for part in wrapped(model))


def context_parallel_slice(batch, cp_group=None):
    """`get_batch_on_this_cp_rank(batch)` of the installed megatron-core, zigzag over sequences.

    `batch` is a dict of tensors [b, s, ...] (attention_mask [b, 1, s, s]), None where absent. What
    predicts across a cut must be shifted before: see `shift_packed_targets`.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    accepted = inspect.signature(get_batch_on_this_cp_rank).parameters
    options = {"cp_group": cp_group or parallel_state().get_context_parallel_group()}
    options |= {"is_hybrid_cp": False, "use_per_sequence_balancing": True}
    return get_batch_on_this_cp_rank(batch, **{k: v for k, v in options.items() if k in accepted})
