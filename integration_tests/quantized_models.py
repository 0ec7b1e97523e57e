"""Tiny models whose linear layers bitsandbytes has quantised, under LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import adapted, wrapped
from models import tiny_model
from torch import nn


def quantized(
    family: str,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    bits: int = 4,
    overrides: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """As `adapted`, with all linear layers but the head in 4 bits (nf4, double quantisation) or 8."""
    model = tiny_model(family, dtype, **(overrides or {}))
    quantize(model, dtype, bits)
    return wrapped(model, adapter_dtype, **options)


def quantize(model: Any, dtype: torch.dtype, bits: int = 4, device: str = "cpu") -> None:
    """Exchanges all linear layers but the head; they compute in ``dtype``."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, quantized_layer(child, dtype, bits, device))
    # As from_pretrained leaves it; PEFT chooses its layers by these.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8


def quantized_layer(linear: Any, dtype: torch.dtype, bits: int = 4, device: str = "cpu") -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.data.cpu()
    layer: Any
    if bits == 4:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=layer)
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    layer.weight = layer.weight.to(device)
    layer.train(linear.training)
    never_repacked(layer)
    return layer


def never_repacked(model: nn.Module) -> None:
    """On some CPUs a call in evaluation rearranges the weights for good, and gradients are gone."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_layers(model: Any) -> dict[str, Any]:
    """PEFT's LoRA layers around quantised ones, by the names they have in the report."""
    kinds = pytest.importorskip("peft.tuners.lora.bnb")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = (kinds.Linear4bit, kinds.Linear8bitLt)
    return {name: module for name, module in base.named_modules() if type(module) in kinds}


def dequantized(layer: Any) -> torch.Tensor:
    """The weight that a layer of bitsandbytes multiplies by."""
    integrations = pytest.importorskip("peft.utils.integrations")
    return integrations.dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))


def exact(model: Any, family: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model in fp32 of the numbers that a quantised one has, adapters included."""
    truth = adapted(family, dtype, **options).float()
    theirs = quantized_layers(model)
    for name, layer in truth.get_base_model().named_modules():
        if name in theirs:
            layer.base_layer.weight.data = dequantized(theirs[name].base_layer).float()
            for part in ("lora_A", "lora_B"):
                weight = getattr(theirs[name], part)["default"].weight
                getattr(layer, part)["default"].weight.data = weight.detach().float()
    return truth
