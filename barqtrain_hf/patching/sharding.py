"""Weights that are in parts: DTensors under FSDP2, empty tensors under ZeRO-3 until they are gathered."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def gathered(weights: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """Whole weights while the context lasts, for a probe; collective under ZeRO-3, else nothing."""
    partitioned = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(partitioned)  # type: ignore[no-any-return]


def sharded(weight: Any) -> str | None:
    """Why a head cannot be probed with a weight that FSDP2 or tensor parallelism has split, or None."""
    if isinstance(weight, DTensor):
        return "the model is sharded already (FSDP2 or tensor parallelism); patch it before that"
    return None


def missing(weight: Any) -> str | None:
    """Why a weight cannot be probed with, or None."""
    if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.numel() == 0:
        return "its weight is not on this device yet, so it cannot be probed"
    return None
