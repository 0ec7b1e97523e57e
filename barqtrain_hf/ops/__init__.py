"""Training ops: each is a PyTorch function with a CUDA twin, chosen per call."""

from barqtrain_hf.ops.linear_cross_entropy import linear_cross_entropy
from barqtrain_hf.ops.rms_norm import rms_norm

__all__ = ["linear_cross_entropy", "rms_norm"]
