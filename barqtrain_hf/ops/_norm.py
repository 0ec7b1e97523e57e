"""Host side of ``cuda/norm.cuh``: what `rms_norm` and `layer_norm` share on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops import _backend
from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.runtime import Kernel, sm_count

_MAX_THREADS, _MAX_BACKWARD = 512, 640  # kMaxThreads and the most of kMaxBackward of norm.cuh
_WARP = 32
# Rounding of norm.cuh.
LLAMA, ZERO_CENTERED, ONCE = range(3)
Pair = tuple[torch.Tensor, torch.Tensor]


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


def small(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's fused norm is the better kernel, and the same function."""
    return (
        _backend.small(x)
        and x.dtype is weight.dtype
        and x.dtype in CUDA_NAMES
        and not torch.is_autocast_enabled("cuda")  # there PyTorch's norms return fp32
    )


def check_shapes(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Refuses tensors that do not fit x of [..., D], D > 0."""
    if x.dim() == 0 or weight.shape != x.shape[-1:] or weight.shape[0] == 0:
        raise ArgumentError(
            f"{op}: weight of shape {tuple(weight.shape)} does not match the last dimension "
            f"of x of shape {tuple(x.shape)}; it must be [D], D > 0."
        )
    for name, tensor, like in (("bias", bias, weight), ("residual", residual, x)):
        if tensor is not None and (tensor.shape != like.shape or tensor.dtype is not like.dtype):
            raise ArgumentError(
                f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {like.dtype} "
                f"{tuple(like.shape)}."
            )


def unsupported(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    device = x.get_device()
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.get_device() != device:
            return f"{name} is on {tensor.device} and x on {x.device}."
    if x.dtype is not weight.dtype and torch.float32 not in (x.dtype, weight.dtype):
        return f"x is {x.dtype} and weight {weight.dtype}; one of them must be float32."
    return None


def apply(
    norm: Norm,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> Any:
    """y, or y and h, through the kernels."""
    if norm.x is torch.float32 and norm.weight is not torch.float32:
        # Exact, and it saves a set of kernels for 16-bit weights of an fp32 stream.
        weight, bias = weight.float(), None if bias is None else bias.float()
        norm = norm._replace(weight=torch.float32)
    if residual is not None and norm.weight is not norm.x:
        x, residual = x + residual, None
        return _apply(norm, x, weight, bias, None, eps), x
    return _apply(norm, x, weight, bias, residual, eps)


def _apply(
    norm: Norm,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> Any:
    if torch.compiler.is_compiling():
        y, h, _ = torch.ops.barq.norm(x, weight, bias, residual, eps, *_describe(norm))
        return y if residual is None else (y, h)
    return _Norm.apply(x, weight, bias, residual, norm, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        norm: Norm,
        eps: float,
    ) -> Any:
        x, weight = x.contiguous(), weight.contiguous()
        y, h, stats = _forward(norm, x, weight, bias, residual, eps)
        if stats is None:
            ctx.save_for_backward(h, weight)
        else:
            ctx.save_for_backward(h, weight, stats)
        ctx.norm, ctx.eps, ctx.bias = norm, eps, bias is not None
        if residual is None:
            return y
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None = None) -> Any:
        needed = ctx.needs_input_grad
        if dy is None:
            return dh, None, None, dh if needed[3] else None, None, None
        h, weight, *stats = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient's own graph, through the reference
            dx, dw, db = _differentiable(ctx.norm, dy, dh, h, weight, ctx.eps)
        else:
            mean = stats[0] if stats else None
            weight_grad = needed[1] or needed[2]
            dx, dw, db = _backward(ctx.norm, dy, dh, h, weight, mean, ctx.eps, weight_grad)
        return (
            dx,
            dw if needed[1] else None,
            db if needed[2] else None,
            dx if needed[3] else None,
            None,
            None,
        )


def _differentiable(
    norm: Norm,
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, weight = (t if t.requires_grad else t.detach().requires_grad_() for t in (h, weight))
    y = norm.reference(h, weight, eps).to(dy.dtype)
    dx, dw = torch.autograd.grad(y, (h, weight), dy, create_graph=True)
    db = dy.flatten(0, -2).float().sum(0).to(weight.dtype)
    return dx if dh is None else dx + dh, dw, db


def _forward(
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
        threads = layout.groups * layout.width
        grid, block = (-(-rows // layout.groups), 1, 1), (threads, 1, 1)
        scalars = (rows, dim, layout.width, eps, norm.rounding)
        kernel.launch(x.get_device(), grid, block, *addresses, *scalars)
    return y, h, stats


def _backward(
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


@functools.cache
def _forward_kernel(norm: Norm, residual: bool, dim: int, aligned: bool) -> tuple[Kernel, _Layout]:
    vec = 16 // norm.x.itemsize
    max_items = 4 if norm.weight is norm.x is norm.out else 2
    layout = _layout(dim, vec, max_items, 128)
    if layout.width > _WARP:
        layout = layout._replace(groups=1)
    if not aligned:
        layout = layout._replace(vec=1, items=0, width=max(_WARP, layout.width), groups=1)
    name = f"norm_forward<{_template(norm, residual, layout)}>"
    parameters = {
        "x": norm.x,
        "residual": norm.x,
        "w": norm.weight,
        "b": norm.weight,
        "y": norm.out,
        "h": norm.x,
        "stats": torch.float32,
        **_SCALARS,
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
        **_SCALARS,
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


_SCALARS = {
    "rows": "int64",
    "dim": "int32",
    "width": "int32",
    "eps": "float32",
    "rounding": "int32",
}


def _template(norm: Norm, residual: bool, layout: _Layout) -> str:
    flags = ",".join(str(flag).lower() for flag in (norm.layer, residual))
    types = ",".join(CUDA_NAMES[dtype] for dtype in (norm.x, norm.weight, norm.out))
    return f"{flags},{types},{layout.vec},{layout.items}"


# torch.compile traces these instead of the Function above: opaque to it, so no graph break. A Norm is
# told by two plain values: its rounding, or -1 for a layer norm, and the output dtype.
def _describe(norm: Norm) -> tuple[int, torch.dtype]:
    return -1 if norm.layer else norm.rounding, norm.out


def _norm_of(x: torch.Tensor, weight: torch.Tensor, kind: int, out: torch.dtype) -> Norm:
    layer = kind < 0
    return Norm(layer, ONCE if layer else kind, x.dtype, weight.dtype, out, _no_reference)


def _no_reference(*_: Any) -> torch.Tensor:
    raise NotImplementedError("a compiled norm has no second derivative")


@torch.library.custom_op("barq::norm", mutates_args=(), device_types="cuda")
def _norm_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    kind: int,
    out: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norm = _norm_of(x, weight, kind, out)
    x, weight = x.contiguous(), weight.contiguous()
    y, h, stats = _forward(norm, x, weight, bias, residual, eps)
    # An output may not be an input, nor None.
    return y, x.new_empty(0) if residual is None else h, y.new_empty(0) if stats is None else stats


@_norm_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    kind: int,
    out: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=out, device=x.device)
    h = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = x.new_empty((x.numel() // x.shape[-1], 2), dtype=torch.float32)
    return y, h, stats if kind < 0 else y.new_empty(0)


@torch.library.custom_op("barq::norm_backward", mutates_args=(), device_types="cuda")
def _norm_backward_op(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    eps: float,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norm = _norm_of(h, weight, kind, dy.dtype)
    h, weight = h.contiguous(), weight.contiguous()
    mean = stats if norm.layer else None
    dx, dw, db = _backward(norm, dy, dh, h, weight, mean, eps, True)
    assert dw is not None
    return dx, dw, dw.new_empty(0) if db is None else db


@_norm_backward_op.register_fake
def _(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    eps: float,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    db = torch.empty(weight.shape if kind < 0 else (0,), dtype=weight.dtype, device=weight.device)
    return dx, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, residual, eps, kind, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.eps, ctx.kind, ctx.bias, ctx.residual = eps, kind, bias is not None, residual is not None


def _op_backward(ctx: Any, dy: torch.Tensor, dh: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    h, weight, stats = ctx.saved_tensors
    more = dh if ctx.residual else None
    dx, dw, db = torch.ops.barq.norm_backward(dy, more, h, weight, stats, ctx.eps, ctx.kind)
    grads = (dx, dw, db if ctx.bias else None, dx if ctx.residual else None)
    return *grads, None, None, None


_norm_op.register_autograd(_op_backward, setup_context=_setup_context)
