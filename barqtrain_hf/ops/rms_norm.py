"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), bit-compatible in rounding with transformers.

    h = x + residual                       rounded to x's dtype, as a separate addition would be
    r = 1 / sqrt(mean(h^2, -1) + eps)
    llama:                     y = weight * (h * r).to(x.dtype)
    zero_centered (Gemma):     y = (h * r * (1 + weight)).to(x.dtype)
    round_once (OLMo 2):       y = (h * r * weight).to(x.dtype)
    dh = r * (g - hhat * mean(g * hhat)),  g = dy * weight or dy * (1 + weight),  hhat = h * r
    dweight = sum over rows of dy * hhat

Everything between load and store is fp32. A [N, D] input costs 2·N·D elements of memory traffic
forward and 3·N·D backward in ``cuda/rms_norm.cu``, and 4·N·D each with a residual. Up to 2^20 elements on a
GPU, where host time is all that counts, PyTorch's own kernel runs, which rounds once; ``backend="cuda"``
does not take it.
"""

from __future__ import annotations

import functools
from typing import overload

import torch

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops import _norm
from barqtrain_hf.ops._backend import Backend, cached, check_dtypes, use_cuda
from barqtrain_hf.ops._norm_kernels import LLAMA, ONCE, ZERO_CENTERED, Norm

# What torch.rms_norm comes to for a weight of x's dtype: a microsecond of its own checks less, of which there
# are none to spare beside F.rms_norm. Before 2.9 the name was another function's.
_FUSED = torch.__version__ >= "2.9" and hasattr(torch, "_fused_rms_norm")


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    residual: None = ...,
    zero_centered: bool = ...,
    round_once: bool = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    zero_centered: bool = ...,
    round_once: bool = ...,
    backend: Backend = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    zero_centered: bool = False,
    round_once: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square normalisation over the last dimension, scaled by ``weight``.

    Args:
        x: [..., D], fp32, fp16 or bf16, any strides.
        weight: [D], fp32, fp16 or bf16; may differ from x's dtype.
        eps: added to the mean of squares.
        residual: [..., D] of x's dtype, added to x first.
        zero_centered: scale by ``1 + weight`` in fp32 and round once, as Gemma does.
        round_once: scale in fp32 and round once, as OLMo 2 does.
        backend: "cuda" for the kernel, "torch" for the reference, "auto" for the kernel where it runs.

    Returns:
        [..., D] in x's dtype if ``zero_centered`` or ``round_once``, else in the promoted dtype of x and
        weight (bf16 x with fp32 weight gives fp32, as in transformers). With ``residual`` a pair of it and
        x + residual in x's dtype.

    Raises:
        ArgumentError: weight is not [D], residual is not like x, both roundings asked for.
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"`` where the kernel cannot run.
    """
    if backend == "auto" and residual is None and not zero_centered and _norm.small(x, weight):
        try:
            if _FUSED:
                return torch._fused_rms_norm(x, weight.shape, weight, eps)[0]  # type: ignore[no-any-return]
            return torch.rms_norm(x, weight.shape, weight, eps)
        except RuntimeError:  # shapes that do not fit: said below, in our words
            pass
    norm = _kind(x.dtype, weight.dtype, zero_centered, round_once)
    _norm.check_shapes("rms_norm", x, weight, None, residual)
    if use_cuda("rms_norm", backend, x, _norm.unsupported(x, weight, None, residual)):
        return _norm.apply(norm, x, weight, None, residual, eps)  # type: ignore[no-any-return]
    return rms_norm_reference(
        x, weight, eps, residual=residual, zero_centered=zero_centered, round_once=round_once
    )


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    zero_centered: bool = False,
    round_once: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain PyTorch; same arguments and result as :func:`rms_norm`."""
    h = x if residual is None else x + residual
    normed = h.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if zero_centered:
        y = (normed * (1.0 + weight.float())).to(x.dtype)
    elif round_once:
        y = (normed * weight.float()).to(x.dtype)
    else:
        y = weight * normed.to(x.dtype)
    return y if residual is None else (y, h)


@cached
def _kind(x: torch.dtype, weight: torch.dtype, zero_centered: bool, round_once: bool) -> Norm:
    check_dtypes("rms_norm", x=x, weight=weight)
    if zero_centered and round_once:
        raise ArgumentError("rms_norm: zero_centered rounds once already; drop round_once=True.")
    reference = functools.partial(
        rms_norm_reference, zero_centered=zero_centered, round_once=round_once
    )
    if zero_centered:
        return Norm(False, ZERO_CENTERED, x, weight, x, reference)
    if round_once:
        return Norm(False, ONCE, x, weight, x, reference)
    out = torch.promote_types(x, weight)
    return Norm(False, LLAMA, x, weight, out, reference)
