"""The model inside its wrappers that computes the loss."""

from torch.nn import Module

from . import preconditions, wrappers
from .protocols import LanguageModel

#: The method of megatron-core's LanguageModule that computes per-token losses from logits.
LOSS = "compute_language_model_loss"


def language_model(model: Module) -> LanguageModel:
    """The innermost model, also inside a vision-language model that holds it as language_model."""
    parts = list(wrappers.wrapped(model))
    if not hasattr(parts[-1], LOSS):
        raise TypeError(
            f"expected a model with {LOSS}, such as megatron-core's GPTModel, wrapped or not; "
            f"got {type(model).__name__}{_elsewhere(model)}"
        )
    for part in parts:
        preconditions.not_wrapped(part, "the model")
    return parts[-1]


def _elsewhere(model: object) -> str:
    """The names of submodules that compute a loss, as a hint for an error."""
    if not isinstance(model, Module):
        return ""
    names = [name for name, part in model.named_modules() if hasattr(part, LOSS)]
    return f", which holds one as {', '.join(names)}: pass that" if names else ""


def nothing_replaced(model: object) -> RuntimeError:
    """The error for a model that has computed its loss in another way."""
    return RuntimeError(
        f"{type(model).__name__} was called with labels and did not compute its loss by "
        f"{LOSS}(labels, logits): fused_cross_entropy has nothing to replace. Another fused loss "
        "may be switched on. Switch it off, or leave fused_cross_entropy out: in Primus "
        "enable_fused_linear_ce=false (and no FUSED_LINEAR_CE=1 in the environment), for its Mamba "
        "models fused_ce_mode=0; in Megatron cross_entropy_fusion_impl other than 'linear'"
    )
