"""Documents made to fit into a row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barqtrain_hf import _rust
from barqtrain_hf.data.rows import IGNORE_INDEX

Counts = tuple[int, int, int, int, int]
"""Documents kept, documents split, tokens truncated, documents dropped, tokens dropped."""


def fit_documents(
    input_ids: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32] | None,
    lengths: npt.NDArray[np.int64],
    max_length: int,
    overflow: str,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Counts]:
    """Starts and lengths of the pieces of at most ``max_length`` tokens that documents become.

    Pieces of a document that was cut are left out if they bear no loss: a batch of nothing else, which
    a long prompt would make, has the loss 0 / 0, and its gradient ends the training. Such documents
    count as dropped if nothing is left of them, and their tokens count as dropped.

    Args:
        input_ids: of all documents, end to end.
        labels: one per id; with None the top bit of an id says that it bears no loss.
        lengths: tokens of each document.
        max_length: tokens a piece can hold.
        overflow: as in `PackedDataset`.

    Raises:
        ValueError: a document is longer than ``max_length`` and ``overflow`` is ``"error"``.
    """
    starts, sizes, counts = _rust.fit(lengths, max_length, overflow)
    kept, split, truncated, dropped, dropped_tokens = counts
    if not split and not truncated:
        return starts, sizes, counts
    document = np.searchsorted(np.cumsum(lengths) - lengths, starts, side="right") - 1
    cut = np.flatnonzero(lengths[document] > max_length)
    useless = cut[~_bear_loss(input_ids, labels, starts[cut], sizes[cut])]
    good = np.ones(len(starts), bool)
    good[useless] = False
    gone = len(np.setdiff1d(document[useless], document[good]))
    counts = (
        kept - gone,
        split - (gone if split else 0),
        truncated,
        dropped + gone,
        dropped_tokens + int(sizes[useless].sum()),
    )
    return starts[good], sizes[good], counts


def _bear_loss(
    input_ids: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32] | None,
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Whether a token after the first of each piece bears a loss."""

    def bears(at: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (
            input_ids[at] >= 0 if labels is None else labels[at] != IGNORE_INDEX
        )
        return found

    # The last token tells of nearly all pieces, and the others are few enough to look at one by one.
    result = (sizes > 1) & bears(starts + sizes - 1)
    for piece in np.flatnonzero(~result):
        result[piece] = bears(slice(starts[piece] + 1, starts[piece] + sizes[piece])).any()
    return result
