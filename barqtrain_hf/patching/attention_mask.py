"""The mask of ``"barq"``: it tells what `flash_attention` needs and is never [T, T].

None for causal attention; for packed rows the number of each token's document, int32, expanded to the shape
of a mask, [B, 1, T, T], which takes no memory; under a sliding window the same, or zeros, as
[B, 1, T, window]. Nobody else makes masks of int32: PyTorch refuses them. Every other mask is made as for
sdpa, and stock attention then takes the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """A mask as described above; arguments of transformers' ``sdpa_mask``."""
    pattern = None if use_vmap else _pattern(mask_function)
    first = type(q_offset) is int and q_offset == 0 and kv_offset == 0
    if (
        pattern is None
        # Whoever wants a plain causal mask made is about to work on it.
        or (pattern[0] is None and not allow_is_causal_skip)
        or not first
        or q_length != kv_length
        or q_length == 1
        or _pads(attention_mask, kv_length)
    ):
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    numbers, window = pattern
    if window is None or q_length < window:
        window = q_length
        if numbers is None:
            return None
    if numbers is None:
        numbers = torch.zeros((batch_size, q_length), device=device)
    return numbers.to(torch.int32)[:, None, :, None].expand(-1, -1, -1, window)


def is_ours(attention_mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether a mask tells documents, and perhaps a window, as above; attention is causal then."""
    return (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.dtype is torch.int32
        and attention_mask.dim() == 4
    )


def window_of(attention_mask: torch.Tensor | None) -> int | None:
    """The window in a mask of ours. The argument of that name is not looked at, as sdpa does not."""
    if attention_mask is None or attention_mask.shape[3] == attention_mask.shape[2]:
        return None
    return attention_mask.shape[3]


def numbers_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """The number of each token's document, [B, T], in a mask of ours."""
    return attention_mask[:, 0, :, 0]


def _pads(attention_mask: torch.Tensor | None, length: int) -> bool:
    if attention_mask is None:
        return False
    if torch.compiler.is_compiling() or attention_mask.shape[-1] != length:
        return True
    return not bool(attention_mask.all())


def _pattern(function: Callable[..., Any]) -> tuple[torch.Tensor | None, int | None] | None:
    """Documents' numbers and window of a causal mask function of transformers; None if it is another.

    It is told from how masking_utils composes it: what a later release composes otherwise is another.
    """
    if function is causal_mask_function:
        return None, None
    made_by, inside = _closure(function)
    if made_by != "and_masks" or len(inside["mask_functions"]) != 2:
        return None
    first, second = inside["mask_functions"]
    made_by, inside = _closure(first)
    if made_by == "sliding_window_overlay" and second is causal_mask_function:
        return None, inside["sliding_window"]
    if made_by != "packed_sequence_mask_function":
        first, second = second, first  # before transformers 5.23
        made_by, inside = _closure(first)
    if made_by == "packed_sequence_mask_function":
        numbers = inside["packed_sequence_mask"]
        made_by, inside = _closure(second)
        if made_by == "remap_positions_for_packed_sequence":
            second = inside["mask_function"]
        pattern = _pattern(second)
        if pattern is not None and pattern[0] is None:
            return numbers, pattern[1]
    return None


def _closure(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Which function of masking_utils made one, and what it closes over."""
    closure = getattr(function, "__closure__", None)
    if closure is None or function.__module__ != causal_mask_function.__module__:
        return "", {}
    names = function.__code__.co_freevars
    inside = {name: cell.cell_contents for name, cell in zip(names, closure, strict=True)}
    return function.__qualname__.partition(".")[0], inside
