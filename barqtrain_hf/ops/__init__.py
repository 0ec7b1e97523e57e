"""Training ops: each is a PyTorch function with a CUDA twin, chosen per call."""

from barqtrain_hf.ops._targets import CountedTarget, raise_bad_target
from barqtrain_hf.ops.attention import Rope, flash_attention
from barqtrain_hf.ops.glu import geglu, gelu, swiglu
from barqtrain_hf.ops.layer_norm import layer_norm
from barqtrain_hf.ops.linear_cross_entropy import TokenStatistics, linear_cross_entropy
from barqtrain_hf.ops.lora import LoraLinear, lora_linear, lora_linears
from barqtrain_hf.ops.lora_beside import LoraLayer, lora_layer, lora_layers
from barqtrain_hf.ops.rms_norm import rms_norm
from barqtrain_hf.ops.rope import apply_rope

__all__ = [
    "CountedTarget",
    "LoraLayer",
    "LoraLinear",
    "Rope",
    "TokenStatistics",
    "apply_rope",
    "flash_attention",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "lora_layer",
    "lora_layers",
    "lora_linear",
    "lora_linears",
    "raise_bad_target",
    "rms_norm",
    "swiglu",
]
