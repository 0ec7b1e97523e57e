"""The gate every op passes: error(ours) <= 1.25 * error(stock PyTorch in the same dtype), against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

GATE = 1.25
Tensors = Sequence[torch.Tensor]


def assert_as_accurate(
    draw: Callable[[], Tensors],
    ours: Callable[..., Tensors],
    stock: Callable[..., Tensors],
    oracle: Callable[..., Tensors],
    draws: int = 8,
) -> None:
    """Compares root-mean-square errors over several draws of inputs, output by output.

    Args:
        draw: makes fresh inputs. Several draws, because one rounding error is luck: the ratio of two
            errors is only a statement about the code once it is averaged.
        ours, stock: outputs and gradients in the working dtype.
        oracle: the same from the same inputs in fp64.
    """
    totals: list[list[float]] = []
    for _ in range(draws):
        inputs = draw()
        for i, (mine, theirs, truth) in enumerate(
            zip(ours(*inputs), stock(*inputs), oracle(*inputs), strict=True)
        ):
            assert mine.shape == theirs.shape == truth.shape
            assert mine.dtype is theirs.dtype
            assert torch.isfinite(mine).all()
            if i == len(totals):
                totals.append([0.0, 0.0, 0.0])
            totals[i][0] += (mine.double() - truth).square().sum().item()
            totals[i][1] += (theirs.double() - truth).square().sum().item()
            totals[i][2] += truth.square().sum().item()
    for i, (mine, theirs, truth) in enumerate(totals):
        assert mine <= GATE**2 * theirs, (
            f"output {i}: relative error {(mine / truth) ** 0.5:.3e}, stock {(theirs / truth) ** 0.5:.3e}"
        )
