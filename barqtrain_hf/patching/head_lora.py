"""LoRA on the LM head: the adapter is a second, thin product of the fused loss.

PEFT's layer adds ``scaling * B(A(dropout(x)))`` to its base layer's output. A and the dropout run here as
PEFT's own modules; B is handed to `linear_cross_entropy` with the base weight, so that neither logits nor
the merged weight exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_lora_linear(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA around a plain linear layer."""
    if type(module).__module__ != "peft.tuners.lora.layer" or type(module).__name__ != "Linear":
        return False
    return type(module.base_layer) is nn.Linear


def unsupported(layer: Any) -> str | None:
    """Why a LoRA head keeps the stock forward for this call, or None."""
    if layer.disable_adapters:
        return "its adapter is disabled while merged" if layer.merged else None
    if layer.fan_in_fan_out:
        return "its adapter has fan_in_fan_out"
    for name in active(layer):
        if name in layer.lora_variant:
            return f"adapter {name!r} on the head is not plain LoRA"
        if layer.lora_B[name].bias is not None:
            return f"adapter {name!r} on the head has a bias"
    hooked = [layer.base_layer, *(layer.lora_B[name] for name in active(layer))]
    if any(m._forward_hooks or m._forward_pre_hooks for m in hooked):
        return "there are hooks inside its LoRA layer (ZeRO-3, or the user's)"
    return None


def active(layer: Any) -> list[str]:
    """The adapters that a forward pass adds."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def low_rank_product(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(u [..., r], b [V, r]) with u @ b.T what the active adapters add; r is the sum of their ranks."""
    names = active(layer)
    if not names:
        return None
    u = []
    for name in names:
        a = layer.lora_A[name]
        cast = layer._cast_input_dtype(x, a.weight.dtype)
        u.append(a(layer.lora_dropout[name](cast)) * layer.scaling[name])
    b = [layer.lora_B[name].weight for name in names]
    return (u[0], b[0]) if len(names) == 1 else (torch.cat(u, -1), torch.cat(b, 1))
