"""Packed batches from a stream of documents, in bounded memory, resumable at any batch."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from barqtrain_hf import _rust
from barqtrain_hf.data.batch import packed_batch
from barqtrain_hf.data.dataset import Overflow
from barqtrain_hf.data.examples import Example, Schema, encode_examples
from barqtrain_hf.data.packing import positive_int
from barqtrain_hf.data.prefetch import Prefetcher
from barqtrain_hf.data.rows import IGNORE_INDEX, Row, Tokens, join, read_row, stored
from barqtrain_hf.data.source import Source
from barqtrain_hf.data.tokenizer import FastTokenizer
from barqtrain_hf.data.window import Packing, Reader, Window, next_window
from barqtrain_hf.errors import ArgumentError, DataError, UnsupportedError

logger = logging.getLogger(__name__)

_VERSION = 1
# Tokens at which attention costs as much as what is linear in them: six times a hidden size of 4096.
_LINEAR_COST = 24_576


class PackedStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Batches of packed rows from documents that are read, tokenised and packed while training goes on.

    Documents are packed window by window, up to 4096 at a time; the emptiest rows of a window are
    packed again with the next. At most three windows are held. A thread of this process works ahead;
    it needs the GIL only to read rows.

    The rows and their order are a function of the documents, ``max_length``, ``seed`` and the epoch.
    A step is ``batch_size`` rows for each of ``world_size`` ranks, dealt so that they take equally
    long (attention is quadratic in the length of a document). All ranks read all documents.

    Use it without a collator: ``for batch in stream``, or ``DataLoader(stream, batch_size=None)``.

    Args:
        dataset: documents, in the order they are to be read: a list, a map-style or an iterable data
            set. With a ``tokenizer`` rows are as in `tokenize`, else as in `PackedDataset`.
        max_length: tokens a row can hold.
        tokenizer: a fast tokenizer, or a `FastTokenizer` for other than its default settings.
        text_column: where rows are dicts, the key of the text.
        batch_size: rows of each batch.
        overflow: as in `PackedDataset`. By default long texts are split, and chats and ready tokens
            refused.
        seed: chooses which documents share a row, and the order of rows in a window.
        rank: which of the ranks this is.
        world_size: how many there are.

    Raises:
        ArgumentError: an impossible value.
        ArgumentTypeError: ``dataset`` cannot be iterated over, or a number is none.
        UnsupportedError: ``tokenizer`` has no fast version.
    """

    def __init__(
        self,
        dataset: Any,
        max_length: int,
        *,
        tokenizer: Any = None,
        text_column: str = "text",
        batch_size: int = 1,
        overflow: Overflow | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.max_length = positive_int("max_length", max_length)
        self.batch_size = positive_int("batch_size", batch_size)
        self.world_size = positive_int("world_size", world_size)
        if not 0 <= rank < world_size:
            raise ArgumentError(f"rank is {rank}: pass 0 to world_size - 1 = {world_size - 1}.")
        if overflow is not None and overflow not in get_args(Overflow):
            raise ArgumentError(
                f"overflow is {overflow!r}: choose one of {', '.join(get_args(Overflow))}."
            )
        if seed < 0:
            raise ArgumentError(f"seed is {seed}: pass zero or a positive integer.")
        self.rank = rank
        self._overflow, self._seed, self._epoch = overflow, seed, 0
        self._source = Source(dataset)
        if tokenizer is None:
            self._reader: Reader = _TokenReader()
            identity = "input_ids"
        else:
            fast = tokenizer if isinstance(tokenizer, FastTokenizer) else FastTokenizer(tokenizer)
            self._reader = _TextReader(fast, text_column)
            identity = fast.identity
        self._made_from = {
            "version": _VERSION,
            "max_length": self.max_length,
            "overflow": overflow,
            "seed": seed,
            "tokens": hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        }
        self._next = self._start = _Place(None, 0)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins this epoch; without a call it is the one after the last.

        Raises:
            ArgumentError: ``epoch`` is negative.
        """
        if epoch < 0:
            raise ArgumentError(f"epoch is {epoch}: pass zero or a positive integer.")
        if epoch != self._epoch:
            self._epoch = epoch
            self._next = self._start = _Place(None, 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches as `BarqDataCollator` makes them: after `load_state_dict` from that place on, else from
        the beginning of the epoch.

        Raises:
            UnsupportedError: in a worker of a DataLoader.
            DataError: there are no documents, or one is malformed.
        """
        if torch.utils.data.get_worker_info() is not None:
            raise UnsupportedError(
                "PackedStream runs threads of its own, and every worker would read every document.",
                "Pass num_workers=0 (dataloader_num_workers=0).",
            )
        self._next, self._start = self._start, _Place(None, 0)
        return self._iterate(self._next)

    def _iterate(self, place: _Place) -> Iterator[dict[str, Any]]:
        epoch = self._epoch
        packing = Packing(self.max_length, self._overflow, self._seed, epoch)
        source = copy.copy(self._source)  # the thread of an iteration that was given up has its own
        source.seek(None if place.window is None else place.window.place)
        step = self.batch_size * self.world_size
        rows: list[_Row] = []
        window = place.window
        with Prefetcher(self._windows(source, window, packing)) as windows:
            for window in windows:
                start = place.row if window is place.window else 0
                for number in range(start, window.num_rows):
                    rows.append(_Row(window, number))
                    if len(rows) == step:
                        self._next = _Place(window, number + 1)
                        yield self._batch(rows)
                        rows = []
        if window is None or not window.losses[0]:
            raise DataError(
                "dataset has no documents with tokens, or is an iterator that was read before: pass an "
                "object whose __iter__ starts again."
            )
        self._epoch, self._next = epoch + 1, _Place(None, 0)
        self._log(window)
        if rows and self.world_size > len(rows):
            logger.warning(
                "The last %d rows are fewer than the %d ranks and are left out.",
                len(rows),
                self.world_size,
            )
        elif rows:
            yield _join(rows[self.rank :: self.world_size])

    def _windows(self, source: Source, window: Window | None, packing: Packing) -> Iterator[Window]:
        if window is not None:
            yield window
        while window is None or not window.last:
            window = next_window(window, source, self._reader, packing)
            window.plan  # noqa: B018 (made here, on this thread)
            yield window

    def _batch(self, rows: list[_Row]) -> dict[str, Any]:
        if self.world_size == 1:
            return _join(rows)
        lengths = [row.window.lengths_of(row.number) for row in rows]
        order = _rust.balance(lengths, self.world_size, _LINEAR_COST)
        first = self.rank * self.batch_size
        return _join([rows[at] for at in sorted(order[first : first + self.batch_size])])

    def _log(self, window: Window) -> None:
        kept, split, truncated, dropped, dropped_tokens = window.losses
        logger.log(
            logging.WARNING if split or truncated or dropped else logging.INFO,
            "Epoch %d: %s documents packed; %s of them split, %s tokens truncated, %s documents "
            "(%s tokens) dropped.",
            *(window.packing.epoch, f"{kept:,}", f"{split:,}", f"{truncated:,}"),
            *(f"{dropped:,}", f"{dropped_tokens:,}"),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the batch that was handed out last.

        It holds the documents of one window, so its size is bounded and nothing is read again to
        resume. It is the same on every rank, and good for another ``world_size`` and ``batch_size``.

        Returns:
            ints, strings and tensors, which ``torch.save`` and ``torch.load`` take.
        """
        window, row = self._next
        return {
            **self._made_from,
            "epoch": self._epoch,
            "row": row,
            "window": None if window is None else window.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on after the batch that `state_dict` was called after.

        Raises:
            ArgumentError: the state is of a stream with other arguments.
            DataError: it is no state of a stream.
        """
        missing = {*self._made_from, "epoch", "row", "window"} - state.keys()
        if missing:
            raise DataError(
                f"state lacks {', '.join(sorted(missing))}: pass what state_dict() returned."
            )
        for key, value in self._made_from.items():
            if state[key] != value:
                raise ArgumentError(
                    f"{key} is {value!r} here and {state[key]!r} in the state: resume with the arguments "
                    "the stream was made with."
                )
        self._epoch = state["epoch"]
        packing = Packing(self.max_length, self._overflow, self._seed, self._epoch)
        window = state["window"]
        self._next = self._start = _Place(
            None if window is None else Window.from_state(window, packing), state["row"]
        )


class _Place(NamedTuple):
    """The next row to hand out; without a window, the first of an epoch."""

    window: Window | None
    row: int


class _Row(NamedTuple):
    window: Window
    number: int


def _join(rows: list[_Row]) -> dict[str, Any]:
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


class _TextReader:
    def __init__(self, tokenizer: FastTokenizer, text_column: str) -> None:
        self._tokenizer = tokenizer
        self._schema = Schema(tokenizer.tokenizer, text_column)

    def example(self, row: Any, index: int) -> tuple[Example, int]:
        example = self._schema.read(row, index)
        return example, example.size

    def read(self, examples: list[Example], first: int) -> Tokens:
        ids, lengths = encode_examples(self._tokenizer, examples, first)
        labels = np.where(ids < 0, np.int32(IGNORE_INDEX), ids)
        return Tokens(ids & np.iinfo(np.int32).max, labels, lengths)

    @property
    def overflow(self) -> str:
        return "error" if self._schema.is_chat else "split"


class _TokenReader:
    overflow = "error"

    def example(self, row: Any, index: int) -> tuple[Row, int]:
        found = read_row(row, "dataset", index)
        return found, len(found.input_ids)

    def read(self, examples: list[Row], first: int) -> Tokens:
        return stored(join(examples), "dataset")
