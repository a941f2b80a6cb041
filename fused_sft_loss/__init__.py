"""The masked next-token loss of large-vocabulary SFT, computed straight on the logits."""

from importlib.metadata import PackageNotFoundError, version

from .api import SFTLoss, TokenMetrics, sft_loss, token_metrics
from .linear.loss import linear_sft_loss
from .logprobs import token_logprobs
from .targets import shift_targets

__all__ = [
    "SFTLoss",
    "TokenMetrics",
    "linear_sft_loss",
    "sft_loss",
    "shift_targets",
    "token_logprobs",
    "token_metrics",
]

try:
    __version__ = version("fused_sft_loss")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
