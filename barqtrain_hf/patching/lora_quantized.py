"""Which of PEFT's layers have an adapter beside weights that bitsandbytes has quantised (QLoRA).

Dettmers et al. 2023, arXiv:2305.14314. The quantised layer is called as it is: which product it takes, and
how it makes the weights of it, is bitsandbytes' affair. bitsandbytes is not imported here: where such a layer
is, it has been.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_NAMES = ("Linear4bit", "Linear8bitLt")
_THEIRS = "bitsandbytes.nn.modules"
_PLAIN = (torch.Tensor, nn.Parameter)


def is_lora_quantized(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA around a linear layer in bitsandbytes' 4 or 8 bits."""
    kind = type(module)
    if kind.__module__ != "peft.tuners.lora.bnb" or kind.__name__ not in _NAMES:
        return False
    base = type(module.base_layer)
    theirs = any(c.__module__ == _THEIRS and c.__name__ in _NAMES for c in base.__mro__)
    return theirs and base.forward.__module__ == _THEIRS


def unusual(base: Any) -> str | None:
    """Why the adapter's part must not be added to what a quantised layer returns, or None."""
    if _has_any_global_hook():
        return "there are hooks on all modules"  # which may keep what it returns
    for parameter in base._parameters.values():
        if parameter is None:
            continue
        kind = type(parameter)
        whole = kind in _PLAIN or kind.__module__ == _THEIRS
        if not whole or not parameter.numel():
            return "its weights are in parts (FSDP, tensor parallelism or ZeRO-3)"
        if parameter.requires_grad:
            return "its own weight is trained too"
    return None
