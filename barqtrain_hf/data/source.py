"""Rows of somebody's data set, read in order from any place in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from barqtrain_hf.errors import ArgumentTypeError


class Source:
    """Reads rows and knows where it is.

    A map-style data set is read from any index at once, and one with ``state_dict`` and
    ``load_state_dict``, such as ``datasets.IterableDataset``, from its own states. Of any other
    iterable the rows before that place are read again and thrown away.

    Args:
        dataset: sized and indexable, or iterable.

    Raises:
        ArgumentTypeError: ``dataset`` is neither.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        self._stateful = not self._indexed and hasattr(dataset, "load_state_dict")
        if not self._indexed and not hasattr(dataset, "__iter__"):
            raise ArgumentTypeError(
                f"dataset is a {type(dataset).__name__}, which cannot be iterated over: pass a data set, "
                "a list, or an object whose __iter__ gives rows."
            )
        # Where an epoch begins: a data set goes on from the state it was given last.
        self._origin = copy.deepcopy(dataset.state_dict()) if self._stateful else None
        self._rows: Iterator[Any] = iter(())
        self._count = 0

    def seek(self, place: Any) -> None:
        """Goes to a `place` of an earlier reader, or, with None, to the first row."""
        self._count = 0 if place is None else place["rows"]
        if self._indexed:
            self._rows = map(self._dataset.__getitem__, range(self._count, len(self._dataset)))
        elif self._stateful:
            state = self._origin if place is None else place["state"]
            self._dataset.load_state_dict(copy.deepcopy(state))
            self._rows = iter(self._dataset)
        else:
            self._rows = islice(self._dataset, self._count, None)

    def read(self, count: int) -> list[Any]:
        """The next rows; fewer than ``count`` only at the end."""
        rows = list(islice(self._rows, count))
        self._count += len(rows)
        return rows

    @property
    def place(self) -> dict[str, Any]:
        """Where the next row is."""
        state = copy.deepcopy(self._dataset.state_dict()) if self._stateful else None
        return {"rows": self._count, "state": state}
