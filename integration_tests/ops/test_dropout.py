"""Dropout from a counter: the generator's numbers, what is done with them, and the kernel bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from norm_cases import DTYPES, misaligned

from barqtrain_hf.ops._dropout import Masks, dropout, dropout_reference, philox, random_words

FULL = 2**32 - 1
COUNT, WIDTH = 2**18, 512


def words_of(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def seed_of(value: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([value], device=device)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
    ids=["zeros", "ones"],
)
def test_known_answers_of_philox(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Those that the authors publish with their library."""
    assert philox(words_of(*counter), words_of(*key)) == expected


def test_an_elements_number_depends_on_its_place_alone() -> None:
    seed = seed_of(-5)  # keys have 64 bits, whatever the sign
    words = random_words(0, 100, seed, 3)
    for first, count in ((0, 0), (1, 2), (3, 97), (64, 36)):
        assert torch.equal(random_words(first, count, seed, 3), words[first:][:count])
    # Element 4 * (7 * 2^32 + 9): the counter's second word.
    expected = torch.cat(philox(words_of(9, 7, 3, 0), words_of(FULL - 4, FULL)))
    assert torch.equal(random_words(4 * (7 * 2**32 + 9), 4, seed, 3), expected)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_as_many_are_kept_as_there_should_be(p: float) -> None:
    """Four standard deviations: of all, of every eighth, and of pairs in rows, columns, seeds and streams."""

    def kept(seed: int, stream: int) -> torch.Tensor:
        x = dropout(torch.ones(COUNT // WIDTH, WIDTH), seed_of(seed), stream, p)
        assert set(x.unique().tolist()) == {0.0, torch.tensor(1.0 / (1.0 - p)).item()}
        return (x > 0).double()

    x = kept(1, 0)
    deviation = (p * (1.0 - p)) ** 0.5
    for part in (x, *(x[:, lane::8] for lane in range(8))):
        assert abs(part.mean() - (1.0 - p)) < 4.0 * deviation / part.numel() ** 0.5
    pairs = [(x[:, lag:], x[:, :-lag]) for lag in (1, 2, 3, 4, 8)]
    pairs += [(x[1:], x[:-1]), (x, kept(2, 0)), (x, kept(1 + 2**32, 0)), (x, kept(1, 1))]
    for one, other in pairs:
        correlation = ((one - 1.0 + p) * (other - 1.0 + p)).mean() / deviation**2
        assert abs(correlation) < 4.0 / one.numel() ** 0.5


def test_numbers_of_seeds_and_streams_differ() -> None:
    seeds = [*range(64), *(1 << bit for bit in range(7, 63)), -1]
    drawn = {
        tuple(random_words(0, 16, seed_of(seed), stream).tolist())
        for seed, stream in itertools.product(seeds, range(8))
    }
    assert len(drawn) == len(seeds) * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_is_scaled_and_rounded_once(dtype: torch.dtype) -> None:
    seed, p = seed_of(4), 0.3
    x = torch.randn(37, 29).to(dtype)
    kept = random_words(0, x.numel(), seed, 2).view(x.shape) >= round(p * 2**32)
    expected = torch.where(kept, x.float() * (1.0 / (1.0 - p)), 0.0)
    y = dropout(x, seed, 2, p)
    assert y.dtype is dtype and torch.equal(y, expected.to(dtype))
    assert torch.equal(dropout(x.T.contiguous().T, seed, 2, p), y)  # strides do not count
    total = torch.randn(37, 29).to(dtype)
    assert dropout(x, seed, 2, p, out=(out := total.clone()), add=True) is out
    assert torch.equal(out, (total.float() + expected).to(dtype))
    dropout(x, seed, 2, p, out=x)
    assert torch.equal(x, y)


def test_infinite_elements_and_probabilities_at_the_ends() -> None:
    x = torch.tensor([float("inf"), float("nan")]).repeat(500)
    y = dropout(x, seed_of(0), 0, 0.5)
    kept = random_words(0, 1000, seed_of(0), 0) >= 2**31
    assert (y[~kept] == 0).all() and not y[kept].isfinite().any()
    assert torch.equal(dropout(torch.ones(1000), seed_of(0), 0, 1e-12), torch.ones(1000))
    assert not dropout(torch.ones(1000), seed_of(0), 0, 1.0 - 2**-53).any()
    assert dropout(torch.ones(0, 3), seed_of(0), 0, 0.5).shape == (0, 3)


def test_a_layer_without_dropout_is_left_alone() -> None:
    masks, x = Masks.draw((0.0, 0.5), torch.device("cpu")), torch.ones(64)
    assert masks.drop(x, 0) is x and masks.differentiable(x, 0) is x
    masks.drop_(x, 0)
    assert (x == 1).all() and not (masks.drop(x, 1) == 1).any()


@pytest.mark.gpu
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_the_reference_bit_for_bit(dtype: torch.dtype, add: bool) -> None:
    """Parts of vectors, of blocks, several blocks; views that do not begin at whole vectors."""
    for case, count in enumerate((1, 3, 4, 7, 8, 9, 2047, 2049, 100003)):
        p = (0.05, 0.5, 0.93)[case % 3]
        seed = torch.empty(1, dtype=torch.int64, device="cuda").random_()
        x, given = (torch.randn(count, device="cuda").to(dtype) for _ in range(2))
        x[::17] = float("inf")
        expected = dropout_reference(x, seed, case, p, out=given.clone(), add=add)
        aligned = dropout_reference(x.cpu(), seed.cpu(), case, p, out=given.cpu(), add=add)
        torch.testing.assert_close(expected.cpu(), aligned, rtol=0, atol=0, equal_nan=True)
        for source, shifted in itertools.product((x, misaligned(x)), (False, True)):
            out = misaligned(given) if shifted else given.clone()
            mine = dropout(source, seed, case, p, out=out, add=add)
            torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)
        if not add:
            for source in (x, misaligned(x)):
                assert torch.equal(dropout(source, seed, case, p), expected)
                assert torch.equal(dropout(source, seed, case, p, out=source), expected)


@pytest.mark.gpu
def test_the_kernel_writes_nothing_else() -> None:
    for first, count in ((0, 37), (1, 37), (8, 64), (3, 2050)):
        memory = torch.full((4096,), 7.0, device="cuda", dtype=torch.bfloat16)
        part = memory[first : first + count]
        dropout(part, torch.zeros(1, dtype=torch.int64, device="cuda"), 0, 0.5, out=part)
        assert (memory[:first] == 7).all() and (memory[first + count :] == 7).all()
        assert not (part == 7).any()


@pytest.mark.gpu
def test_more_elements_than_a_word_of_the_counter_has() -> None:
    count, tail = 2**34 + 4099, 6000
    if torch.cuda.mem_get_info()[0] < 2 * count + 2**31:
        pytest.skip("It takes 34 GiB of GPU memory.")
    seed = torch.full((1,), -77, device="cuda")
    x = torch.ones(count, device="cuda", dtype=torch.bfloat16)
    dropout(x, seed, 1, 0.5, out=x)
    for first in (0, 2**32 - 3000, 2**33 - 3000, count - tail):
        kept = random_words(first, tail, seed, 1) >= 2**31
        assert torch.equal(x[first : first + tail], 2.0 * kept.bfloat16())


@pytest.mark.gpu
def test_the_device_s_generator_draws_the_seed() -> None:
    x, device = torch.ones(5000, device="cuda"), torch.device("cuda")

    def drawn() -> Any:
        return Masks.draw((0.5,), device).drop(x, 0)

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert torch.equal(drawn(), first) and torch.equal(drawn(), second)
    assert not torch.equal(first, second)
