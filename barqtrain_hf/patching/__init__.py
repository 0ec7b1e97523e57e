"""Putting ops into a model's instances, and taking them out again."""

from barqtrain_hf.ops import raise_bad_target
from barqtrain_hf.patching.attention_interface import register_attention
from barqtrain_hf.patching.head import FusedLoss, head_unsupported
from barqtrain_hf.patching.install import (
    asks_for_trl_head,
    check_module,
    patch_model,
    unpatch_model,
    unwrap,
)
from barqtrain_hf.patching.report import PatchReport
from barqtrain_hf.patching.token_output import TokenOutput

__all__ = [
    "FusedLoss",
    "PatchReport",
    "TokenOutput",
    "asks_for_trl_head",
    "check_module",
    "head_unsupported",
    "patch_model",
    "raise_bad_target",
    "register_attention",
    "unpatch_model",
    "unwrap",
]
