"""The kernels that other GPUs get, with their tiles, on the one that is here.

On a Hopper GPU the portable kernels would else run for capped scores and heads of 256 dimensions only.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from attention_cases import (
    CASES,
    LONG,
    OTHER_GPUS,
    ROPES,
    WINDOWS,
    Case,
    Gpu,
    assert_as_accurate,
    draw,
    equal,
    ours,
    tiles_of,
)

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("gpu", OTHER_GPUS, ids=str)]


@pytest.fixture(autouse=True)
def on_it(gpu: Gpu, case: Case) -> Iterator[None]:
    if case.dim > gpu.dim:
        pytest.skip(f"its heads have at most {gpu.dim} dimensions there")
    with tiles_of(gpu.capability):
        yield


@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_as_accurate_as_stock(case: Case, gpu: Gpu) -> None:
    draws = 1 if case.tokens >= 1000 else 8 if case.tokens < 100 else 4
    assert_as_accurate(case, gpu.dtypes[0], "cuda", draws)


@pytest.mark.parametrize("case", [*ROPES, *WINDOWS[:4], *LONG], ids=str)
def test_repeats_bit_for_bit(case: Case, gpu: Gpu) -> None:
    inputs = draw(case, gpu.dtypes[0], "cuda")
    first = ours(case, "cuda")(*inputs)
    for _ in range(3):
        assert equal(first, ours(case, "cuda")(*inputs))
