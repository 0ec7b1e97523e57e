"""SwiGLU, GeGLU and GELU beside all rivals: bandwidth, host time, errors.

The bytes counted: gate, up in, y out forward, dy, gate, up in, both gradients out backward: 3·N·I and 5·N·I
elements; GELU alone 2·N·I and 3·N·I. A rival that saves a product to read it again pays for it in its time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from barqtrain_hf.benchmarks import elementwise_anchors as anchors
from barqtrain_hf.benchmarks.elementwise import OURS, Case, Op, run_cases
from barqtrain_hf.benchmarks.elementwise_anchors import COMPILE, LIGER, Implementation, Tensors
from barqtrain_hf.benchmarks.harness import Report
from barqtrain_hf.ops import geglu, gelu, swiglu
from barqtrain_hf.ops._backend import Backend

SWIGLU, HALVES = "SwiGLU", "SwiGLU, halves of one tensor"
GEGLU_TANH, GEGLU = "GeGLU, tanh", "GeGLU, exact"
GELU_TANH, GELU = "GELU, tanh", "GELU, exact"
EAGER = "PyTorch, eager"

ROWS, WIDTHS = 16384, (8192, 14336)
HOST_SHAPE = (64, 256)
ERROR_SHAPE = (1031, 2000)


def _halved(function: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda both: function(*both.chunk(2, dim=-1))


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _geglu_tanh(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate) * up


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def ops(backend: Backend = "cuda") -> list[Op]:
    """Each activation with all implementations found here."""
    gated, alone = ("gate", "up"), ("x",)
    ours_swiglu, ours_geglu = partial(swiglu, backend=backend), partial(geglu, backend=backend)
    ours_exact = partial(ours_geglu, approximate="none")
    ours_gelu = partial(gelu, backend=backend)
    ours_gelu_tanh = partial(ours_gelu, approximate="tanh")
    return [
        _op(SWIGLU, gated, ours_swiglu, _swiglu, anchors.liger_swiglu),
        _op(GEGLU_TANH, gated, ours_geglu, _geglu_tanh, anchors.liger_geglu),
        _op(GEGLU, gated, ours_exact, _geglu),
        _op(HALVES, ("both",), ours_swiglu, _halved(_swiglu), anchors.liger_swiglu_halves),
        _op(GELU_TANH, alone, ours_gelu_tanh, _gelu_tanh),
        _op(GELU, alone, ours_gelu, _gelu),
    ]


def _op(
    name: str,
    inputs: tuple[str, ...],
    ours: Callable[..., torch.Tensor],
    stock: Callable[..., torch.Tensor],
    liger: Callable[[], Implementation] | None = None,
) -> Op:
    found, missing = anchors.load(
        {
            OURS: lambda: Implementation(ours),
            EAGER: lambda: Implementation(stock),
            **({LIGER: liger} if liger is not None else {}),
            COMPILE: lambda: anchors.compiled(stock),
        }
    )
    return Op(name, inputs, ("y",), EAGER, stock, found, missing)  # in fp64 stock is exact


def case(op: str, rows: int, width: int, in_bars: bool = True) -> Case:
    """One shape of one activation, in bf16."""

    def make(dtype: torch.dtype, device: str) -> Tensors:
        torch.manual_seed(0)
        if op == HALVES:
            shapes = [(rows, 2 * width)]
        else:
            shapes = [(rows, width)] * (1 if op in (GELU, GELU_TANH) else 2)
        tensors = (torch.randn(*shape, device=device) for shape in shapes)
        return tuple(t.to(dtype).requires_grad_() for t in tensors)

    forward, backward = (2, 3) if op in (GELU, GELU_TANH) else (3, 5)
    elements = 2 * rows * width  # bytes of one tensor
    return Case(op, f"{rows}×{width}", forward * elements, backward * elements, make, in_bars)


def run() -> Report:
    """Measures every implementation of each activation at every shape."""
    report = Report("glu")
    names = (SWIGLU, GEGLU_TANH, GEGLU, HALVES, GELU_TANH, GELU)
    cases = [case(op, ROWS, i, op not in (GELU_TANH, GELU)) for op in names for i in WIDTHS]
    small = [case(op, *HOST_SHAPE) for op in (SWIGLU, GEGLU_TANH, GELU)]
    errors = [case(op, *ERROR_SHAPE) for op in names]
    run_cases(report, ops(), cases, small, errors, ops("auto"))
    return report
