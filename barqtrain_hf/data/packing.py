"""Which documents share a row."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from barqtrain_hf import _rust
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError

Lengths = Sequence[int] | npt.NDArray[np.integer]


class RowPlan(NamedTuple):
    """Row ``r`` holds the documents ``order[offsets[r]:offsets[r + 1]]``."""

    order: npt.NDArray[np.uint32]  # [documents]
    offsets: npt.NDArray[np.int64]  # [rows + 1]


def pack_sequences(lengths: Lengths, max_length: int) -> list[npt.NDArray[np.int64]]:
    """Packs documents into as few rows as best-fit-decreasing finds.

    The result depends on the arguments alone. One million documents plan in about 20 ms.

    Args:
        lengths: tokens per document, integers in ``1..max_length``, shape ``[documents]``.
        max_length: tokens a row can hold.

    Returns:
        One int64 array of document indices per row; together they name each document once. Rows
        with long documents come first.

    Raises:
        DataError: a length is not an integer, is zero or negative, or exceeds ``max_length``.
        ArgumentError: ``max_length`` is not positive.
        ArgumentTypeError: ``max_length`` is not an integer.
    """
    plan = plan_rows(lengths, max_length)
    order = plan.order.astype(np.int64)
    offsets = plan.offsets.tolist()
    return [order[begin:end] for begin, end in pairwise(offsets)]


def plan_rows(lengths: Lengths, max_length: int) -> RowPlan:
    """`pack_sequences` without the list: two arrays, however many rows there are."""
    max_length = positive_int("max_length", max_length)
    return _plan(_rust.pack_sequences, _checked(lengths), max_length)


def plan_epoch(
    lengths: Lengths, max_length: int, seed: int, epoch: int, rows: int | None = None
) -> RowPlan:
    """The shuffled rows of one epoch, in which short documents of any length share a row.

    Best-fit-decreasing alone fills a row with documents of one length. Where length tells the task,
    as it does in instruction data, each batch would then be of one task, and training on such
    batches converges more slowly. Mixing costs up to 0.1 % of fill.

    Args:
        lengths: as in `pack_sequences`.
        max_length: as in `pack_sequences`.
        seed: with ``epoch`` chooses the order; zero or more, below 2**64.
        epoch: zero or more. Every epoch has as many rows as epoch 0.
        rows: how many these are; without it they are counted, which takes as long again.

    Raises:
        DataError: as for `pack_sequences`.
        ArgumentError: ``seed`` or ``epoch`` is negative, or 2**64 or more.
        ArgumentTypeError: one of them is not an integer.
    """
    max_length = positive_int("max_length", max_length)
    seed, epoch = non_negative_int("seed", seed), non_negative_int("epoch", epoch)
    return _plan(_rust.plan_epoch, _checked(lengths), max_length, seed, epoch, rows, num_threads())


def num_threads() -> int:
    """Threads for our loops in Rust: this process's share of the CPUs it may use, 1 to 16.

    Processes that torchrun starts on one machine share its CPUs; it tells how many they are.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    # More than 16 threads gain little and each holds a copy of the tokenizer.
    return min(max(cpus // max(int(ranks) if ranks.isdecimal() else 1, 1), 1), 16)


def _checked(lengths: Lengths) -> npt.NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise DataError(f"lengths has shape {array.shape}: pass one length per document.")
    if array.size and array.dtype.kind not in "iu":
        raise DataError(f"lengths holds {array.dtype}: pass integers, the tokens per document.")
    return np.ascontiguousarray(array, dtype=np.int64)


def _plan(
    pack: Callable[..., tuple[npt.NDArray[np.uint32], npt.NDArray[np.uintp]]], *arguments: Any
) -> RowPlan:
    try:
        order, offsets = pack(*arguments)
    except ValueError as error:
        # The core's sentence names the argument, the value and the fix already.
        raise DataError(str(error)) from None
    return RowPlan(order, offsets.view(np.int64))


def positive_int(name: str, value: SupportsIndex) -> int:
    """``value`` as an int above zero, or an error that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            f"{name} is {value!r} ({type(value).__name__}): pass a positive integer."
        ) from None
    if number <= 0:
        raise ArgumentError(f"{name} is {number}: pass a positive integer.")
    return number


def non_negative_int(name: str, value: SupportsIndex, below_bits: int = 64) -> int:
    """``value`` as an int from zero to ``2**below_bits - 1``, or an error that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            f"{name} is {value!r} ({type(value).__name__}): pass zero or a positive integer."
        ) from None
    if not 0 <= number < 1 << below_bits:
        raise ArgumentError(
            f"{name} is {number}: pass zero or a positive integer below 2**{below_bits}."
        )
    return number
