"""Putting ops into a model's instances, and taking them out again."""

from barqtrain_hf.ops import raise_bad_target
from barqtrain_hf.patching.attention_interface import register_attention
from barqtrain_hf.patching.head import FusedLoss, head_unsupported
from barqtrain_hf.patching.install import patch_model, unpatch_model, unwrap
from barqtrain_hf.patching.report import PatchReport

__all__ = [
    "FusedLoss",
    "PatchReport",
    "head_unsupported",
    "patch_model",
    "raise_bad_target",
    "register_attention",
    "unpatch_model",
    "unwrap",
]
