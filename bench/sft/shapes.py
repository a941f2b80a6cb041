"""The layer shapes of real models, by name. Their vocabularies are in bench.kernels.cases.

Only shapes are taken. `python -m bench kernels` measures softcaps and padded vocabularies.
"""

from dataclasses import dataclass

from ..kernels.cases import MODELS


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int  # key and value heads
    head_dim: int
    gated: bool = True  # SwiGLU, RMSNorm, rotary positions, no biases


SHAPES = {
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128),
    "qwen2.5": Shape(28, 3584, 18944, 28, 4, 128),  # 7B
    "gemma2": Shape(42, 3584, 14336, 16, 8, 256),  # 9B
    "mistral-nemo": Shape(40, 5120, 14336, 32, 8, 128),
    "gpt2": Shape(12, 768, 3072, 12, 12, 64, gated=False),
}


def columns(name, tp):
    """Columns of all shards of a model's vocabulary."""
    return MODELS[name].columns(tp) * tp
