"""LayerNorm (Ba et al. 2016, arXiv:1607.06450), optionally after adding a residual.

    h = x + residual                     rounded to x's dtype, as a separate addition would be
    y = (h - mean) * r * weight + bias   r = 1 / sqrt(var(h, -1) + eps)

Everything between load and store is fp32 and rounded once. The kernel sums values and squares in one pass
and, in the rows where those cancel, once more about the mean. Up to 2^20 elements on a GPU, where host time
is all that counts, PyTorch's own kernel runs; ``backend="cuda"`` does not take it.
"""

from __future__ import annotations

import functools
from typing import overload

import torch

from barqtrain_hf.ops import _norm
from barqtrain_hf.ops._backend import Backend, cached, check_dtypes, use_cuda
from barqtrain_hf.ops._norm_kernels import ONCE, Norm


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
    out_dtype: torch.dtype | None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    out_dtype: torch.dtype | None = ...,
    backend: Backend = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation over the last dimension.

    Args:
        x: [..., D], fp32, fp16 or bf16, any strides.
        weight: [D], fp32, fp16 or bf16.
        bias: [D] of weight's dtype, or None.
        eps: added to the variance.
        residual: [..., D] of x's dtype, added to x first.
        out_dtype: x's dtype if None; float32 is what F.layer_norm gives under autocast.
        backend: "cuda" for the kernel, "torch" for the reference, "auto" for the kernel where it runs.

    Returns:
        [..., D] in ``out_dtype``; with ``residual`` a pair of it and x + residual in x's dtype.

    Raises:
        ArgumentError: weight, bias or residual of another shape or dtype than stated.
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"`` where the kernel cannot run.
    """
    if backend == "auto" and residual is None and out_dtype is None and _norm.small(x, weight):
        try:
            return torch.layer_norm(x, weight.shape, weight, bias, eps)
        except RuntimeError:  # shapes that do not fit: said below, in our words
            pass
    norm = _kind(x.dtype, weight.dtype, out_dtype)
    _norm.check_shapes("layer_norm", x, weight, bias, residual)
    if use_cuda("layer_norm", backend, x, _unsupported(norm, x, weight, bias, residual)):
        return _norm.apply(norm, x, weight, bias, residual, eps)  # type: ignore[no-any-return]
    return layer_norm_reference(x, weight, bias, eps, residual=residual, out_dtype=out_dtype)


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain PyTorch; same arguments and result as :func:`layer_norm`."""
    h = x if residual is None else x + residual
    wide = h.float()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    if bias is not None:
        y = y + bias.float()
    y = y.to(out_dtype or x.dtype)
    return y if residual is None else (y, h)


def _unsupported(
    norm: Norm,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> str | None:
    if norm.out is not norm.x and norm.out is not torch.float32:
        return f"out_dtype is {norm.out} and x {norm.x}; it must be that or float32."
    if norm.out is norm.x and norm.weight is torch.float32 and norm.x is not torch.float32:
        return f"x and the result are {norm.x} and weight float32; cast one of them."
    return _norm.unsupported(x, weight, bias, residual)


def _definition(
    out_dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    y = layer_norm_reference(x, weight, None, eps, out_dtype=out_dtype)
    assert isinstance(y, torch.Tensor)
    return y


@cached
def _kind(x: torch.dtype, weight: torch.dtype, out_dtype: torch.dtype | None) -> Norm:
    out = out_dtype or x
    check_dtypes("layer_norm", x=x, weight=weight, out_dtype=out)
    return Norm(True, ONCE, x, weight, out, functools.partial(_definition, out))
