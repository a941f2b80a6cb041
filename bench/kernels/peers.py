"""The losses of other libraries as providers; peer_losses.py calls them. None is a dependency."""

from functools import partial

from .peer_losses import (
    aiter,
    flash_attention,
    fp32_is_not_for_fused,
    liger,
    liger_megatron,
    megatron,
    megatron_fused,
    quack,
    reason_against_aiter,
    reason_against_overwriting,
    reason_without_megatron,
    transformer_engine,
)
from .provider import Provider

ON_GPU = {"devices": ("cuda",), "writes": True}
TRANSFORMER_ENGINE = {**ON_GPU, "module": "transformer_engine"}
TRANSFORMER_ENGINE["install"] = "transformer_engine[pytorch]"

# The predicted bytes per element come from the peers' sources; Megatron's were measured. Both
# Megatron losses overwrite fp32 logits, so `writes` is True.
PEERS = (
    Provider(
        "megatron",
        "Megatron vocab_parallel",
        megatron,
        ((0, 0, 1), (0, 1, 1)),
        reason=reason_without_megatron,
        writes=True,
    ),
    Provider(
        "megatron-fused",
        "Megatron fused",
        megatron_fused,
        ((0, 0, 1), (6, 0, 1)),
        reason=fp32_is_not_for_fused,
        writes=True,
    ),
    Provider(
        "liger",
        "Liger cross-entropy",
        liger,
        ((0, 0, 0), (0, 0, 0)),
        module="liger_kernel",
        install="liger-kernel",
        sharded=False,
        precision="logits",
        softcap=True,
        one_read=True,
        **ON_GPU,
    ),
    Provider(
        "liger-megatron",
        "Liger vocab-parallel",
        liger_megatron,
        ((4, 0, 0), (4, 1, 0)),
        module="liger_kernel",
        install="liger-kernel",
        **ON_GPU,
    ),
    Provider(
        "te",
        "TransformerEngine",
        partial(transformer_engine, inplace=False),
        ((0, 1, 0), (0, 1, 0)),
        **TRANSFORMER_ENGINE,
    ),
    Provider(
        "te-inplace",
        "TransformerEngine, in place",
        partial(transformer_engine, inplace=True),
        ((0, 0, 0), (0, 0, 0)),
        reason=reason_against_overwriting,
        **TRANSFORMER_ENGINE,
    ),
    Provider(
        "aiter",
        "aiter, in place",
        aiter,
        ((0, 0, 0), (0, 0, 0)),
        module="aiter",
        install="amd-aiter --index-url https://pypi.amd.com/simple/",
        reason=reason_against_aiter,
        one_read=True,
        **ON_GPU,
    ),
    *(
        Provider(
            f"{name}{suffix}",
            f"{title}, {mode}",
            partial(build, inplace=inplace),
            peak,
            module=module,
            install=install,
            sharded=sharded,
            **ON_GPU,
        )
        for name, title, build, module, install, sharded in (
            (
                "flash-attn",
                "flash-attention Triton",
                flash_attention,
                "flash_attn",
                "flash-attn",
                True,
            ),
            ("quack", "quack", quack, "quack", "quack-kernels", False),
        )
        for suffix, mode, inplace, peak in (
            ("", "new gradient", False, ((0, 0, 0), (0, 1, 0))),
            ("-inplace", "in place", True, ((0, 0, 0), (0, 0, 0))),
        )
    ),
)
