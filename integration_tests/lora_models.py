"""Tiny models with LoRA adapters that are not zero, and the fused path of `lora_linear` on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from models import tiny_model

from barqtrain_hf.ops import lora, lora_beside
from barqtrain_hf.patching import lora as patching

# Nothing else is patched: what differs from stock is the op's doing.
LORA_ONLY = {
    "rms_norm": False,
    "layer_norm": False,
    "glu": False,
    "rope": False,
    "attention": False,
    "linear_cross_entropy": False,
}


def adapted(
    family: str,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    overrides: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A tiny model under PEFT, the same weights every time; ``options`` are of its `LoraConfig`."""
    return wrapped(tiny_model(family, dtype, **(overrides or {})), adapter_dtype, **options)


def wrapped(base: Any, adapter_dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model under PEFT, the same adapters every time; ``options`` are of its `LoraConfig`."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    torch.manual_seed(5)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    fill(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return model


def fill(model: Any, adapter: str = "default") -> None:
    """Random numbers for what is zero at first, which would hide the adapters."""
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def lora_layers(model: Any) -> dict[str, Any]:
    """PEFT's LoRA layers around linear ones, by the names they have in the report."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = pytest.importorskip("peft.tuners.lora.layer").Linear
    return {name: module for name, module in base.named_modules() if type(module) is kind}


def assert_close(
    ours: Iterable[torch.Tensor], stock: Iterable[torch.Tensor], rounding: float = 2e-6
) -> None:
    """Equality up to the order of fp32 sums, of a whole model."""
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine - theirs).norm() <= rounding * theirs.norm() + 1e-7


def force_fused(patch: pytest.MonkeyPatch) -> list[int]:
    """From now on the ops of LoRA take their fused paths wherever they can; how many layers each call had."""
    calls: list[int] = []

    def watched(apply: Any, x: torch.Tensor, layers: Any, dtype: Any) -> tuple[torch.Tensor, ...]:
        calls.append(len(layers))
        return apply(x, layers, dtype)

    for op in (lora, lora_beside):
        patch.setattr(op, "use_cuda", lambda op, backend, x, unsupported: unsupported is None)
        patch.setattr(op, "apply", partial(watched, op.apply))
    patch.setattr(patching, "_probed", {})  # that path is probed too
    return calls
