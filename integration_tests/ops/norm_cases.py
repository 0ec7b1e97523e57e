"""What the tests of rms_norm and layer_norm share: inputs, and calls that return outputs and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# fp16 with bf16 has no kernel; "auto" takes the reference there.
PAIRS = [p for p in itertools.product(DTYPES, DTYPES) if p[0] is p[1] or torch.float32 in p]
# Rows: fewer than a block holds, a prime, more than the persistent grid. Widths: 8 lanes of a warp (64), a
# whole warp, one and two vectors a thread, a width that is no power of two (1000, 5120), and odd ones that
# only the scalar path takes.
SHAPES = [(257, 64), (7, 256), (1031, 1000), (33, 4096), (301, 5120), (3, 77), (129, 2049)]
# The widest row held in registers for each dtype, beyond it, far beyond it, and many short rows.
EXTREMES = [(5, 8192), (5, 16384), (3, 16392), (4, 40000), (3, 16385), (20000, 32), (3, 1)]


def run(function: Any, *tensors: torch.Tensor | None, upstream: Any, **named: Any) -> list[Any]:
    """Outputs of ``function(*tensors)`` and the gradients of its tensors under ``upstream``."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves, **named)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=False)]
    given = [t for t in leaves if t is not None]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, given, upstream)]


def as_double(tensors: Any) -> Any:
    return [None if t is None else t.double() for t in tensors]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that does not start at a multiple of 16 bytes."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:]
    return flat.view(tensor.shape).copy_(tensor)
