"""What `rms_norm` and `layer_norm` share: checks, autograd and torch.compile around the kernels."""

from __future__ import annotations

from typing import Any

import torch

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops import _backend
from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.ops._norm_kernels import ONCE, Norm, backward, forward

# Bound once: beside F.rms_norm and F.layer_norm, `small` has some tenths of a microsecond.
_is_autocast_enabled, _is_compiling = torch.is_autocast_enabled, torch.compiler.is_compiling


def small(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's fused norm is the better kernel, as `_backend.small`, and the same function."""
    dtype = x.dtype
    return (
        x.is_cuda
        and dtype is weight.dtype
        and weight.dim() == 1
        and dtype in CUDA_NAMES
        and not _is_autocast_enabled()  # there PyTorch's norms return fp32
        and not _is_compiling()  # before the size, of which it would make a guard
        and x.numel() <= _backend.SMALL
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
    # Outside the Function, so that autograd knows of the copies it may save.
    x, weight = x.contiguous(), weight.contiguous()
    if residual is not None and not (norm.weight is norm.x is norm.out):
        x = x + residual
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
        y, h, stats = forward(norm, x, weight, bias, residual, eps)
        if stats is None:
            ctx.save_for_backward(h, weight)
        else:
            ctx.save_for_backward(h, weight, stats)
        ctx.norm, ctx.eps = norm, eps
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
            dx, dw, db = backward(ctx.norm, dy, dh, h, weight, mean, ctx.eps, weight_grad)
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
    db = dy.reshape(-1, dy.shape[-1]).float().sum(0).to(weight.dtype)
    return dx if dh is None else dx + dh, dw, db


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
    y, h, stats = forward(norm, x, weight, bias, residual, eps)
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
    dx, dw, db = backward(norm, dy, dh, h, weight, mean, eps, True)
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
