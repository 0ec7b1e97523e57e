"""Which of the processes that train together this one is, and which rows are its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from barqtrain_hf import _rust
from barqtrain_hf.data.packing import non_negative_int, positive_int
from barqtrain_hf.errors import ArgumentError

LINEAR_COST = 24_576
"""Tokens at which attention costs as much as what is linear in them: six times a hidden size of 4096."""


def row_costs(
    lengths: npt.NDArray[np.int64],
    order: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    linear: int = LINEAR_COST,
) -> npt.NDArray[np.int64]:
    """What each row of a plan costs to train on: ``linear * L + L**2``, summed over its documents.

    Rows hold equally many tokens, yet cost unequally: attention is quadratic in the length of a document.
    """
    each = lengths[order]
    return np.add.reduceat(each * (each + linear), offsets[:-1])


class Costly(Protocol):
    """A data set that knows what its items cost."""

    def costs(self, linear: int) -> npt.NDArray[np.int64]: ...


class BalancedBatches:
    """The batches of a sampler, with the rows of every step dealt so that all ranks take equally long.

    accelerate gives each n-th batch to rank n. Rows change places within a step only, so an epoch has
    every row as often as before, in an order that depends on the sampler's alone.

    Args:
        batches: lists of rows; a ``BatchSampler``.
        dataset: what they are rows of.
        ranks: how many share the batches.
        accumulation: batches of each rank in a step.
        linear: see `row_costs`.
    """

    def __init__(
        self, batches: Any, dataset: Costly, ranks: int, accumulation: int, linear: int
    ) -> None:
        self._batches = batches
        self._dataset = dataset
        self._ranks, self._accumulation, self._linear = ranks, accumulation, linear

    def __getattr__(self, name: str) -> Any:
        # batch_size, drop_last, sampler: accelerate asks for them.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        costs = self._dataset.costs(self._linear)  # those of this epoch
        batches = iter(self._batches)
        while step := list(islice(batches, self._ranks * self._accumulation)):
            size = len(step[0])
            whole = [batch for batch in step if len(batch) == size]
            turns = len(whole) // self._ranks
            rows = [row for batch in whole[: turns * self._ranks] for row in batch]
            if turns:
                order = _rust.balance(costs[rows].tolist(), self._ranks, turns)
                for first in range(0, len(order), size):
                    yield [rows[at] for at in sorted(order[first : first + size])]
            yield from step[turns * self._ranks :]


def find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Both arguments checked, or found out if both are None.

    They are then those of ``torch.distributed`` where it is initialised, else ``RANK`` and
    ``WORLD_SIZE`` of the environment, which torchrun and accelerate set, else 0 and 1.

    Raises:
        ArgumentError: only one of them is given, or they do not go together.
        ArgumentTypeError: one is no integer.
    """
    if (rank is None) != (world_size is None):
        raise ArgumentError(
            f"rank is {rank!r} and world_size is {world_size!r}: pass both, or neither to have them found "
            "out."
        )
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        found = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            rank, world_size = map(int, found)
        except ValueError:
            raise ArgumentError(
                f"RANK is {found[0]!r} and WORLD_SIZE is {found[1]!r} in the environment: set both to "
                "integers, or pass rank and world_size."
            ) from None
    world_size = positive_int("world_size", world_size)
    rank = non_negative_int("rank", rank)
    if rank >= world_size:
        raise ArgumentError(f"rank is {rank}: pass 0 to world_size - 1 = {world_size - 1}.")
    return rank, world_size
