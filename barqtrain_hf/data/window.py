"""The documents of a stream that are packed together, and the rows they make."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from barqtrain_hf import _rust
from barqtrain_hf.data.batch import PackedBatch, packed_batch
from barqtrain_hf.data.fit import Counts, fit_documents
from barqtrain_hf.data.ranks import row_costs
from barqtrain_hf.data.rows import Tokens
from barqtrain_hf.data.source import Source
from barqtrain_hf.data.summary import Packed
from barqtrain_hf.errors import DataError


class Reader(Protocol):
    """Makes tokens of rows."""

    @property
    def columns(self) -> Sequence[str]:
        """The keys of a row that are read."""

    @property
    def overflow(self) -> str:
        """What happens to long documents if nothing else was asked for."""

    def example(self, row: Any, index: int) -> tuple[Any, int]:
        """What is to be read of a row, and its size, to know when there are many."""

    def read(self, examples: list[Any], first: int) -> Tokens:
        """Tokens of examples, the first of which is of row ``first``."""


_ROWS_PER_READ = 64
# Enough to tokenise at once that no thread waits long, few enough to hold.
_SIZE_PER_READ = 4 << 20
# Documents in the first window; each is twice as large as the one before, until it has them all.
# The first batch comes after a fraction of a second, and later windows pack well.
_FIRST_DOCUMENTS = 256
_DOCUMENTS = 4096
# However long documents are, a window ends with the read that brings it so many tokens.
_TOKENS = 1 << 24


@dataclass(frozen=True)
class Packing:
    """What the rows of a stream depend on, besides its documents."""

    max_length: int
    overflow: str | None
    seed: int
    epoch: int


@dataclass(frozen=True)
class Window:
    """Documents, and where the stream goes on after them. Everything else follows from these."""

    number: int
    input_ids: npt.NDArray[np.int32]  # [T]
    labels: npt.NDArray[np.int32]  # [T]
    lengths: npt.NDArray[np.int64]  # [pieces of documents], end to end
    waited: npt.NDArray[np.uint8]  # [pieces], windows each has waited for company
    begins: npt.NDArray[np.uint8]  # [pieces], 0 where one goes on with the document before
    losses: Counts  # of the stream so far, as fit_documents counts them
    before: Packed  # in the windows before
    place: dict[str, Any]
    last: bool
    packing: Packing

    @functools.cached_property
    def plan(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """(documents row after row, offset of each row, documents that wait for the next window)."""
        name = (self.packing.seed, self.packing.epoch, self.number)
        order, offsets, carried = _rust.plan_window(
            self.lengths, self.waited, self.packing.max_length, name, self.last
        )
        return order, offsets.view(np.int64), carried

    @functools.cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.lengths) - self.lengths

    @property
    def num_rows(self) -> int:
        return len(self.plan[1]) - 1

    def packed(self, rows: int) -> Packed:
        """What is in the windows before and in the first ``rows`` rows of this one."""
        order, offsets, _ = self.plan
        pieces = order[: offsets[rows]]
        documents, tokens = self.begins[pieces].sum(), self.lengths[pieces].sum()
        before = self.before
        return Packed(
            before.documents + int(documents), before.rows + rows, before.tokens + int(tokens)
        )

    @functools.cached_property
    def costs(self) -> list[int]:
        """What each row costs to train on."""
        order, offsets, _ = self.plan
        costs: list[int] = row_costs(self.lengths, order, offsets).tolist()
        return costs

    def assemble(self, rows: list[int]) -> Any:
        """As `_rust.assemble`."""
        order, offsets, _ = self.plan
        arrays = (self.input_ids, self.labels, self.starts, self.lengths, order, offsets)
        return _rust.assemble(*arrays, rows, None)

    def state(self) -> dict[str, Any]:
        """All of it but the packing, as ints and tensors."""
        return {
            "number": self.number,
            "input_ids": torch.from_numpy(self.input_ids.copy()),
            "labels": torch.from_numpy(self.labels.copy()),
            "lengths": torch.from_numpy(self.lengths.copy()),
            "waited": torch.from_numpy(self.waited.copy()),
            "begins": torch.from_numpy(self.begins.copy()),
            "losses": list(self.losses),
            "before": list(self.before),
            "place": self.place,
            "last": self.last,
        }

    @classmethod
    def from_state(cls, state: Any, packing: Packing) -> Window:
        """The window that `state` was called of.

        Raises:
            DataError: it is no state of a window, or not a whole one.
        """
        try:
            arrays = {
                # Checkpoints are often loaded with map_location set to a GPU.
                key: np.ascontiguousarray(state[key].cpu().numpy(), dtype=dtype)
                for key, dtype in _ARRAYS.items()
            }
            place = {
                "rows": operator.index(state["place"]["rows"]),
                "state": state["place"]["state"],
            }
            window = cls(
                number=operator.index(state["number"]),
                losses=_five(map(operator.index, state["losses"])),
                before=Packed(*map(operator.index, state["before"])),
                place=place,
                last=bool(state["last"]),
                packing=packing,
                **arrays,
            )
        except (KeyError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
            raise DataError(
                f"The window in state is not what state_dict() returned ({type(error).__name__}: {error}): "
                "pass a state as it was saved."
            ) from None
        pieces, tokens = len(window.lengths), len(window.input_ids)
        if (
            {array.ndim for array in arrays.values()} != {1}
            or len(window.waited) != pieces
            or len(window.begins) != pieces
            or len(window.labels) != tokens
            or window.lengths.sum() != tokens
            or not ((window.lengths >= 1) & (window.lengths <= packing.max_length)).all()
        ):
            raise DataError(
                f"The window in state has {pieces} documents and {tokens} tokens that do not go together: "
                "the state is damaged; pass an older one."
            )
        return window


class Place(NamedTuple):
    """The next row to hand out; without a window, the first of the epoch."""

    epoch: int
    window: Window | None = None
    row: int = 0


class WindowRow(NamedTuple):
    """Row ``number`` of a window."""

    window: Window
    number: int


def join_rows(rows: list[WindowRow]) -> PackedBatch:
    """The rows of a batch, which may be of two windows, end to end."""
    parts = [
        window.assemble([row.number for row in rows if row.window is window])
        for window in {row.window.number: row.window for row in rows}.values()
    ]
    if len(parts) == 1:
        return packed_batch(*parts[0])
    input_ids, labels, positions, boundaries, longest = zip(*parts, strict=True)
    ends = np.cumsum([len(ids) for ids in input_ids])
    joined = [boundaries[0]] + [
        part[1:] + np.int32(begin) for part, begin in zip(boundaries[1:], ends, strict=False)
    ]
    return packed_batch(
        np.concatenate(input_ids),
        np.concatenate(labels),
        np.concatenate(positions),
        np.concatenate(joined),
        max(longest),
    )


def next_window(before: Window | None, source: Source, reader: Reader, packing: Packing) -> Window:
    """Reads the window after ``before``; the source stands where that one ended.

    Raises:
        DataError: a row is malformed, or too long and ``overflow`` is ``"error"``.
    """
    number = 0 if before is None else before.number + 1
    packed = Packed(0, 0, 0) if before is None else before.packed(before.num_rows)
    parts, losses = _carried(before)
    wanted, tokens, last = min(_DOCUMENTS, _FIRST_DOCUMENTS << min(number, 16)), 0, False
    while wanted and tokens < _TOKENS and not last:
        first, examples = source.place["rows"], _read_examples(source, reader, wanted)
        wanted -= len(examples)
        last = not examples
        if examples:
            found = reader.read(examples, first)
            tokens += len(found.input_ids)
            overflow = packing.overflow or reader.overflow
            part, counts = _fit(found, packing.max_length, overflow, first)
            parts.append(part)
            losses = _five(map(sum, zip(losses, counts, strict=True)))
    arrays = _Part(*map(np.concatenate, zip(*parts, strict=True)))
    place = source.place
    return Window(number, *arrays, losses, packed, place, last, packing)


def _read_examples(source: Source, reader: Reader, most: int) -> list[Any]:
    examples: list[Any] = []
    size = 0
    while len(examples) < most and size < _SIZE_PER_READ:
        first = source.place["rows"]
        rows = source.read(min(_ROWS_PER_READ, most - len(examples)))
        if not rows:
            break
        for index, row in enumerate(rows, first):
            example, more = reader.example(row, index)
            examples.append(example)
            size += more
    return examples


_ARRAYS = {
    "input_ids": np.int32,
    "labels": np.int32,
    "lengths": np.int64,
    "waited": np.uint8,
    "begins": np.uint8,
}


class _Part(NamedTuple):
    """Those arrays of some documents."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    waited: npt.NDArray[np.uint8]
    begins: npt.NDArray[np.uint8]


