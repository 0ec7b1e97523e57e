"""Packed batches from a stream of documents, in bounded memory, resumable at any batch."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch

from barqtrain_hf import _rust
from barqtrain_hf.data.batch import PackedBatch
from barqtrain_hf.data.dataset import Overflow
from barqtrain_hf.data.packing import non_negative_int, positive_int
from barqtrain_hf.data.prefetch import Prefetcher
from barqtrain_hf.data.ranks import find_rank
from barqtrain_hf.data.readers import TextReader, TokenReader
from barqtrain_hf.data.source import Source
from barqtrain_hf.data.summary import losses_of, summary_of
from barqtrain_hf.data.tokenizer import FastTokenizer
from barqtrain_hf.data.window import (
    Packing,
    Place,
    Reader,
    Window,
    WindowRow,
    join_rows,
    next_window,
)
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError, UnsupportedError

logger = logging.getLogger(__name__)

_VERSION = 2
_LOSSES = (
    "num_documents",
    "split_documents",
    "truncated_tokens",
    "dropped_documents",
    "dropped_tokens",
)
_NO_LOSSES = (0, 0, 0, 0, 0)


class PackedStream(torch.utils.data.IterableDataset[PackedBatch]):
    """Batches of packed rows from documents that are read, tokenised and packed while training goes on.

    Documents are packed window by window, up to 4096 at a time; the emptiest rows of a window are
    packed again with the next. At most four windows are held. A thread of this process works ahead;
    it needs the GIL only to read rows.

    The rows and their order are a function of the documents, ``max_length``, ``seed`` and the epoch.
    A step is ``batch_size`` rows for each of ``world_size`` ranks, dealt so that they take equally
    long (attention is quadratic in the length of a document). All ranks read all documents. A data set
    with ``set_epoch`` is told the epoch, so a shuffled one is in another order in each.

    Use it without a collator: ``for batch in stream``, or ``DataLoader(stream, batch_size=None)``.

    Args:
        dataset: documents, in the order they are to be read: a list, a map-style or an iterable data
            set, `DataFiles`, or a path or glob as `DataFiles` takes it. With a ``tokenizer`` rows are as in
            `tokenize`, else as in `PackedDataset`. To resume a data set with a shuffle buffer, its rows are
            read again from the first.
        max_length: tokens a row can hold.
        tokenizer: a fast tokenizer, or a `FastTokenizer` for other than its default settings.
        text_column: as in `tokenize`.
        assistant_only_loss: as in `tokenize`.
        batch_size: rows of each batch; without it 1, and in a `BarqTrainer` its
            ``per_device_train_batch_size``.
        overflow: as in `PackedDataset`. By default long texts are split, and all else that is too long
            is refused: splitting would part completions from their prompts.
        seed: chooses which documents share a row, and the order of rows in a window.
        rank: which of the ranks this is. Without it and ``world_size``, both are those of
            ``torch.distributed``, else of the environment (``RANK`` and ``WORLD_SIZE``), else 0 and 1.
            Where something else deals batches to the ranks, as ``accelerator.prepare`` of a DataLoader
            does, pass 0 and 1; `BarqTrainer` does not.
        world_size: how many there are.

    Raises:
        ArgumentError: an impossible value.
        ArgumentTypeError: ``dataset`` cannot be iterated over or is no data set (a DatasetDict),
            or a number is none.
        UnsupportedError: ``tokenizer`` has no fast version, or ``dataset`` was split by node already and
            there are several ranks.
    """

    def __init__(
        self,
        dataset: Any,
        max_length: int,
        *,
        tokenizer: Any = None,
        text_column: str | None = None,
        assistant_only_loss: bool = False,
        batch_size: int | None = None,
        overflow: Overflow | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.max_length = positive_int("max_length", max_length)
        self.batch_size = 1 if batch_size is None else positive_int("batch_size", batch_size)
        self.rank, self.world_size = find_rank(rank, world_size)
        self._given = {
            name
            for name, value in (("batch_size", batch_size), ("rank", rank))
            if value is not None
        }
        if overflow is not None and overflow not in get_args(Overflow):
            raise ArgumentError(
                f"overflow is {overflow!r}: choose one of {', '.join(get_args(Overflow))}."
            )
        self._overflow = overflow
        self._seed = non_negative_int("seed", seed)
        self._source = Source(dataset)
        if self._source.split_by_node and self.world_size > 1:
            raise UnsupportedError(
                f"dataset was split by split_dataset_by_node, and PackedStream deals its rows to "
                f"{self.world_size} ranks itself: most documents would be read by nobody.",
                "Pass the data set as it was before the split, or rank=0, world_size=1.",
            )
        if tokenizer is None:
            if assistant_only_loss:
                raise ArgumentError(
                    "assistant_only_loss is True and there is no tokenizer: the labels of ready tokens say "
                    "where there is a loss."
                )
            self._reader: Reader = TokenReader()
            identity, column = "input_ids", None
        else:
            fast = tokenizer if isinstance(tokenizer, FastTokenizer) else FastTokenizer(tokenizer)
            self._reader = TextReader(fast, text_column, assistant_only_loss)
            identity, column = fast.identity, text_column or "text"
            identity += " assistant_only_loss" if assistant_only_loss else ""
        self._source.only(self._reader.columns)
        self._made_from = {
            "version": _VERSION,
            "max_length": self.max_length,
            "overflow": overflow,
            "seed": self._seed,
            "tokens": hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
            "text_column": column,
            "documents": self._source.size,
            "shuffling": self._source.shuffling,
        }
        self._next = self._start = Place(0)
        self._losses, self._left_out, self._warned = _NO_LOSSES, 0, False
        self._began = self._waited = 0.0

    def __repr__(self) -> str:
        known = self._source.size
        documents = "documents" if known is None else f"{known:,} documents"
        batches = f"batches of {self.batch_size} rows of {self.max_length:,}"
        epoch, window, row = self._next
        done = 0 if window is None else window.packed(row).rows
        at = f"rank {self.rank} of {self.world_size}, epoch {epoch} after {done:,} rows"
        return f"<PackedStream {documents} in {batches}; {at}>"

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins this epoch; without a call it is the one after the last.

        Raises:
            ArgumentError: ``epoch`` is negative, or 2**64 or more.
            ArgumentTypeError: it is not an integer.
        """
        epoch = non_negative_int("epoch", epoch)
        if epoch != self._next.epoch:
            self.seek(Place(epoch))

    def deal(self, batch_size: int, rank: int, world_size: int) -> None:
        """Takes what was not said at construction, before the first batch; a trainer calls it.

        Raises:
            ArgumentError: something else was said.
        """
        for name, ours, theirs in (
            ("batch_size", self.batch_size, batch_size),
            ("rank", (self.rank, self.world_size), (rank, world_size)),
        ):
            if name in self._given and ours != theirs:
                asked = (
                    f"batch_size is {ours} here and per_device_train_batch_size is {theirs}"
                    if name == "batch_size"
                    else f"rank and world_size are {ours} here and {theirs} in the trainer"
                )
                raise ArgumentError(
                    f"PackedStream: {asked}: leave {name} out, and the trainer says what it is."
                )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __iter__(self) -> Iterator[PackedBatch]:
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
        self._next, self._start = self._start, Place(self._start.epoch)
        return self._iterate(self._next)

    @property
    def losses(self) -> dict[str, int]:
        """What this epoch has lost so far, counted whenever a window of documents begins to be handed out.

        Returns:
            ``num_documents`` packed, and ``split_documents``, ``truncated_tokens``, ``dropped_documents``
            and ``dropped_tokens`` as `PackedDataset` counts them; ``left_out_rows`` at the end of an
            epoch, where rows are fewer than ranks.
        """
        return {**dict(zip(_LOSSES, self._losses, strict=True)), "left_out_rows": self._left_out}

    def _iterate(self, place: Place) -> Iterator[PackedBatch]:
        epoch = place.epoch
        packing = Packing(self.max_length, self._overflow, self._seed, epoch)
        source = copy.copy(self._source)  # the thread of an iteration that was given up has its own
        source.seek(None if place.window is None else place.window.place, epoch)
        self._losses, self._left_out = _NO_LOSSES, 0
        self._began, self._waited = time.perf_counter(), 0.0
        asked = self._began
        rows: list[WindowRow] = []
        with Prefetcher(self._windows(source, place.window, packing)) as prefetcher:
            windows = iter(prefetcher)
            ahead, start = [next(windows)], place.row
            while ahead:
                window = ahead[0]
                self._count_losses(window)
                for number in range(start, window.num_rows):
                    rows.append(WindowRow(window, number))
                    if len(rows) == self.batch_size * self.world_size:
                        # Before the place is set: it may raise, and then the batch is not handed out.
                        left = self._rows_after(number, ahead, windows)
                        self._next = Place(epoch, window, number + 1)
                        batch = self._batch(rows)
                        self._waited += time.perf_counter() - asked
                        if left < self.world_size:
                            # To resume here is to begin the next epoch.
                            self._end_epoch(ahead[-1], left)
                            yield batch
                            return
                        yield batch
                        asked, rows = time.perf_counter(), []
                start = 0
                ahead.pop(0)
                if not ahead and not window.last:
                    ahead.append(next(windows))
        if not window.losses[0]:
            raise DataError(
                "dataset has no documents with tokens to train on, or is an iterator that was read before: "
                "pass an object whose __iter__ starts again."
            )
        self._waited += time.perf_counter() - asked
        self._end_epoch(window, len(rows) if len(rows) < self.world_size else 0)
        if rows and not self._left_out:
            yield join_rows(rows[self.rank :: self.world_size])

    def _rows_after(self, number: int, ahead: list[Window], windows: Iterator[Window]) -> int:
        """How many rows follow row ``number`` of the first window; fewer than the ranks only if no more do.

        The next window is fetched, and put behind those ``ahead``, only if this one does not tell.
        """
        while True:
            left = sum(window.num_rows for window in ahead) - number - 1
            if left >= self.world_size or ahead[-1].last:
                return left
            ahead.append(next(windows))

    def _windows(self, source: Source, window: Window | None, packing: Packing) -> Iterator[Window]:
        if window is not None:
            yield window
        while window is None or not window.last:
            window = next_window(window, source, self._reader, packing)
            window.plan  # noqa: B018 (made here, on this thread)
            yield window

    def _batch(self, rows: list[WindowRow]) -> PackedBatch:
        if self.world_size == 1:
            return join_rows(rows)
        costs = [row.window.costs[row.number] for row in rows]
        order = _rust.balance(costs, self.world_size, 1)
        first = self.rank * self.batch_size
        return join_rows([rows[at] for at in sorted(order[first : first + self.batch_size])])

    def _count_losses(self, window: Window) -> None:
        self._losses = window.losses
        if any(window.losses[1:]) and not self._warned:
            self._warned = True
            logger.warning(
                "Of the first %s documents: %s. `losses` of the stream counts on.",
                f"{sum(window.losses[::3]):,}",
                "; ".join(losses_of(window.losses)),
            )

    def _end_epoch(self, last: Window, left_out: int) -> None:
        epoch = last.packing.epoch
        self._next = self._start = Place(epoch + 1)
        self._losses, self._left_out = last.losses, left_out
        self.log(Place(epoch, last, last.num_rows))

    def log(self, place: Place) -> None:
        """Logs what was packed of an epoch up to a place in it; at its beginning nothing."""
        epoch, window, row = place
        if window is None:
            return
        lost = any(window.losses[1:]) or self._left_out
        logger.log(
            logging.WARNING if lost else logging.INFO,
            "Epoch %d: %s%s It took %.1f s, of which %.1f s were spent waiting for rows.",
            epoch,
            summary_of(window.packed(row), self.max_length, window.losses),
            f" The last {self._left_out} rows are fewer than the {self.world_size} ranks and are left out."
            if self._left_out
            else "",
            time.perf_counter() - self._began,
            self._waited,
        )

    @property
    def place(self) -> Place:
        """Where the stream is after the batch that was handed out last; costs nothing to ask."""
        return self._next

    @property
    def beginning(self) -> Place:
        """Where the next iteration will begin."""
        return self._start

    def seek(self, place: Place) -> None:
        """The next iteration begins at ``place``."""
        self._next = self._start = place

    def state_dict(self, place: Place | None = None) -> dict[str, Any]:
        """Where the stream is after the batch that was handed out last, or what it was at a `place`.

        It holds the documents of one window, so its size is bounded, and a data set that can begin at any
        row reads none again to resume. It is the same on every rank, and good for another ``world_size``
        and ``batch_size``.

        Returns:
            ints, strings and tensors, which ``torch.save`` and ``torch.load`` take.
        """
        epoch, window, row = self._next if place is None else place
        return {
            **self._made_from,
            "fingerprint": self._source.fingerprint,
            "epoch": epoch,
            "row": row,
            "window": None if window is None else window.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on after the batch that `state_dict` was called after.

        A warning is logged if the fingerprint of a ``datasets.Dataset`` is another one. It changes with
        the data, but also where a function could not be hashed, or a cache was copied.

        Raises:
            ArgumentError: the state is of a stream with other arguments, or of other documents.
            DataError: it is no state of a stream, or a damaged one.
        """
        if not isinstance(state, Mapping):
            raise DataError(f"state is a {type(state).__name__}: pass what state_dict() returned.")
        missing = {*self._made_from, "fingerprint", "epoch", "row", "window"} - state.keys()
        if missing:
            raise DataError(
                f"state lacks {', '.join(sorted(missing))}: pass what state_dict() returned."
            )
        self._compare(state)
        try:
            epoch = non_negative_int("epoch", state["epoch"])
            row = non_negative_int("row", state["row"])
        except (ArgumentError, ArgumentTypeError) as error:
            raise DataError(f"The state is damaged, pass an older one: {error}") from None
        window = None
        if state["window"] is not None:
            packing = Packing(self.max_length, self._overflow, self._seed, epoch)
            window = Window.from_state(state["window"], packing)
            size = self._source.size
            if size is not None and not 0 <= window.place["rows"] <= size:
                raise DataError(
                    f"The window in state ends at row {window.place['rows']} of {size}: pass an older state."
                )
        rows = 0 if window is None else window.num_rows
        if row > rows:
            raise DataError(
                f"row is {row} in the state of a window with {rows} rows: pass an older state."
            )
        if window is not None and window.last and rows - row < self.world_size:
            # It was taken with fewer ranks; for these nothing is left of the epoch.
            epoch, row, window = epoch + 1, 0, None
        self.seek(Place(epoch, window, row))

    def _compare(self, state: Mapping[str, Any]) -> None:
        for key, value in self._made_from.items():
            if state[key] != value:
                fix = (
                    "dataset is shuffled in another order; pass the same seed to its shuffle()."
                    if key == "shuffling"
                    else "it was saved by another release of barqtrain_hf; resume with that."
                    if key == "version"
                    else "resume with the arguments the stream was made with."
                )
                raise ArgumentError(
                    f"{key} is {value!r} here and {state[key]!r} in the state: {fix}"
                )
        if state["fingerprint"] != self._source.fingerprint:
            logger.warning(
                "dataset has the fingerprint %s here and %s in the state: if it holds other documents, some "
                "will be trained on twice and others not at all.",
                self._source.fingerprint,
                state["fingerprint"],
            )
