"""Scaled dot-product attention, exact, in tiles (FlashAttention-2: Dao 2023, arXiv:2307.08691).

    S_ij = scale * q_i . k_j          softcap: S_ij = softcap * tanh(scale * q_i . k_j / softcap)
    P_ij = exp(S_ij - lse_i),  lse_i = log(sum over seen j of exp(S_ij)),  o_i = sum_j P_ij v_j
    dv_j = sum_i P_ij do_i,  dS_ij = P_ij (do_i . v_j - do_i . o_i),  and from it dq and dk

i sees j of its own document, with j <= i if causal, and |i - j| < window. Queries and keys may be turned by
RoPE first, and their gradients are turned back. Softmax and sums are fp32; P and dS are rounded to q's dtype
where they are multiplied. The scores are never in memory: a forward pass keeps its output and lse, 4 bytes
for each query and head.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError
from barqtrain_hf.ops import _attention_autograd
from barqtrain_hf.ops._attention_choice import sdpa, sdpa_is_faster
from barqtrain_hf.ops._attention_torch import allowed, attend, attend_documents, weighted
from barqtrain_hf.ops._backend import Backend, cached, check_dtypes, use_cuda
from barqtrain_hf.ops.rope import apply_rope

# Shapes and dtypes of cos and sin.
_Angles = tuple[torch.Size, torch.Size, torch.dtype, torch.dtype]


class Rope(NamedTuple):
    """Angles by which `flash_attention` turns queries and keys, as `apply_rope` does.

    Attributes:
        cos, sin: [B or 1, T, R] for each token, R even and at most D; in q's dtype or fp32. They get no
            gradients from the kernel: if they need any, PyTorch runs.
        interleaved: pair neighbouring dimensions instead of the two halves.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    rope: Rope | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Self-attention, dense or packed, with RoPE inside.

    Args:
        q: [B, T, Hq, D], fp32, fp16 or bf16, any strides.
        k, v: [B, T, Hkv, D] of q's dtype, Hkv a divisor of Hq: query head h reads head h // (Hq / Hkv).
            Under autocast all three are cast to its dtype, as by PyTorch's attention.
        causal: whether a token sees none of those after it.
        scale: of the scores; D ** -0.5 by default.
        cu_seqlens: [documents + 1] int32 on q's device, the first token of each document of a packed row
            (B = 1) and, last, T; documents do not see each other. It is read and checked once for as long
            as the tensor lives unchanged, which costs a device sync: pass all layers the same one.
        max_seqlen: tokens of the longest document, or more. cu_seqlens tells it too.
        window: how many tokens a token sees, itself included, as Hugging Face's ``sliding_window``; if not
            ``causal``, as many after it.
        softcap: bound of the scores, by a tanh.
        rope: turns q and k first; they keep their dtype.
        backend: "cuda" for the kernel, "torch" for PyTorch's kernels, "auto" for ours where it runs, but for
            dense rows where PyTorch's was measured to be faster (Hopper: cuDNN's).

    Returns:
        [B, T, Hq, D] in q's dtype (autocast's if enabled), contiguous.

    Raises:
        ArgumentError: shapes, values, devices or a mix of dtypes that do not fit.
        ArgumentTypeError: q, k, v, cos or sin not fp32, fp16 or bf16, cu_seqlens not int32.
        UnsupportedError: ``backend="cuda"`` where the kernel cannot run; documents in a CUDA graph.
    """
    device_type = "cuda" if q.is_cuda else q.device.type
    autocast = torch.is_autocast_enabled(device_type)
    given = torch.get_autocast_dtype(device_type) if autocast else None
    shape = q.shape
    angles = None if rope is None else _layout_of(rope)
    dtype = _check_layouts(shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, given, angles)
    if autocast:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, shape[0], q.device)
    elif max_seqlen is not None:
        raise ArgumentError(f"flash_attention: max_seqlen={max_seqlen} needs cu_seqlens; drop it.")
    if scale is None:
        scale = shape[3] ** -0.5
    _check_numbers(scale, window, softcap)
    reason, to_sdpa = None, False
    if q.is_cuda and backend != "torch":
        reason = _attention_autograd.unsupported(q, k, v, rope)
        to_sdpa = backend == "auto" and cu_seqlens is None and sdpa_is_faster(q, window, softcap)
    if not to_sdpa and use_cuda("flash_attention", backend, q, reason):
        numbers = (max_seqlen, causal, scale, window, softcap)
        return _attention_autograd.apply(q, k, v, rope, cu_seqlens, *numbers)
    with torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext():
        if rope is not None:
            q, k = _turn(q, k, rope, "torch" if backend == "torch" else "auto")
        if to_sdpa:
            return sdpa(q, k, v, causal, scale)
        if cu_seqlens is None:
            return attend(q, k, v, None, None, causal, scale, window, softcap)
        return attend_documents(q, k, v, cu_seqlens, max_seqlen, causal, scale, window, softcap)


def flash_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    rope: Rope | None = None,
) -> torch.Tensor:
    """The definition in plain PyTorch, with all scores in memory; arguments as of :func:`flash_attention`."""
    if rope is not None:
        q, k = _turn(q, k, rope, "torch")
    tokens = q.shape[1]
    mask = allowed(tokens, causal, window, q.device)
    if cu_seqlens is not None:
        place = torch.arange(tokens, dtype=torch.int32, device=q.device)
        document = torch.bucketize(place, cu_seqlens, right=True)
        same = document[:, None] == document
        mask = same if mask is None else mask & same
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return weighted(q, k, v, mask, scale, softcap).transpose(1, 2).contiguous()


def _turn(
    q: torch.Tensor, k: torch.Tensor, rope: Rope, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin, interleaved = rope
    return apply_rope(
        q, k, cos, sin, interleaved=interleaved, unsqueeze_dim=2, keep_dtype=True, backend=backend
    )


def _layout_of(rope: Rope) -> _Angles:
    if not isinstance(rope, Rope):
        raise ArgumentTypeError(
            f"flash_attention: rope is a {type(rope).__name__}; pass Rope(cos, sin, interleaved)."
        )
    cos, sin, _ = rope
    return cos.shape, sin.shape, cos.dtype, sin.dtype


@cached
def _check_layouts(
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    q: torch.dtype,
    k: torch.dtype,
    v: torch.dtype,
    autocast: torch.dtype | None,
    angles: _Angles | None,
) -> torch.dtype:
    """What is computed in."""
    check_dtypes("flash_attention", q=q, k=k, v=v)
    if autocast is None and not (q is k is v):
        raise ArgumentError(
            f"flash_attention: q is {q}, k {k} and v {v}; cast them to one dtype, as autocast would."
        )
    _check_shapes(q_shape, k_shape, v_shape)
    if angles is not None:
        _check_angles(q_shape, *angles)
    return autocast or q


def _check_shapes(q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size) -> None:
    if (
        len(q_shape) != 4
        or len(k_shape) != 4
        or k_shape != v_shape
        or q_shape[0] != k_shape[0]
        or q_shape[1] != k_shape[1]
        or q_shape[3] != k_shape[3]
        or not q_shape[2]
        or not q_shape[3]
    ):
        raise ArgumentError(
            f"flash_attention: q of shape {tuple(q_shape)}, k of {tuple(k_shape)} and v of "
            f"{tuple(v_shape)} must be [B, T, heads, D] of one B, T and D, k and v of as many heads."
        )
    if k_shape[2] == 0 or q_shape[2] % k_shape[2]:
        raise ArgumentError(
            f"flash_attention: {q_shape[2]} query heads cannot share {k_shape[2]} key heads; the first "
            "must be a multiple of the second."
        )


def _check_angles(
    q_shape: torch.Size,
    shape: torch.Size,
    sin_shape: torch.Size,
    cos: torch.dtype,
    sin: torch.dtype,
) -> None:
    check_dtypes("flash_attention", cos=cos, sin=sin)
    if cos is not sin:
        raise ArgumentError(f"flash_attention: rope's cos is {cos} and sin {sin}; cast them.")
    if (
        len(shape) != 3
        or sin_shape != shape
        or (shape[0] != 1 and shape[0] != q_shape[0])
        or shape[1] != q_shape[1]
        or shape[2] > q_shape[3]
        or shape[2] % 2
    ):
        raise ArgumentError(
            f"flash_attention: rope's cos of shape {tuple(shape)} and sin of {tuple(sin_shape)} do not "
            f"give {q_shape[0]} or 1 rows of {q_shape[1]} tokens with an even number of angles up to "
            f"{q_shape[3]}."
        )


def _check_cu_seqlens(cu_seqlens: torch.Tensor, rows: int, device: torch.device) -> None:
    """All but its values."""
    if cu_seqlens.dtype is not torch.int32:
        raise ArgumentTypeError(
            f"flash_attention: cu_seqlens is {cu_seqlens.dtype}; cast it to int32, once for all layers."
        )
    shape = cu_seqlens.shape
    if len(shape) != 1 or shape[0] == 0:
        raise ArgumentError(
            f"flash_attention: cu_seqlens of shape {tuple(shape)} must be [documents + 1]."
        )
    if cu_seqlens.device != device:
        raise ArgumentError(
            f"flash_attention: cu_seqlens is on {cu_seqlens.device} and q on {device}; move it there, "
            "once for all layers."
        )
    if rows != 1:
        raise ArgumentError(
            f"flash_attention: q has {rows} rows, and cu_seqlens packs one; flatten them into one "
            "and let cu_seqlens end their documents too."
        )


def _check_numbers(scale: float, window: int | None, softcap: float | None) -> None:
    if not 0.0 < scale < math.inf:
        raise ArgumentError(f"flash_attention: scale={scale!r} must be positive and finite.")
    if window is not None and not (isinstance(window, int) and window > 0):
        raise ArgumentError(
            f"flash_attention: window={window!r} must be an int of at least 1, the token itself; None "
            "sees all."
        )
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ArgumentError(
            f"flash_attention: softcap={softcap!r} must be positive and finite; None does not cap."
        )
