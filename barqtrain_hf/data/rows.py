"""One row of somebody's data set, checked and turned into arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from barqtrain_hf.errors import DataError

IGNORE_INDEX = -100
"""Label of a token without loss, in transformers and torch alike."""

_MASKS = ("completion_mask", "assistant_masks")
ROW_KEYS = ("input_ids", "labels", *_MASKS, "attention_mask", "seq_lengths", "position_ids")
"""All that is ever read of a row."""


class FileRow(dict[str, Any]):
    """A row that knows where in which file it is.

    Attributes:
        origin: that, for messages.
        columns: all keys of the row, where it has only those that were asked for.
    """

    __slots__ = ("_file", "_number", "_unit", "columns")

    def __init__(
        self,
        values: Any,
        file: str,
        unit: str,
        number: int,
        columns: Sequence[str] | None = None,
    ) -> None:
        super().__init__(values)
        self._file, self._unit, self._number, self.columns = file, unit, number, columns

    @property
    def origin(self) -> str:
        return f"{self._file}, {self._unit} {self._number}"


def where(row: Any, index: int, source: str = "dataset") -> str:
    """What messages call a row, which is item ``index`` of ``source``."""
    return row.origin if isinstance(row, FileRow) else f"{source}[{index}]"


_OF_TEXTS = (
    "Of texts PackedDataset(tokenize(texts, tokenizer, path), max_length) makes them, or "
    "PackedStream(texts, max_length, tokenizer=tokenizer)."
)


class Row(NamedTuple):
    """Tokens of any number of documents, back to back."""

    input_ids: npt.NDArray[np.integer]  # [T]
    labels: npt.NDArray[np.integer]  # [T]
    lengths: npt.NDArray[np.int64]  # [documents], zero or more each, sums to T


class Tokens(NamedTuple):
    """As `Row`, the way tokens are kept: half the size, and every value checked."""

    input_ids: npt.NDArray[np.int32]  # [T]
    labels: npt.NDArray[np.int32]  # [T]
    lengths: npt.NDArray[np.int64]  # [documents]


def read_row(row: Mapping[str, Any], source: str, index: int) -> Row:
    """Reads a document, or a row of several, from lists, tensors or arrays.

    Padding (``attention_mask`` 0) is cut off. Document boundaries come from ``seq_lengths``;
    failing that, from where ``position_ids`` do not go up by one, which is how transformers finds
    them; failing both, the row is one document. Without ``labels`` a token bears a loss where
    ``completion_mask`` and ``assistant_masks``, one of which is needed then, are 1, as in TRL.

    Args:
        row: has ``input_ids`` and ``labels`` or masks, and optionally ``attention_mask``,
            ``seq_lengths`` and ``position_ids``.
        source: what ``row`` is an item of, for messages.
        index: its place there, for messages.

    Raises:
        DataError: something is missing, is not a flat list of integers, or does not add up.
    """
    name = where(row, index, source)
    if not isinstance(row, Mapping):
        hint = f" {_OF_TEXTS}" if isinstance(row, str) else ""
        raise DataError(
            f"{name} is a {type(row).__name__}: pass dicts with input_ids and labels.{hint}"
        )
    input_ids = _integers(row, "input_ids", name)
    if row.get("labels") is None and any(row.get(key) is not None for key in _MASKS):
        labels = _masked(row, input_ids, name)
    else:
        labels = _integers(row, "labels", name)
        _same_length(input_ids, labels, "labels", name)
    positions = None
    if row.get("seq_lengths") is None and row.get("position_ids") is not None:
        positions = _integers(row, "position_ids", name)
        _same_length(input_ids, positions, "position_ids", name)

    if row.get("attention_mask") is not None:
        mask = _integers(row, "attention_mask", name)
        _same_length(input_ids, mask, "attention_mask", name)
        kept = _without_padding(mask, name)
        input_ids, labels = input_ids[kept], labels[kept]
        positions = positions if positions is None else positions[kept]

    total = len(input_ids)
    if row.get("seq_lengths") is not None:
        lengths = _integers(row, "seq_lengths", name).astype(np.int64)
        if (lengths < 0).any() or lengths.sum() != total:
            raise DataError(
                f"{name} has seq_lengths adding up to {lengths.sum()} for {total} "
                "tokens: list the length of each document in the row."
            )
    elif positions is not None:
        starts = np.flatnonzero(np.diff(positions) != 1) + 1
        lengths = np.diff(starts, prepend=0, append=total)
    else:
        lengths = np.array([total])
    return Row(input_ids, labels, lengths)


def join(rows: Sequence[Row]) -> Row:
    """All documents of ``rows``, as int64."""
    input_ids, labels, lengths = (
        # Named, because NumPy makes floats of int64 and uint64 together.
        np.concatenate(arrays, dtype=np.int64, casting="same_kind")
        for arrays in zip(*rows, strict=True)
    )
    return Row(input_ids, labels, lengths)


def stored(row: Row, source: str) -> Tokens:
    """``row`` in int32.

    Raises:
        DataError: an id is negative, a label is negative and not -100, or either exceeds int32.
    """
    return Tokens(
        _int32(row.input_ids, "input_ids", None, source),
        _int32(row.labels, "labels", IGNORE_INDEX, source),
        row.lengths,
    )


def _int32(
    values: npt.NDArray[np.integer], name: str, exempt: int | None, source: str
) -> npt.NDArray[np.int32]:
    # Two reductions in the usual case: every comparison would make an array as long as the data.
    if values.min(initial=0) < 0 or values.max(initial=0) > np.iinfo(np.int32).max:
        refused = (values < 0) | (values > np.iinfo(np.int32).max)
        if exempt is not None:
            refused &= values != exempt
        if refused.any():
            raise DataError(
                f"{source} has {values[refused][0]} among its {name}: ids are zero to 2**31 - 1, and "
                f"a label without loss is {IGNORE_INDEX}."
            )
    return values.astype(np.int32)


def _integers(row: Mapping[str, Any], key: str, name: str) -> npt.NDArray[np.integer]:
    values = row.get(key)
    if values is None:
        fix = (
            "add labels, equal to input_ids for a loss on every token, -100 where there is none."
            if key == "labels"
            else f"tokenize the text first. {_OF_TEXTS}"
        )
        raise DataError(f"{name} has no {key}: {fix}")
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise DataError(
            f"{name} has {key} of shape {array.shape} and dtype {array.dtype}: "
            "pass a flat list of integers."
        )
    # An empty list has no dtype of its own and would come out as float.
    return array if array.size else array.astype(np.int64)


def _same_length(
    input_ids: npt.NDArray[np.integer],
    other: npt.NDArray[np.integer],
    key: str,
    name: str,
) -> None:
    if len(other) != len(input_ids):
        raise DataError(
            f"{name} has {len(other)} {key} for {len(input_ids)} input_ids: pass one per token."
        )


def _masked(
    row: Mapping[str, Any], input_ids: npt.NDArray[np.integer], name: str
) -> npt.NDArray[np.integer]:
    """Labels where all masks of the row are 1."""
    labels = input_ids.astype(np.int64)
    for key in _MASKS:
        if row.get(key) is not None:
            mask = _integers(row, key, name)
            _same_length(input_ids, mask, key, name)
            labels[mask == 0] = IGNORE_INDEX
    return labels


def _without_padding(mask: npt.NDArray[np.integer], name: str) -> slice:
    kept = np.flatnonzero(mask)
    if not len(kept):
        return slice(0, 0)
    inner = slice(int(kept[0]), int(kept[-1]) + 1)
    # A hole, or a numbered mask, means something other than padding; cutting would change it.
    if not (mask[inner] == 1).all():
        raise DataError(
            f"{name} has an attention_mask that is not ones with padding at the ends: "
            "mark documents within a row by seq_lengths."
        )
    return inner