def _carried(before: Window | None) -> tuple[list[_Part], Counts]:
    """What waits from the window before, and the losses until then."""
    if before is None:
        return [_Part(*(np.empty(0, dtype) for dtype in _ARRAYS.values()))], (0,) * 5
    carried = before.plan[2]
    lengths = before.lengths[carried]
    at = _indices(before.starts[carried], lengths)
    waited = before.waited[carried] + np.uint8(1)
    ids, labels, begins = before.input_ids[at], before.labels[at], before.begins[carried]
    return [_Part(ids, labels, lengths, waited, begins)], before.losses


def _fit(found: Tokens, max_length: int, overflow: str, first: int) -> tuple[_Part, Counts]:
    try:
        starts, lengths, losses = fit_documents(*found, max_length, overflow)
    except ValueError as error:
        raise DataError(
            f"Of the {len(found.lengths)} documents from row {first} on: {error}"
        ) from None
    at = _indices(starts, lengths)
    waited = np.zeros(len(lengths), np.uint8)
    # Of a document whose first piece bears no loss, another is the first.
    document = np.searchsorted(np.cumsum(found.lengths), starts, side="right")
    begins = (np.diff(document, prepend=-1) > 0).astype(np.uint8)
    return _Part(found.input_ids[at], found.labels[at], lengths, waited, begins), losses


def _five(numbers: Iterable[int]) -> Counts:
    kept, split, truncated, dropped, tokens = numbers
    return kept, split, truncated, dropped, tokens


def _indices(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Where the tokens are of pieces that begin at ``starts``."""
    begins = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - begins, lengths)
