"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), bit-compatible in rounding with transformers.

    r = 1 / sqrt(mean(x^2, -1) + eps)
    llama:                     y = weight * (x * r).to(x.dtype)
    zero_centered (Gemma):     y = (x * r * (1 + weight)).to(x.dtype)
    dx = r * (g - xhat * mean(g * xhat)),  g = dy * weight or dy * (1 + weight),  xhat = x * r
    dweight = sum over rows of dy * xhat

Everything between load and store is fp32. A [N, D] input costs 2·N·D elements of memory traffic
forward and 3·N·D backward in ``cuda/rms_norm.cu``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops._backend import CUDA_NAMES, Backend, check_dtype, use_cuda
from barqtrain_hf.runtime import Kernel, sm_count

_MAX_THREADS = 512  # kMaxThreads of the kernels
_WARP = 32


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    zero_centered: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension, scaled by ``weight``.

    Args:
        x: [..., D], fp32, fp16 or bf16, any strides.
        weight: [D], fp32, fp16 or bf16; may differ from x's dtype.
        eps: added to the mean of squares.
        zero_centered: scale by ``1 + weight`` in fp32 and round once, as Gemma does.
        backend: "cuda" for the kernel, "torch" for the reference, "auto" for the kernel where it runs.

    Returns:
        [..., D] in x's dtype if ``zero_centered``, else in the promoted dtype of x and weight
        (bf16 x with fp32 weight gives fp32, as in transformers).

    Raises:
        ArgumentError: weight is not [D].
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"`` where the kernel cannot run.
    """
    check_dtype("rms_norm", "x", x)
    check_dtype("rms_norm", "weight", weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:] or x.shape[-1] == 0:
        raise ArgumentError(
            f"rms_norm: weight of shape {tuple(weight.shape)} does not match the last dimension "
            f"of x of shape {tuple(x.shape)}; it must be [D], D > 0."
        )
    if not use_cuda("rms_norm", backend, x, _unsupported(x, weight)):
        return rms_norm_reference(x, weight, eps, zero_centered=zero_centered)
    if torch.compiler.is_compiling():
        y, _ = torch.ops.barq.rms_norm(x, weight, float(eps), zero_centered)
        return y  # type: ignore[no-any-return]
    return _RMSNorm.apply(x, weight, float(eps), zero_centered)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centered: bool = False
) -> torch.Tensor:
    """The definition in plain PyTorch; same arguments and result as :func:`rms_norm`."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if zero_centered:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def _unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    if weight.device != x.device:
        return f"weight is on {weight.device} and x on {x.device}."
    if x.dtype is not weight.dtype and torch.float32 not in (x.dtype, weight.dtype):
        return f"x is {x.dtype} and weight {weight.dtype}; one of them must be float32."
    return None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
    ) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = _forward(x, weight, eps, zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[1]
        dx, dweight = _backward(dy.contiguous(), x, weight, rstd, ctx.zero_centered, weight_grad)
        return dx, dweight if weight_grad else None, None, None


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dim = x.shape[-1]
    rows = x.numel() // dim
    out_dtype = x.dtype if zero_centered else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty_like(x, dtype=out_dtype)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        vec, items, width = _layout(dim, x.dtype, 2, 4, _aligned(x) and _aligned(weight))
        threads = max(width, 128) if width <= _WARP else width
        grid = -(-rows // (threads // width))
        kernel = _forward_kernel(x.dtype, weight.dtype, out_dtype, vec, items)
        scalars = (rows, dim, width, eps, int(zero_centered))
        kernel((grid, 1, 1), (threads, 1, 1), x, weight, y, rstd, *scalars)
    return y, rstd


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    zero_centered: bool,
    weight_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight; the second is left unwritten where ``weight_grad`` is False."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    dx = torch.empty_like(x)
    dweight = torch.empty_like(weight)
    if rows == 0:
        return dx, dweight.zero_()
    max_items = 2 if x.dtype is not torch.float32 and weight.dtype is torch.float32 else 4
    aligned = _aligned(x) and _aligned(weight) and _aligned(dy)
    vec, items, width = _layout(dim, x.dtype, max_items, max_items, aligned)
    threads = max(width, 128) if width <= _WARP else width
    groups = threads // width
    # Enough blocks to give every SM 512 threads: more would only add rows of partial sums.
    blocks = min(-(-rows // groups), sm_count(x.get_device()) * max(1, 512 // threads))
    parts = blocks * (threads // max(width, _WARP))
    partial = torch.empty(parts, dim, dtype=torch.float32, device=x.device)
    kernel = _backward_kernel(x.dtype, weight.dtype, dy.dtype, vec, items)
    scalars = (rows, dim, width, int(zero_centered))
    kernel((blocks, 1, 1), (threads, 1, 1), dy, x, weight, rstd, dx, partial, *scalars)
    if weight_grad:
        grid = (-(-dim // _WARP), 1, 1)
        _column_sum_kernel(weight.dtype)(grid, (_WARP, _WARP, 1), partial, dweight, parts, dim)
    return dx, dweight


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


@functools.cache
def _layout(
    dim: int, dtype: torch.dtype, items: int, max_items: int, aligned: bool
) -> tuple[int, int, int]:
    """Vector length, vectors a thread holds (0: none, the row is read twice), threads per row.

    ``items`` is what a thread should hold: more bytes in flight, fewer threads to wait for each other.
    Backward is fastest with 4; forward with 2 until a row would need more than 256 threads.
    """
    vec = 16 // dtype.itemsize
    if not aligned or dim % vec:
        return 1, 0, _threads(dim, _WARP)
    vectors = dim // vec
    if vectors <= _WARP:
        return vec, 1, _threads(vectors, 1)
    if vectors > items * 256:
        items = max_items
    if vectors > items * _MAX_THREADS:
        return vec, 0, _MAX_THREADS
    return vec, items, _threads(-(-vectors // items), _WARP)


def _threads(wanted: int, at_least: int) -> int:
    power_of_two: int = 1 << (wanted - 1).bit_length()
    return min(max(power_of_two, at_least), _MAX_THREADS)


@functools.cache
def _forward_kernel(
    x: torch.dtype, weight: torch.dtype, out: torch.dtype, vec: int, items: int
) -> Kernel:
    types = f"{CUDA_NAMES[x]},{CUDA_NAMES[weight]},{CUDA_NAMES[out]}"
    return Kernel(
        "rms_norm.cu",
        f"rms_norm_forward<{types},{vec},{items}>",
        {
            "x": x,
            "weight": weight,
            "y": out,
            "rstd": torch.float32,
            "rows": "int64",
            "dim": "int32",
            "width": "int32",
            "eps": "float32",
            "zero_centered": "int32",
        },
    )


@functools.cache
def _backward_kernel(
    x: torch.dtype, weight: torch.dtype, dy: torch.dtype, vec: int, items: int
) -> Kernel:
    types = f"{CUDA_NAMES[x]},{CUDA_NAMES[weight]},{CUDA_NAMES[dy]}"
    return Kernel(
        "rms_norm.cu",
        f"rms_norm_backward<{types},{vec},{items}>",
        {
            "dy": dy,
            "x": x,
            "weight": weight,
            "rstd": torch.float32,
            "dx": x,
            "partial": torch.float32,
            "rows": "int64",
            "dim": "int32",
            "width": "int32",
            "zero_centered": "int32",
        },
    )


@functools.cache
def _column_sum_kernel(out: torch.dtype) -> Kernel:
    parameters = {"partial": torch.float32, "out": out, "parts": "int32", "dim": "int32"}
    return Kernel("rms_norm.cu", f"column_sum<{CUDA_NAMES[out]}>", parameters)


# torch.compile traces these instead of the Function above: opaque to it, so no graph break.
@torch.library.custom_op("barq::rms_norm", mutates_args=(), device_types="cuda")
def _rms_norm_op(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x.contiguous(), weight.contiguous(), eps, zero_centered)


@_rms_norm_op.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out_dtype = x.dtype if zero_centered else torch.promote_types(x.dtype, weight.dtype)
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), rstd


@torch.library.custom_op("barq::rms_norm_backward", mutates_args=(), device_types="cuda")
def _rms_norm_backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(dy.contiguous(), x.contiguous(), weight.contiguous(), rstd, zero_centered)


@_rms_norm_backward_op.register_fake
def _(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, zero_centered = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.zero_centered = zero_centered


def _op_backward(ctx: Any, dy: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    dx, dweight = torch.ops.barq.rms_norm_backward(dy, *ctx.saved_tensors, ctx.zero_centered)
    return dx, dweight, None, None


_rms_norm_op.register_autograd(_op_backward, setup_context=_setup_context)
