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


class Documents(NamedTuple):
    """What is known of packed documents.

    Attributes:
        version: of the tensor when it was read.
        boundaries: where each document starts, and the number of all tokens; not to be changed.
        longest: tokens of the longest document, 0 where there is none.
        plans: what ops make of the boundaries, under their own keys.
    """

    version: int
    boundaries: list[int]
    longest: int
    plans: dict[Any, Any]


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# The tensor asked for last and what is known of it: the layers of a model ask for one after another, and a
# lookup in the dictionary costs each of them some microseconds.
_last: tuple[weakref.ref[torch.Tensor] | None, Documents | None] = (None, None)


def find(cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int | None = None) -> Documents:
    """The documents, kept as long as ``cu_seqlens`` lives and is not changed.

    Args:
        cu_seqlens: [documents + 1] int32.
        tokens: of all documents together.
        max_seqlen: what the caller takes the longest document's length for, or more.

    Raises:
        ArgumentError: it does not start at 0, not increase, or not end at ``tokens``, or a document is longer
            than ``max_seqlen``; says where.
        UnsupportedError: a CUDA graph is being captured, which would keep this batch's documents.
    """
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
    if max_seqlen is not None and found.longest > max_seqlen:
        raise ArgumentError(
            f"flash_attention: max_seqlen={max_seqlen}, but cu_seqlens has a document of {found.longest} "
            "tokens; leave max_seqlen out."
        )
    return found


def know_documents(cu_seqlens: torch.Tensor, boundaries: list[int]) -> None:
    """Saves `find` from asking the device.

    Args:
        cu_seqlens: [documents + 1] int32.
        boundaries: its values.

    Raises:
        ArgumentError: they do not start at 0, or not increase.
    """
    if not cu_seqlens.is_inference():
        _read[cu_seqlens] = _checked(boundaries, cu_seqlens._version)


def _to_host(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.tolist()  # type: ignore[no-any-return]


def _checked(boundaries: list[int], version: int) -> Documents:
    if not boundaries:
        raise ArgumentError(
            "flash_attention: cu_seqlens of shape (0,) must be [documents + 1], the first of them 0."
        )
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
    return Documents(version, boundaries, max(lengths, default=0), {})
