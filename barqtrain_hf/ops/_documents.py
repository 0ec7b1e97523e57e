"""Boundaries of packed documents on the host, where each batch's are read and checked once.

All layers of a model get the same ``cu_seqlens`` tensor: what it holds is kept for as long as it lives and
is not changed in place, so that a batch costs one device sync and a layer none.
"""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from barqtrain_hf.errors import ArgumentError, UnsupportedError


class _Documents(NamedTuple):
    version: int
    boundaries: list[int]
    longest: int
    plans: dict[Any, Any]  # what ops make of the boundaries, under their own keys


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# The tensor asked for last and what is known of it: the layers of a model ask for one after another, and a
# lookup in the dictionary costs each of them some microseconds.
_last: tuple[weakref.ref[torch.Tensor] | None, _Documents | None] = (None, None)


def documents(cu_seqlens: torch.Tensor, tokens: int) -> list[int]:
    """Where each document starts, and ``tokens``; not to be changed.

    Args:
        cu_seqlens: [documents + 1] int32.
        tokens: of all documents together.

    Raises:
        ArgumentError: it does not start at 0, not increase, or not end at ``tokens``; says where.
        UnsupportedError: a CUDA graph is being captured, which would keep this batch's documents.
    """
    return _find(cu_seqlens, tokens).boundaries


def plans(cu_seqlens: torch.Tensor, tokens: int) -> dict[Any, Any]:
    """A dict that lives as long as what is known of these documents."""
    return _find(cu_seqlens, tokens).plans


def longest(cu_seqlens: torch.Tensor, tokens: int, most: int | None = None) -> int:
    """Tokens of the longest document, 0 where there is none; ``most`` is what the caller took it for.

    Raises:
        ArgumentError: it is longer; else as `documents`.
    """
    found = _find(cu_seqlens, tokens).longest
    if most is not None and found > most:
        raise ArgumentError(
            f"flash_attention: max_seqlen={most}, but cu_seqlens has a document of {found} tokens; leave "
            "max_seqlen out."
        )
    return found


def _find(cu_seqlens: torch.Tensor, tokens: int) -> _Documents:
    if cu_seqlens.is_cuda and torch._C._cuda_isCurrentStreamCapturing():
        raise UnsupportedError(
            "flash_attention: documents are scheduled on the host, so a CUDA graph would keep those of the "
            "batch it is captured with;",
            "capture without cu_seqlens, or leave attention out of the graph.",
        )
    global _last
    # Tensors of inference mode do not say when they change, so they are read each time.
    version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
    reference, found = _last
    if reference is None or reference() is not cu_seqlens:
        found = _read.get(cu_seqlens)
    if found is None or found.version != version or version < 0:
        found = _checked(_to_host(cu_seqlens), version)
        _read[cu_seqlens] = found
    if found is not _last[1]:
        _last = weakref.ref(cu_seqlens), found
    end = found.boundaries[-1]
    if end != tokens:
        raise ArgumentError(
            f"flash_attention: cu_seqlens ends at {end} and q has {tokens} tokens; give every token a "
            "document, padding too."
        )
    return found


def _to_host(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.tolist()  # type: ignore[no-any-return]


def _checked(boundaries: list[int], version: int) -> _Documents:
    if boundaries[0] != 0:
        raise ArgumentError(
            f"flash_attention: cu_seqlens starts at {boundaries[0]}; it must start at 0 and hold each "
            "document's first token and, last, the number of all tokens."
        )
    lengths = [end - start for start, end in pairwise(boundaries)]
    wrong = next((i for i, length in enumerate(lengths, 1) if length <= 0), None)
    if wrong is not None:
        raise ArgumentError(
            f"flash_attention: cu_seqlens[{wrong}] = {boundaries[wrong]} is not more than cu_seqlens"
            f"[{wrong - 1}] = {boundaries[wrong - 1]}; it must increase: leave empty documents out."
        )
    return _Documents(version, boundaries, max(lengths, default=0), {})
