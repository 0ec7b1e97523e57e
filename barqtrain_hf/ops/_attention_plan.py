"""Which tile of which document a block of the attention kernels works on, longest work first.

Made on the host from the documents' lengths, once per batch: all layers and both passes share it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from barqtrain_hf.ops._documents import find

_Numbers = npt.NDArray[np.int64]


class Tiles(NamedTuple):
    """Tiles of the rows of documents.

    Attributes:
        table: [total, 4] int32, the struct Tile of attention.cuh: the document's first token, its length,
            the tile's first row, the document's number.
        total: how many.
        documents: how many documents there are.
    """

    table: torch.Tensor
    total: int
    documents: int


class View(NamedTuple):
    """Which keys a query sees; ``window`` counts the query itself."""

    causal: bool
    window: int | None


def packed_tiles(
    cu_seqlens: torch.Tensor,
    tokens: int,
    rows: int,
    keys: bool,
    view: View,
    max_seqlen: int | None = None,
) -> Tiles:
    """Tiles of ``rows`` queries, or of keys, of packed documents; kept as long as ``cu_seqlens`` lives."""
    _, boundaries, _, plans = find(cu_seqlens, tokens, max_seqlen)
    key = (rows, keys, view)
    tiles: Tiles | None = plans.get(key)
    if tiles is None:
        starts = np.asarray(boundaries, dtype=np.int64)
        tiles = plans[key] = _tiles(starts, rows, keys, view, cu_seqlens.device)
    return tiles


@functools.lru_cache(maxsize=256)
def dense_tiles(batch: int, length: int, rows: int, keys: bool, view: View, device: int) -> Tiles:
    """The same for ``batch`` rows of ``length`` tokens, each a document."""
    boundaries = np.arange(batch + 1, dtype=np.int64) * length
    return _tiles(boundaries, rows, keys, view, torch.device("cuda", device))


def _tiles(boundaries: _Numbers, rows: int, keys: bool, view: View, device: torch.device) -> Tiles:
    starts, lengths = boundaries[:-1], np.diff(boundaries)
    counts = -(-lengths // rows)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = lengths[document]
    first = number * rows
    last = np.minimum(first + rows, length) - 1
    window = np.minimum(view.window or length, length)
    before = np.maximum(first - window + 1, 0)
    after = np.minimum(last + window, length)
    if keys:
        work = after - (first if view.causal else before)
        # The backward kernel adds up dQ over a document's tiles of keys in this order, which has to be
        # theirs: a tile counts as much as any after it.
        work = _most_from_here(work, document)
    else:
        work = (last + 1 if view.causal else after) - before
    order = np.lexsort((document, number, -work))
    table = np.stack((starts[document], length, first, document), axis=1)[order]
    table = np.ascontiguousarray(table, dtype=np.int32)
    on_host = torch.from_numpy(table)
    if device.type == "cuda":  # from pinned memory, so that nobody waits
        on_host = on_host.pin_memory()
    return Tiles(on_host.to(device, non_blocking=True), len(order), len(lengths))


def _most_from_here(work: _Numbers, document: _Numbers) -> _Numbers:
    """The largest ``work`` among a tile and the later ones of its document."""
    # Documents one after another, so that one running maximum from the end serves: work is below 2**31.
    offset = document.astype(np.int64) << 32
    lifted = np.maximum.accumulate((work - offset)[::-1])[::-1]
    return lifted + offset
