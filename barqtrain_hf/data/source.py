"""Rows of somebody's data set, read in order from any place in it."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from barqtrain_hf.data.files import DataFiles, is_data_file
from barqtrain_hf.errors import ArgumentTypeError, DataError

logger = logging.getLogger(__name__)

# What the parts of a `datasets.IterableDataset` read from or call. A copy of one shares them: they may
# be large, or unknown to deepcopy, and hold no place.
_SHARED = ("kwargs", "function", "fn_kwargs", "generate_examples_fn", "generate_tables_fn")


def open_dataset(dataset: Any) -> Any:
    """The data set, or `DataFiles` for a path; refuses what can be iterated over and is no data set.

    Raises:
        ArgumentTypeError: ``dataset`` is bytes, a mapping such as a DatasetDict, or a list of names of files.
        ArgumentError: it is a path, and not of a file that can be read.
    """
    if isinstance(dataset, (str, os.PathLike)):
        return DataFiles(dataset)
    if isinstance(dataset, (bytes, bytearray)):
        raise ArgumentTypeError(
            f"dataset is {reprlib.repr(dataset)} ({type(dataset).__name__}): pass a path, or a list of texts."
        )
    if isinstance(dataset, Mapping):
        raise ArgumentTypeError(
            f"dataset is a {type(dataset).__name__} with {', '.join(map(repr, islice(dataset, 8)))}: choose "
            'a split, such as dataset["train"].'
        )
    if isinstance(dataset, (list, tuple)) and dataset:
        first = dataset[0]
        if isinstance(first, os.PathLike):
            return DataFiles(dataset)
        # Strings in a list are texts. To train on names of files is never what was meant.
        if isinstance(first, str) and len(first) < 4096 and is_data_file(first):
            raise ArgumentTypeError(
                f"dataset[0] is {first!r}, the name of a file, and strings in a list are texts: pass "
                "DataFiles(dataset)."
            )
    return dataset


class Source:
    """Reads rows and knows where it is.

    A map-style data set is read from any index at once, and one with ``state_dict`` and
    ``load_state_dict``, such as ``datasets.IterableDataset``, from its own states. Of any other
    iterable the rows before that place are read again and thrown away; so are those of a
    ``datasets.IterableDataset`` with a shuffle buffer, whose states lack what is in the buffer.

    A data set with states is never touched: every reader has a copy, so that neither what others read
    of it nor another reader moves this one.

    Args:
        dataset: sized and indexable, iterable, or a path.

    Attributes:
        size: number of rows, or None where nobody knows it.
        fingerprint: of a ``datasets.Dataset``, or the layout of files; else None.
        shuffling: names the random generators by which the data set shuffles; None without any.
        split_by_node: whether ``datasets`` gives this process some of the rows only.

    Raises:
        ArgumentTypeError: ``dataset`` is neither, or something that is no data set.
    """

    def __init__(self, dataset: Any) -> None:
        dataset = open_dataset(dataset)
        self._dataset = dataset
        self._indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not self._indexed and not hasattr(dataset, "__iter__"):
            raise ArgumentTypeError(
                f"dataset is a {type(dataset).__name__}, which cannot be iterated over: pass a data set, "
                "a list, or an object whose __iter__ gives rows."
            )
        self._copied = not self._indexed and all(
            hasattr(dataset, name) for name in ("state_dict", "load_state_dict")
        )
        self._nodes = list(_nodes(getattr(dataset, "_ex_iterable", None)))
        self._stateful = self._copied and not any(map(_is_buffer, self._nodes))
        self.size = len(dataset) if self._indexed else None
        self.fingerprint: str | None = (
            dataset.layout
            if isinstance(dataset, DataFiles)
            else getattr(dataset, "_fingerprint", None)
        )
        self.shuffling = _shuffling(self._nodes)
        self.split_by_node = getattr(dataset, "_distributed", None) is not None
        self._live: Any = None
        self._rows: Iterator[Any] = iter(())
        self._count = 0

    def only(self, columns: Sequence[str]) -> None:
        """Reads no other columns, where that saves reading."""
        if isinstance(self._dataset, DataFiles):
            self._dataset = self._dataset.only(columns)

    def seek(self, place: Any, epoch: int = 0) -> None:
        """Goes to a `place` of an earlier reader of this epoch, or, with None, to the first row.

        A data set with ``set_epoch`` is told the epoch first: without that it would be in the same order
        in all of them, and ``datasets`` ignores the states of another epoch than the one it is in.
        """
        self._count = 0 if place is None else place["rows"]
        self._live = self._copy() if self._copied else self._dataset
        if hasattr(self._live, "set_epoch"):
            self._live.set_epoch(epoch)
        state = None if place is None else place["state"]
        if self._indexed:
            self._rows = self._items(self._count)
        elif self._stateful and state is not None:
            self._live.load_state_dict(copy.deepcopy(state))
            self._rows = iter(self._live)
        else:
            self._rows = islice(self._live, self._count, None)

    def _items(self, first: int) -> Iterator[Any]:
        for index in range(first, len(self._dataset)):
            try:
                row = self._dataset[index]
            except StopIteration as error:
                # map() or list() would take it for the end, and the rows after it would be lost.
                raise DataError(
                    f"dataset[{index}] raised StopIteration, {len(self._dataset) - index} rows before the "
                    "end: call next() with a default in __getitem__, or make len(dataset) right."
                ) from error
            yield row

    def _copy(self) -> Any:
        memo = {
            id(value): value
            for node in self._nodes
            for value in (vars(node).get(name) for name in _SHARED)
            if value is not None
        }
        try:
            return copy.deepcopy(self._dataset, memo)
        except (TypeError, NotImplementedError, pickle.PickleError) as error:
            logger.warning(
                "dataset (%s) cannot be copied (%s), so its own states are not used: to resume, its rows are "
                "read again from the first.",
                type(self._dataset).__name__,
                error,
            )
            self._copied = self._stateful = False
            return self._dataset

    def read(self, count: int) -> list[Any]:
        """The next rows; fewer than ``count`` only at the end.

        Raises:
            DataError: an item of a map-style data set ends the reading before its last row.
        """
        rows = list(islice(self._rows, count))
        self._count += len(rows)
        return rows

    @property
    def place(self) -> dict[str, Any]:
        """Where the next row is."""
        state = copy.deepcopy(self._live.state_dict()) if self._stateful else None
        return {"rows": self._count, "state": state}


def _nodes(node: Any) -> Iterator[Any]:
    """The steps a `datasets.IterableDataset` is made of, the last one first."""
    if hasattr(node, "_init_state_dict"):
        yield node
        for value in vars(node).values():
            for child in value if isinstance(value, (list, tuple)) else (value,):
                yield from _nodes(child)


def _is_buffer(node: Any) -> bool:
    # By name: datasets need not be installed, and the class is no part of its interface.
    return any(kind.__name__ == "BufferShuffledExamplesIterable" for kind in type(node).__mro__)


def _shuffling(nodes: list[Any]) -> str | None:
    generators = [
        getattr(getattr(node, "generator", None), "bit_generator", None) for node in nodes
    ]
    states = [str(generator.state) for generator in generators if generator is not None]
    return hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest() if states else None
