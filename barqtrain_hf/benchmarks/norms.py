"""RMSNorm, LayerNorm and RMSNorm after an addition beside all rivals: bandwidth, host time, errors.

The bytes counted: x in, y out forward, dy, x in, dx out backward: 2·N·D and 3·N·D elements; with an addition
x, residual in, y, sum out and dy, dsum, sum in, dx out: 4·N·D each way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from barqtrain_hf.benchmarks import elementwise_anchors as anchors
from barqtrain_hf.benchmarks.elementwise import OURS, Case, Op, run_cases
from barqtrain_hf.benchmarks.elementwise_anchors import (
    COMPILE,
    EPS,
    LIGER,
    QUACK,
    Implementation,
    Tensors,
)
from barqtrain_hf.benchmarks.harness import Report
from barqtrain_hf.ops import layer_norm, rms_norm
from barqtrain_hf.ops._backend import Backend

RMS, LAYER, ADD = "RMSNorm", "LayerNorm", "add + RMSNorm"
ROUNDED_ONCE, GEMMA = "RMSNorm, rounded once", "RMSNorm, zero-centred"
TRANSFORMERS, TORCH_RMS, TORCH_LAYER = "transformers, eager", "F.rms_norm", "F.layer_norm"

SHAPES = ((16384, 2048), (16384, 4096), (16384, 8192))
SQUARE = (8192, 8192)
HEADS = (262144, 128)  # the norm of queries: every head of every token is a row
HOST_SHAPE = (1024, 1024)
ERROR_SHAPE = (1031, 2000)


def _rms_exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _gemma_exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _rms_exact(x, 1.0 + weight)


def _add_exact(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return _rms_exact(x + residual, weight), x + residual


def _layer_exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def ops(backend: Backend = "cuda") -> list[Op]:
    """Each norm with all implementations found here; the last two are compared for their errors alone."""
    ours, layer_ours = partial(rms_norm, backend=backend), partial(layer_norm, backend=backend)
    found, missing = anchors.load(
        {
            OURS: lambda: Implementation(lambda x, w: ours(x, w, EPS)),
            TORCH_RMS: lambda: Implementation(anchors.torch_rms_norm),
            LIGER: anchors.liger_rms_norm,
            QUACK: anchors.quack_rms_norm,
            COMPILE: lambda: anchors.compiled(anchors.rms_norm),
            TRANSFORMERS: lambda: Implementation(anchors.rms_norm),
        }
    )
    rms = Op(RMS, ("x", "weight"), ("y",), TRANSFORMERS, _rms_exact, found, missing)
    found, missing = anchors.load(
        {
            OURS: lambda: Implementation(lambda x, w, b: layer_ours(x, w, b, EPS)),
            TORCH_LAYER: lambda: Implementation(anchors.torch_layer_norm),
            LIGER: anchors.liger_layer_norm,
            QUACK: anchors.quack_layer_norm,
            COMPILE: lambda: anchors.compiled(anchors.torch_layer_norm),
        }
    )
    layer = Op(LAYER, ("x", "weight", "bias"), ("y",), TORCH_LAYER, _layer_exact, found, missing)
    found, missing = anchors.load(
        {
            OURS: lambda: Implementation(lambda x, r, w: ours(x, w, EPS, residual=r)),
            "add, " + TORCH_RMS: lambda: Implementation(anchors.torch_add_rms_norm),
            LIGER: anchors.liger_add_rms_norm,
            QUACK: anchors.quack_add_rms_norm,
            COMPILE: lambda: anchors.compiled(anchors.add_rms_norm),
            TRANSFORMERS: lambda: Implementation(anchors.add_rms_norm),
        }
    )
    names = ("x", "residual", "weight")
    add = Op(ADD, names, ("y", "sum"), TRANSFORMERS, _add_exact, found, missing)
    once = {
        OURS: Implementation(lambda x, w: ours(x, w, EPS, round_once=True)),
        TORCH_RMS: Implementation(anchors.torch_rms_norm),
    }
    gemma = {
        OURS: Implementation(lambda x, w: ours(x, w, EPS, zero_centered=True)),
        TRANSFORMERS: Implementation(anchors.gemma_rms_norm),
    }
    return [
        *(rms, layer, add),
        Op(ROUNDED_ONCE, ("x", "weight"), ("y",), TORCH_RMS, _rms_exact, once, {}),
        Op(GEMMA, ("x", "weight"), ("y",), TRANSFORMERS, _gemma_exact, gemma, {}),
    ]


def case(op: str, rows: int, dim: int, in_bars: bool = True) -> Case:
    """One shape of one norm, in bf16."""

    def make(dtype: torch.dtype, device: str) -> Tensors:
        torch.manual_seed(0)
        full = [torch.randn(rows, dim, device=device) for _ in range(2 if op == ADD else 1)]
        weight = torch.rand(dim, device=device) * 0.1 + (0.0 if op == GEMMA else 0.95)
        bias = [torch.randn(dim, device=device)] if op == LAYER else []
        return tuple(t.to(dtype).requires_grad_() for t in (*full, weight, *bias))

    forward, backward = (4, 4) if op == ADD else (2, 3)
    elements = 2 * rows * dim  # bytes of one tensor
    return Case(op, f"{rows}×{dim}", forward * elements, backward * elements, make, in_bars)


def run() -> Report:
    """Measures every implementation of each norm at every shape."""
    report = Report("norms")
    cases = [case(op, *shape) for op in (RMS, LAYER, ADD) for shape in SHAPES]
    cases += [case(op, *SQUARE, in_bars=False) for op in (RMS, LAYER, ADD)]
    cases.append(case(RMS, *HEADS, in_bars=False))
    small = [case(op, *HOST_SHAPE) for op in (RMS, LAYER)]
    errors = [case(op, *ERROR_SHAPE) for op in (RMS, ROUNDED_ONCE, GEMMA, LAYER, ADD)]
    run_cases(report, ops(), cases, small, errors, ops("auto"))
    return report
