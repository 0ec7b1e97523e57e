"""What was packed, as one line for the log."""

from __future__ import annotations

from typing import NamedTuple

from barqtrain_hf.data.fit import Counts


class Packed(NamedTuple):
    """How much was packed; a document that was split counts once."""

    documents: int
    rows: int
    tokens: int


def summary_of(packed: Packed, max_length: int, counts: Counts) -> str:
    """One line: what was packed, how full the rows are, and what was lost.

    Args:
        packed: documents, rows and tokens; at least one row.
        max_length: tokens a row can hold.
        counts: what was lost on the way there, as `fit_documents` counts it.
    """
    fill = packed.tokens / (packed.rows * max_length)
    line = (
        f"Packed {packed.documents:,} documents ({packed.tokens:,} tokens) into {packed.rows:,} rows of "
        f"{max_length:,}, {fill:.2%} full"
    )
    return "; ".join([line, *losses_of(counts)]) + "."


def losses_of(counts: Counts) -> list[str]:
    """A few words for each kind of loss that there was."""
    _, split, truncated, dropped, dropped_tokens = counts
    losses = [
        f"{split:,} documents split" if split else "",
        f"{truncated:,} tokens truncated" if truncated else "",
        f"{dropped:,} documents ({dropped_tokens:,} tokens) dropped"
        if dropped or dropped_tokens
        else "",
    ]
    return list(filter(None, losses))
