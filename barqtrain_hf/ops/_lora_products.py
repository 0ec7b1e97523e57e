"""The adapters' own products, which are thin: of the rank's width, or of its height."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from barqtrain_hf.ops._dropout import Masks


def low_products(rows: torch.Tensor, a: Sequence[torch.Tensor], masks: Masks) -> torch.Tensor:
    """t of all layers, side by side."""
    widths = [one.shape[0] for one in a]
    t = rows.new_empty(rows.shape[0], sum(widths))
    for i, (part, one) in enumerate(zip(t.split(widths, dim=1), a, strict=True)):
        torch.mm(masks.drop(rows, i), one.T, out=part)
    return t


def summed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left.T @ right`` of [N, ...], a sum over N rows, in fp32."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return (left.T @ right).float()
