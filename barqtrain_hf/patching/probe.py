"""The parity probe: does an op compute what a module's stock forward computes?

Run once per kind of module at install, on the module's own device, forward and gradients. It is what
makes an unknown model or a new transformers release safe: a mismatch keeps the stock forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Allowed ‖ours − stock‖ / ‖stock‖ of a gradient or a loss. Both sides round in the working dtype, so
# they differ by a few of its units in the last place.
_GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# An output must agree element by element but for the few that sit on a rounding boundary; another
# order of rounding changes a third of them.
_MAX_DIFFERING = 0.02


def same_rounding(ours: torch.Tensor, stock: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why two outputs are not the same function, rounded to ``dtype`` in the same order, or None."""
    if ours.dtype is not stock.dtype or ours.shape != stock.shape:
        return f"gives {stock.dtype} {tuple(stock.shape)}, not {ours.dtype} {tuple(ours.shape)}"
    truth = stock.double()
    # One unit in the last place is 4e-4 in fp16 and 1e-7 in fp32, whose sums differ by a few.
    differing = ((ours.double() - truth).abs() > 1e-5 * truth.abs()).double().mean().item()
    if differing > _MAX_DIFFERING:
        return f"rounds {differing:.0%} of its outputs differently in {dtype}"
    return close(ours, stock, dtype)


def close(ours: torch.Tensor, stock: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why two tensors differ by more than rounding in ``dtype`` explains, or None."""
    difference = (ours.double() - stock.double()).norm()
    relative = (difference / stock.double().norm().clamp(min=1e-30)).item()
    tolerance = _GRADIENT_TOLERANCE.get(dtype, 0.0)
    if relative <= tolerance:  # NaN fails
        return None
    return f"differs by {relative:.1e}, more than {tolerance:.0e}"


def first_difference(
    names: Sequence[str],
    ours: Sequence[torch.Tensor],
    stock: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> str | None:
    """The first of several tensors that is not `close`, as a sentence, or None."""
    for name, mine, theirs in zip(names, ours, stock, strict=True):
        reason = close(mine, theirs, dtype)
        if reason is not None:
            return f"{name} {reason}"
    return None
