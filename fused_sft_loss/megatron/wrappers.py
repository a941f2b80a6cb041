"""Attributes of a model inside its wrappers: DistributedDataParallel, Float16Module and others."""

from collections.abc import Iterator
from typing import Any

#: The names under which torch.compile and checkpoint_wrapper keep the module that they wrap.
COMPILED, CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
#: The name under which LLaVAModel and Megatron-Bridge's Qwen-VL models hold their GPTModel.
LANGUAGE_MODEL = "language_model"


def submodules(module: object) -> dict[str, Any]:
    """The module's own submodules by name.

    getattr will not do: torch.compile's and checkpoint_wrapper's modules pass the names that they
    do not know on to the module inside.
    """
    return getattr(module, "__dict__", {}).get("_modules") or {}


def wrapped(model: Any) -> Iterator[Any]:
    """The model, then each model inside it: DistributedDataParallel, Float16Module, GPTModel.

    Inside a vision-language model the next one is its language model.
    """
    while model is not None:
        yield model
        own = submodules(model)
        inner = own.get(COMPILED, own.get(CHECKPOINTED))
        if inner is None:
            inner = getattr(model, "module", None)
        model = own.get(LANGUAGE_MODEL) if inner is None else inner


def attribute(model: object, name: str) -> Any:
    """The first `name` that is not None on the model or on a model inside it, else None."""
    values = (getattr(part, name, None) for part in wrapped(model))
    return next((value for value in values if value is not None), None)
