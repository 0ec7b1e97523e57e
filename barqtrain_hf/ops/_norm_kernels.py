"""Host side of ``cuda/norm_forward.cuh`` and ``cuda/norm_backward.cuh``: layouts and launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.runtime import Kernel, sm_count

_MAX_THREADS, _MAX_BACKWARD = 512, 640  # kMaxThreads and the most of kMaxBackward of norm.cuh
_WARP = 32
# Rounding of norm.cuh.
LLAMA, ZERO_CENTERED, ONCE = range(3)


class Norm(NamedTuple):
    """One kind of normalisation; hashable, so that everything that follows from it is found once."""

    layer: bool
    rounding: int
    x: torch.dtype
    weight: torch.dtype
    out: torch.dtype
    reference: Callable[..., Any]

    @property
    def source(self) -> str:
        return "layer_norm.cu" if self.layer else "rms_norm.cu"


class _Layout(NamedTuple):
    vec: int  # elements of a vector
    items: int  # vectors a thread holds; 0: the row is read twice
    width: int  # threads of a row
    groups: int  # rows of a block


def forward(
    norm: Norm,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y, h (x itself without a residual) and, for a layer norm, mean and r of each row."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    y = torch.empty_like(x) if norm.out is norm.x else torch.empty_like(x, dtype=norm.out)
    addresses = [x.data_ptr(), 0, weight.data_ptr(), 0, y.data_ptr(), 0, 0]
    h, stats = x, None
    if residual is not None:
        residual = residual.contiguous()
        h = torch.empty_like(x)
        addresses[1], addresses[5] = residual.data_ptr(), h.data_ptr()
    if bias is not None:
        bias = bias.contiguous()
        addresses[3] = bias.data_ptr()
    if norm.layer:
        stats = x.new_empty((rows, 2), dtype=torch.float32)
        addresses[6] = stats.data_ptr()
    if rows:
        aligned = not (addresses[0] | addresses[1] | addresses[2] | addresses[3]) % 16
        kernel, layout = _forward_kernel(norm, residual is not None, dim, aligned)
        grid, block = (-(-rows // layout.groups), 1, 1), (layout.width, layout.groups, 1)
        kernel.launch(x.get_device(), grid, block, *addresses, rows, dim, eps, norm.rounding)
    return y, h, stats


def backward(
    norm: Norm,
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor | None,
    eps: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of h, weight and bias; the last two are None where not asked for."""
    dy = dy.contiguous()
    dim = h.shape[-1]
    rows = h.numel() // dim
    device = h.get_device()
    dx = torch.empty_like(h)
    addresses = [dy.data_ptr(), 0, h.data_ptr(), weight.data_ptr(), 0, dx.data_ptr(), 0]
    if dh is not None:
        dh = dh.contiguous()
        addresses[1] = dh.data_ptr()
    if stats is not None:
        addresses[4] = stats.data_ptr()
    dw = db = None
    if weight_grad:
        dw = torch.empty_like(weight)
        db = torch.empty_like(weight) if norm.layer else None
    if rows == 0:
        for grad in (dw, db):
            if grad is not None:
                grad.zero_()
        return dx, dw, db
    aligned = not (addresses[0] | addresses[1] | addresses[2] | addresses[3]) % 16
    kernel, layout = _backward_kernel(norm, dh is not None, dim, aligned)
    # A block per SM: more would only add rows of partial sums. A block that reads its rows twice holds
    # little, so that two fit.
    blocks = min(-(-rows // layout.groups), sm_count(device) * (1 if layout.items else 2))
    if dw is not None:
        sets = 1 if db is None else 2
        partial = dx.new_empty((sets, blocks, dim), dtype=torch.float32)
        addresses[6] = partial.data_ptr()
    block = (layout.groups * layout.width, 1, 1)
    scalars = (rows, dim, layout.width, eps, norm.rounding)
    kernel.launch(device, (blocks, 1, 1), block, *addresses, *scalars)
    if dw is not None:
        grid = (-(-dim // _WARP), sets, 1)
        ends = (addresses[6], dw.data_ptr(), 0 if db is None else db.data_ptr(), blocks, dim)
        _column_sum_kernel(norm, 1 if dim % 4 else 4).launch(device, grid, (1024, 1, 1), *ends)
    return dx, dw, db


def _layout(dim: int, vec: int, max_items: int, threads: int) -> _Layout:
    """How a row is spread; ``threads`` is how many a block should have where a row needs fewer."""
    vectors = dim // vec
    if dim % vec or vectors > max_items * _MAX_THREADS:
        width = min(_MAX_THREADS, max(_WARP, -(-dim // _WARP) * _WARP))
        return _Layout(1 if dim % vec else vec, 0, width, 1)
    if vectors <= _WARP:
        width = 1 << (vectors - 1).bit_length()
        return _Layout(vec, 1, width, max(1, threads // width))
    # Two vectors a thread: more bytes in flight, fewer threads to wait for each other.
    items = 2 if vectors <= 2 * _MAX_THREADS else 4
    width = -(-vectors // (items * _WARP)) * _WARP
    # A block has 15 barriers for groups wider than a warp.
    groups = threads // width if items <= 2 else 1
    return _Layout(vec, items, width, max(1, min(groups, 15) if width > _WARP else groups))


def _forward_layout(dim: int, vec: int, residual: bool) -> _Layout:
    """How norm_forward spreads a row where x, weight and y are of one dtype."""
    layout, vectors = _layout(dim, vec, 4, 128), dim // vec
    if not layout.items or vectors <= _WARP:
        return layout
    # Blocks as kForwardThreads of norm_forward.cuh: 1024, 256 and 512 threads for 1, 2 and 4 vectors each.
    if residual:
        items = 1 if vectors <= 1024 else 4
    else:  # four where no lane is left without
        items = 4 if vectors > 512 or (vectors > 256 and vectors % (4 * _WARP) == 0) else 2
    width = -(-vectors // (items * _WARP)) * _WARP
    return _Layout(vec, items, width, 4 if width == _WARP else 1)


@functools.cache
def _forward_kernel(norm: Norm, residual: bool, dim: int, aligned: bool) -> tuple[Kernel, _Layout]:
    vec = 16 // norm.x.itemsize
    if norm.weight is norm.x is norm.out:
        layout = _forward_layout(dim, vec, residual)
    else:  # registers for two vectors only
        layout = _layout(dim, vec, 2, 128)
        layout = layout._replace(groups=1 if layout.width > _WARP else layout.groups)
    if not aligned:
        width = min(_MAX_THREADS, max(_WARP, layout.width))
        layout = layout._replace(vec=1, items=0, width=width, groups=1)
    name = f"norm_forward<{_template(norm, residual, layout)}>"
    parameters = {
        "x": norm.x,
        "residual": norm.x,
        "w": norm.weight,
        "b": norm.weight,
        "y": norm.out,
        "h": norm.x,
        "stats": torch.float32,
        "rows": "int64",
        "dim": "int32",
        "eps": "float32",
        "rounding": "int32",
    }
    return Kernel(norm.source, name, parameters), layout


@functools.cache
def _backward_kernel(norm: Norm, residual: bool, dim: int, aligned: bool) -> tuple[Kernel, _Layout]:
    vec = 16 // norm.x.itemsize
    # What registers can hold: vectors of fp32 have half as many elements.
    max_items = 4 if norm.x is torch.float32 else 2
    # kMaxBackward of norm.cuh.
    layout = _layout(dim, vec, max_items, _MAX_THREADS if norm.layer or residual else _MAX_BACKWARD)
    if not aligned:
        layout = layout._replace(vec=1, items=0, width=max(_WARP, layout.width), groups=1)
    name = f"norm_backward<{_template(norm, residual, layout)}>"
    parameters = {
        "dy": norm.out,
        "dh": norm.x,
        "h": norm.x,
        "w": norm.weight,
        "stats": torch.float32,
        "dx": norm.x,
        "partial": torch.float32,
        "rows": "int64",
        "dim": "int32",
        "width": "int32",
        "eps": "float32",
        "rounding": "int32",
    }
    return Kernel(norm.source, name, parameters), layout


@functools.cache
def _column_sum_kernel(norm: Norm, vec: int) -> Kernel:
    parameters: dict[str, torch.dtype | str] = {
        "partial": torch.float32,
        "dw": norm.weight,
        "db": norm.weight,
        "parts": "int32",
        "dim": "int32",
    }
    return Kernel(norm.source, f"column_sum<{CUDA_NAMES[norm.weight]},{vec}>", parameters)


def _template(norm: Norm, residual: bool, layout: _Layout) -> str:
    flags = ",".join(str(flag).lower() for flag in (norm.layer, residual))
    types = ",".join(CUDA_NAMES[dtype] for dtype in (norm.x, norm.weight, norm.out))
    return f"{flags},{types},{layout.vec},{layout.items}"
