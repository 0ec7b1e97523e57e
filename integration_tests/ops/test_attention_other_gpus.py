"""The kernels that other GPUs get, with their tiles, on the one that is here.

On a Hopper GPU the portable kernels would else run for capped scores and heads of 256 dimensions only.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_cases import (
    CASES,
    LONG,
    ROPES,
    WINDOWS,
    Case,
    assert_as_accurate,
    draw,
    ours,
    tiles_of,
)

Capability = tuple[int, int]
# T4, A100, RTX 3090 (as RTX 4090 and 5090), B200: the most dimensions of a head and the dtype to try.
OTHERS: dict[Capability, tuple[int, torch.dtype]] = {
    (7, 5): (128, torch.float16),
    (8, 0): (256, torch.bfloat16),
    (8, 6): (256, torch.bfloat16),
    (10, 0): (256, torch.bfloat16),
}
GPUS = [pytest.param(gpu, id=f"sm_{gpu[0]}{gpu[1]}") for gpu in OTHERS]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_it(gpu: Capability, case: Case) -> Iterator[None]:
    if case.dim > OTHERS[gpu][0]:
        pytest.skip("its heads have at most 128 dimensions there")
    with tiles_of(gpu):
        yield


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_as_accurate_as_stock(case: Case, gpu: Capability) -> None:
    draws = 1 if case.tokens >= 1000 else 8 if case.tokens < 100 else 4
    assert_as_accurate(case, OTHERS[gpu][1], "cuda", draws)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", [*ROPES, *WINDOWS[:4], *LONG], ids=str)
def test_repeats_bit_for_bit(case: Case, gpu: Capability) -> None:
    tensors = draw(case, OTHERS[gpu][1], "cuda")
    run = ours(case, "cuda")
    first = run(*tensors)
    for _ in range(3):
        for mine, again in zip(first, run(*tensors), strict=True):
            assert torch.equal(mine, again)
