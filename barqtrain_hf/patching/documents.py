"""Which documents a batch holds, for attention: found once per batch, the same tensor for every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from barqtrain_hf.patching import known_documents
from barqtrain_hf.patching.attention_mask import is_ours, numbers_of

T = TypeVar("T")
# What was found in a tensor (position_ids, a mask of ours, cu_seq_lens_q) and the version it had.
_found = WeakTensorKeyDictionary()


def source(
    attention_mask: torch.Tensor | None, batch: int, length: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, int] | None:
    """What tells the documents of a batch without cu_seq_lens, as arguments of `boundaries`."""
    positions = kwargs.get("position_ids")
    # Of several kinds of positions at once (Qwen-VL's) none counts tokens.
    if isinstance(positions, torch.Tensor) and positions.shape in ((1, length), (batch, length)):
        return positions, 1
    return (attention_mask, 0) if is_ours(attention_mask) else None


def boundaries(source: torch.Tensor, step: int, batch: int) -> torch.Tensor | None:
    """cu_seqlens of ``batch`` rows one behind another, or None where each row is one document.

    Args:
        source: [batch or 1, T] integers, or a mask of ours.
        step: by how much they grow from a token to the next of one document: 1 for positions, 0 for
            documents' numbers.
        batch: how many rows there are.
    """

    if step and known_documents.are_single(source):
        return None

    def find() -> torch.Tensor | None:
        rows = _rows(source)
        begins = torch.ones(rows.shape, dtype=torch.bool, device=rows.device)
        begins[:, 1:] = rows.diff(dim=1) != step
        starts = begins.expand(batch, -1).flatten().nonzero().flatten()  # synchronises
        if len(starts) == batch:
            return None
        end = starts.new_full((1,), batch * rows.shape[1])
        return torch.cat((starts, end)).to(torch.int32)

    return _once(source, (step, batch), find)


def numbers(source: torch.Tensor, step: int) -> torch.Tensor:
    """[rows, T]: the number of each token's document in its row; arguments of `boundaries`."""
    rows = _rows(source)
    return (rows.diff(dim=1, prepend=rows[:, :1] - step) != step).cumsum(1)


def numbers_between(cu_seqlens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """[batch, T]: the number of each token's document."""
    tokens = torch.arange(batch * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens, right=True).view(batch, length)


def given(cu_q: Any, cu_k: Any, device: torch.device) -> torch.Tensor | str:
    """cu_seqlens of a batch that brings them, or why they cannot be used."""
    if not isinstance(cu_q, torch.Tensor) or cu_q.dim() != 1 or cu_q.is_floating_point():
        return "cu_seq_lens_q is not a vector of integers"
    if cu_k is not None and (not isinstance(cu_k, torch.Tensor) or cu_k.shape != cu_q.shape):
        return "cu_seq_lens_k is not like cu_seq_lens_q"
    ready = cu_q.dtype is torch.int32 and cu_q.device == device
    if torch.compiler.is_compiling():
        return cu_q.to(device, torch.int32)

    if cu_k is not None and cu_k is not cu_q:
        # Each kept as long as both live: one may be a view of the other, and so keep it alive.
        others = _once(cu_q, "others", WeakTensorKeyDictionary)
        if not _once(cu_k, "equal", partial(_equal, cu_q, cu_k), others):
            return "queries and keys have other documents"
    return cu_q if ready else _once(cu_q, device, partial(cu_q.to, device, torch.int32))


def _equal(cu_q: torch.Tensor, cu_k: torch.Tensor) -> bool:
    return torch.equal(cu_q, cu_k.to(cu_q.device, cu_q.dtype))


def mask(
    numbers: torch.Tensor | None,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> torch.Tensor:
    """Which keys each query sees, [rows, 1, queries, keys]: for PyTorch's own attention only."""
    query = torch.arange(queries, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = key <= query if causal else (key >= 0).expand(queries, keys)
    if window is not None:
        seen = seen & (query - key < window)
    if numbers is None:
        return seen[None, None]
    return seen & (numbers[:, None, :, None] == numbers[:, None, None, :])


def _rows(source: torch.Tensor) -> torch.Tensor:
    return numbers_of(source) if source.dim() == 4 else source


def _once(
    source: torch.Tensor,
    key: Any,
    find: Callable[[], T],
    found: WeakTensorKeyDictionary = _found,
) -> T:
    """What ``find`` gives, kept as long as ``source`` lives and is not written to; it must not hold it."""
    if source.is_inference():  # nothing says whether it was written to
        return find()
    version, answers = found.get(source, (-1, {}))
    if version != source._version:
        answers = {}
        found[source] = (source._version, answers)
    if key not in answers:
        answers[key] = find()
    return answers[key]  # type: ignore[no-any-return]
