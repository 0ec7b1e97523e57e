"""pack_sequences: every document once, no row too full, and as good as the textbook."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from barqtrain_hf import _rust
from barqtrain_hf.data import pack_sequences
from barqtrain_hf.data.packing import plan_epoch, plan_rows
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, BarqError, DataError


@st.composite
def problems(draw):
    max_length = draw(st.integers(1, 300) | st.sampled_from([4095, 4096, 4097, 131_072]))
    lengths = draw(st.lists(st.integers(1, max_length), max_size=200))
    return lengths, max_length


def textbook_row_sizes(lengths, max_length):
    """Best-fit decreasing by looking at every row; returns the tokens of each row, sorted."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(max_length - length)
    return sorted(max_length - space for space in free)


@given(problems())
@example(([], 8))
@example(([1] * 70, 1))
@example(([4096] * 3, 4096))
def test_rows_hold_every_document_once_and_match_the_textbook(problem):
    lengths, max_length = problem
    rows = pack_sequences(lengths, max_length)
    assert sorted(index for row in rows for index in row.tolist()) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(size <= max_length for size in sizes)
    assert sizes == textbook_row_sizes(lengths, max_length)


@given(problems(), st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(2, 8))
def test_an_epoch_is_packed_whole_on_any_number_of_threads(problem, seed, epoch, threads):
    lengths, max_length = problem
    order, offsets = plan_epoch(lengths, max_length, seed, epoch)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = [order[begin:end].tolist() for begin, end in pairwise(offsets.tolist())]
    assert all(0 < sum(lengths[index] for index in row) <= max_length for row in rows)
    assert len(rows) == len(plan_epoch(lengths, max_length, seed, 0).offsets) - 1
    again = _rust.plan_epoch(
        np.array(lengths, np.int64), max_length, seed, epoch, len(rows), threads
    )
    np.testing.assert_array_equal(again[0], order)
    np.testing.assert_array_equal(again[1], offsets)


def test_golden_plan():
    rows = pack_sequences([3, 7, 5, 2, 10, 5, 1, 4], 10)
    assert [row.tolist() for row in rows] == [[4], [1, 0], [2, 5], [7, 3, 6]]
    assert {row.dtype for row in rows} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    "lengths",
    [
        [5, 3, 2],
        (5, 3, 2),
        np.array([5, 3, 2], dtype=np.uint16),
        np.array([5, 0, 3, 0, 2], dtype=np.int32)[::2],  # not contiguous
        torch.tensor([5, 3, 2]),
    ],
)
def test_any_list_of_integers_will_do(lengths):
    assert [row.tolist() for row in pack_sequences(lengths, 5)] == [[0], [1, 2]]


def test_a_million_documents_fill_rows_completely():
    """The figure of the design notes: lognormal, mean 396, rows of 4096, fill at least 99.95 %."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(396) - 0.5, 1, 1_000_000), 1, 4096).astype(np.int64)
    order, offsets = plan_rows(lengths, 4096)
    assert lengths.sum() / ((len(offsets) - 1) * 4096) > 0.9995
    np.testing.assert_array_equal(np.sort(order), np.arange(len(lengths)))
    assert np.add.reduceat(lengths[order], offsets[:-1]).max() <= 4096


@pytest.mark.parametrize(
    ("lengths", "max_length", "error", "message"),
    [
        ([3, 0], 8, DataError, r"lengths\[1\] is 0: remove"),
        ([-2, 3], 8, DataError, r"lengths\[0\] is -2: remove"),
        ([3, 9], 8, DataError, r"lengths\[1\] is 9, more than max_length=8: split or truncate"),
        ([3.0], 8, DataError, "lengths holds float64: pass integers"),
        ([True], 8, DataError, "lengths holds bool: pass integers"),
        (["3"], 8, DataError, "lengths holds <U1: pass integers"),
        ([[3], [4]], 8, DataError, r"lengths has shape \(2, 1\): pass one"),
        ([3], 0, ArgumentError, "max_length is 0: pass a positive"),
        ([3], -1, ArgumentError, "max_length is -1: pass a positive"),
        ([3], 8.0, ArgumentTypeError, r"max_length is 8.0 \(float\): pass"),
    ],
)
def test_refusals_name_the_value_and_the_fix(lengths, max_length, error, message):
    with pytest.raises(error, match=message) as caught:
        pack_sequences(lengths, max_length)
    assert isinstance(caught.value, BarqError)


@pytest.mark.parametrize(
    ("seed", "epoch", "error", "message"),
    [
        (-1, 0, ArgumentError, "seed is -1: pass zero or"),
        (2**64, 0, ArgumentError, r"seed is 18446744073709551616: pass .* below 2\*\*64"),
        ("a", 0, ArgumentTypeError, r"seed is 'a' \(str\): pass zero or"),
        (0, 2**64, ArgumentError, "epoch is 18446744073709551616: pass"),
        (0, 1.5, ArgumentTypeError, r"epoch is 1\.5 \(float\): pass"),
    ],
)
def test_seeds_and_epochs_that_are_none_are_refused(seed, epoch, error, message):
    with pytest.raises(error, match=message):
        plan_epoch([3, 4], 8, seed, epoch)
