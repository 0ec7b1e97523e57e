"""Training ops: each is a PyTorch function with a CUDA twin, chosen per call."""

from barqtrain_hf.ops._targets import CountedTarget, raise_bad_target
from barqtrain_hf.ops.linear_cross_entropy import TokenStatistics, linear_cross_entropy
from barqtrain_hf.ops.rms_norm import rms_norm

__all__ = [
    "CountedTarget",
    "TokenStatistics",
    "linear_cross_entropy",
    "raise_bad_target",
    "rms_norm",
]
