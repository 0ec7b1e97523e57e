"""Packed rows for models that attend with ``barq``, and dense masks for stock models beside them."""

from __future__ import annotations

from typing import Any

import torch
from models import tiny_model
from side_by_side import batch

from barqtrain_hf.patching import register_attention

ONLY_ATTENTION = {"rms_norm": False, "layer_norm": False, "glu": False}
LENGTHS = (13, 20, 1, 6)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
CU_SEQLENS = torch.tensor((0, *torch.tensor(LENGTHS).cumsum(0)), dtype=torch.int32)
PACKED = {
    "position_ids": POSITIONS,
    "cu_seq_lens_q": CU_SEQLENS,
    "cu_seq_lens_k": CU_SEQLENS,
    "max_length_q": max(LENGTHS),
    "max_length_k": max(LENGTHS),
    "use_cache": False,
}
# Window 5 everywhere it can be: documents are longer.
WINDOWS = {"gemma2", "gemma3", "cohere2", "mistral_window"}


def model_of(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    if family in WINDOWS:
        overrides.setdefault("sliding_window", 5)
    return tiny_model(family, dtype, **overrides)


def asked_for(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model that was loaded with attn_implementation="barq"."""
    model = model_of(family, dtype, **overrides)
    register_attention()
    model.set_attn_implementation("barq")
    return model


def packed_batch() -> dict[str, Any]:
    inputs = batch(1, sum(LENGTHS))
    labels = inputs["labels"].clone()
    labels[:, CU_SEQLENS[:-1].long()] = -100
    return {**inputs, "labels": labels}


def stock_packed(model: Any) -> dict[str, Any]:
    """Masks that keep documents apart, for eager attention; dense [T, T] as stock would never need here."""
    places = torch.arange(sum(LENGTHS))
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (documents[:, None] == documents) & (places[:, None] >= places)
    window = getattr(model.config, "sliding_window", None)
    near = seen if window is None else seen & (places[:, None] - places < window)
    full, sliding = (
        torch.zeros(m.shape, dtype=model.dtype).masked_fill(~m, torch.finfo(model.dtype).min)[
            None, None
        ]
        for m in (seen, near)
    )
    types = getattr(model.config, "layer_types", None)
    mask: Any = sliding if types is None else full
    if types is not None and "sliding_attention" in types:
        mask = {"full_attention": full, "sliding_attention": sliding}
    return {"position_ids": POSITIONS, "attention_mask": mask, "use_cache": False}


def eager(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model = model_of(family, dtype)
    model.set_attn_implementation("eager")
    return model
