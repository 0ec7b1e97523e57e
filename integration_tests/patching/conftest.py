"""Fixtures of the tests of attention and of LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lora_models import force_fused

from barqtrain_hf.ops import flash_attention
from barqtrain_hf.patching import (
    attention,
    attention_interface,
)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is installed on a CPU too, without being asked for by name."""
    monkeypatch.setattr(attention, "_unusable", lambda module, asked_for: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options of every call of the op from a model."""
    found: list[dict[str, Any]] = []

    def spy(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        found.append({**options, "dtype": tensors[0].dtype, "shape": tuple(tensors[0].shape)})
        return flash_attention(*tensors, **options)

    monkeypatch.setattr(attention_interface, "flash_attention", spy)
    yield found


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The fused path of LoRA runs on a CPU too; how many layers each call of it had."""
    return force_fused(monkeypatch)


@pytest.fixture(params=["reference", "fused"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths of LoRA, one after the other."""
    if request.param == "fused":
        force_fused(monkeypatch)
    return str(request.param)
