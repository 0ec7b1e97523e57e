"""Stock attention in place of ours: sdpa, or the model's own eager attention where sdpa lacks something.

It is given a mask of its own kind that keeps apart every document and honours every window that ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.patching import documents
from barqtrain_hf.patching.attention_mask import is_ours, window_of

# What sdpa leaves out and eager attention does not.
_ONLY_EAGER = ("softcap", "s_aux", "sinks", "output_attentions")
# Keys that a query chose, which models put into the mask if attention is called "sdpa" or "eager".
CHOSEN = ("indices", "block_indices")


def is_given(kwargs: dict[str, Any], name: str) -> bool:
    """Whether an attention function is called with something by this name."""
    value = kwargs.get(name)
    return value is not None and value is not False


def stock_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    use_eager: bool,
    eager: Callable[..., Any],
    causal: bool,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What an attention function gives; ``attention_mask`` may be ours."""
    for name in CHOSEN:
        if is_given(kwargs, name):
            raise UnsupportedError(
                f"{type(module).__name__} hands over {name}, the keys that a query chose, instead of a mask.",
                'Load the model with attn_implementation="sdpa".',
            )
    seen = _mask(query, key, attention_mask, causal, kwargs)
    needs_eager = any(is_given(kwargs, name) for name in _ONLY_EAGER)
    if not (use_eager or needs_eager):
        return sdpa_attention_forward(module, query, key, value, seen, **kwargs)  # type: ignore[no-any-return]
    queries, keys = query.shape[2], key.shape[2]
    if seen is None and causal and queries > 1:  # what sdpa would understand
        seen = documents.mask(None, queries, keys, causal, None, query.device)
    if seen is not None and seen.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        seen = torch.where(seen, zero, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, seen, **kwargs)  # type: ignore[no-any-return]


def _mask(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """The mask of sdpa that keeps apart what ours does."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if queries != keys:
        if is_ours(attention_mask):
            raise UnsupportedError(
                f"{queries} queries of {keys} tokens were cut out of a packed row or a window, and the mask "
                "does not tell which.",
                'Load the model with attn_implementation="sdpa".',
            )
        return attention_mask
    device = query.device
    numbers = _numbers(attention_mask, batch, queries, causal, device, kwargs)
    if attention_mask is not None and not is_ours(attention_mask):
        if numbers is None or attention_mask.dtype is not torch.bool:
            return attention_mask
        return attention_mask & documents.mask(numbers, queries, keys, False, None, device)
    window = window_of(attention_mask)
    if numbers is None and window is None:
        return None
    return documents.mask(numbers, queries, keys, causal, window, device)


def _numbers(
    attention_mask: torch.Tensor | None,
    batch: int,
    length: int,
    causal: bool,
    device: torch.device,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """The number of each token's document, None for rows of one each."""
    cu_q = kwargs.get("cu_seq_lens_q")
    if cu_q is not None:
        cu_seqlens = documents.given(cu_q, kwargs.get("cu_seq_lens_k"), device)
        if not isinstance(cu_seqlens, str):
            return documents.numbers_between(cu_seqlens, batch, length)
    if not causal or not (attention_mask is None or is_ours(attention_mask)):
        return None
    source = documents.source(attention_mask, batch, length, kwargs)
    if source is None:
        return None
    if not torch.compiler.is_compiling() and documents.boundaries(*source, batch) is None:
        return None
    return documents.numbers(*source)
