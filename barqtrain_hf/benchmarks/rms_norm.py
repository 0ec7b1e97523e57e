"""RMSNorm against eager transformers, torch.compile and F.rms_norm: TB/s of the floor's bytes.

Forward counts 2·N·D elements, backward 3·N·D; both are shown as a share of the copy bandwidth measured
in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from barqtrain_hf.benchmarks.harness import (
    Report,
    Timing,
    copy_bandwidth,
    time_gpu,
    time_graph,
    time_host,
)
from barqtrain_hf.ops import rms_norm
from barqtrain_hf.ops.rms_norm import _backward, _forward, rms_norm_reference

SHAPES = ((16384, 4096), (16384, 2048), (8192, 8192), (32768, 1024), (262144, 128))
_EPS = 1e-6


def _row(
    rows: int, dim: int, implementation: str, forward: Timing, backward: Timing, copy: Timing
) -> dict[str, Any]:
    forward_tb_s = 2 * rows * dim * 2 / 1e9 / forward.median  # two bytes an element, bf16
    backward_tb_s = 3 * rows * dim * 2 / 1e9 / backward.median
    return {
        "rows": rows,
        "dim": dim,
        "implementation": implementation,
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tb_s": forward_tb_s,
        "backward_tb_s": backward_tb_s,
        "forward_share_of_copy": forward_tb_s / copy.median,
        "backward_share_of_copy": backward_tb_s / copy.median,
    }


def run() -> Report:
    """Measures every implementation at every shape in bf16."""
    report = Report("rms_norm")
    copy = copy_bandwidth()
    report.add(implementation="device copy, read + write", forward_tb_s=copy.median)
    # The timed backward passes run repeatedly over one graph.
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(rms_norm_reference)
    implementations: dict[str, Callable[..., torch.Tensor]] = {
        "ours, through autograd": lambda x, w: rms_norm(x, w, _EPS, backend="cuda"),
        "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, _EPS),
        "torch.compile of transformers' forward": lambda x, w: compiled(x, w, _EPS),
        "transformers' forward, eager": lambda x, w: rms_norm_reference(x, w, _EPS),
    }
    for rows, dim in SHAPES:
        x = torch.randn(rows, dim, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn(dim, device="cuda").bfloat16().requires_grad_()
        upstream = torch.randn(rows, dim, device="cuda").bfloat16()
        y, rstd = _forward(x.detach(), weight.detach(), _EPS, False)
        saved = (upstream, x.detach(), weight.detach(), rstd, False)
        forward = time_graph(lambda s=saved: _forward(s[1], s[2], _EPS, False))  # type: ignore[misc]
        backward = time_graph(lambda s=saved: _backward(*s))  # type: ignore[misc]
        alone = "ours, kernels alone in a CUDA graph"
        report.add(**_row(rows, dim, alone, forward, backward, copy))
        del y, rstd, saved
        for name, function in implementations.items():
            forward = time_gpu(lambda f=function, a=x, b=weight: f(a, b))  # type: ignore[misc]
            y = function(x, weight)
            backward = time_gpu(
                lambda y=y, a=x, b=weight, g=upstream: torch.autograd.grad(  # type: ignore[misc]
                    y, (a, b), g, retain_graph=True
                )
            )
            report.add(**_row(rows, dim, name, forward, backward, copy))
            del y
    small = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(256, device="cuda", dtype=torch.bfloat16)
    for name, function in implementations.items():
        with torch.no_grad():
            host = time_host(lambda f=function: f(small, weight))  # type: ignore[misc]
        report.add(rows=64, dim=256, implementation=name, forward_host_us=host)
    return report
