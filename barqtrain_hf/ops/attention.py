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
import functools
import math
from typing import NamedTuple

import torch

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError
from barqtrain_hf.ops import _attention_autograd, _attention_tilings
from barqtrain_hf.ops._attention_call import Call, OfThree, call_for
from barqtrain_hf.ops._attention_choice import sdpa, sdpa_is_faster
from barqtrain_hf.ops._attention_torch import allowed, attend, attend_documents, weighted
from barqtrain_hf.ops._backend import Backend, autocast_dtype, check_dtypes, use_cuda
from barqtrain_hf.ops._rope_kernels import MAX_ROWS
from barqtrain_hf.ops.rope import apply_rope
from barqtrain_hf.runtime import cuda_unavailable_reason

_Shapes = tuple[torch.Size, torch.Size, torch.Size]
_Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]
# Shapes, dtypes and devices of cos and sin, and interleaved.
_Angles = tuple[torch.Size, torch.Size, torch.dtype, torch.dtype, int, int, bool]


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
    autocast = autocast_dtype(q)
    if autocast is not None and not (q.dtype is k.dtype is v.dtype is autocast):
        check_dtypes("flash_attention", q=q.dtype, k=k.dtype, v=v.dtype)
        q, k, v = q.to(autocast), k.to(autocast), v.to(autocast)
    make_plan = _make_plan if torch.compiler.is_compiling() else _plan
    plan = make_plan(
        (q.shape, k.shape, v.shape),
        (q.stride(), k.stride(), v.stride()),
        (q.dtype, k.dtype, v.dtype),
        (q.get_device(), k.get_device(), v.get_device()),
        None if rope is None else _layout_of(rope),
        cu_seqlens is not None,
        causal,
        scale,
        window,
        softcap,
        backend,
    )
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    elif max_seqlen is not None:
        raise ArgumentError(f"flash_attention: max_seqlen={max_seqlen} needs cu_seqlens; drop it.")
    to_sdpa = plan.to_sdpa and not torch.are_deterministic_algorithms_enabled()
    cos, sin, interleaved = rope or (None, None, False)
    reason = plan.unsupported
    if cos is not None and sin is not None and (cos.requires_grad or sin.requires_grad):
        reason = reason or ("cos or sin needs gradients." if torch.is_grad_enabled() else None)
    if plan.call is not None and reason is None and not to_sdpa:
        return _attention_autograd.run(plan.call, q, k, v, cos, sin, cu_seqlens, max_seqlen)
    scale = plan.scale
    if not to_sdpa and use_cuda("flash_attention", backend, q, reason):
        tensors = (q, k, v, cos, sin, cu_seqlens)
        numbers = (max_seqlen, causal, scale, window, softcap, interleaved)
        return _attention_autograd.traced(*tensors, *numbers)
    with (
        contextlib.nullcontext()
        if autocast is None
        else torch.autocast(q.device.type, enabled=False)
    ):
        if rope is not None:
            q, k = _turn(q, k, rope, "torch" if backend == "torch" else "auto")
            if backend == "auto" and q.shape[0] > MAX_ROWS:  # a limit of RoPE's kernel alone
                return flash_attention(
                    q, k, v, causal=causal, scale=scale, window=window, softcap=softcap
                )
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
    cos, sin, turns = rope
    devices = (cos.get_device(), sin.get_device())
    return cos.shape, sin.shape, cos.dtype, sin.dtype, *devices, turns


class _Plan(NamedTuple):
    """What is known of a call before its tensors are read.

    Attributes:
        scale: of the scores.
        to_sdpa: whether it is left to PyTorch's attention, which has no deterministic gradient.
        unsupported: why the kernels cannot run, or None.
        call: for the kernels, if they can and no compiler looks on.
    """

    scale: float
    to_sdpa: bool
    unsupported: str | None
    call: Call | None


def _make_plan(
    shapes: _Shapes,
    strides: OfThree,
    dtypes: _Dtypes,
    devices: tuple[int, int, int],
    angles: _Angles | None,
    packed: bool,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: Backend,
) -> _Plan:
    """Checks all that does not need the tensors, and decides what runs."""
    q, k, v = dtypes
    check_dtypes("flash_attention", q=q, k=k, v=v)
    if not (q is k is v):
        raise ArgumentError(
            f"flash_attention: q is {q}, k {k} and v {v}; cast them to one dtype, as autocast would."
        )
    shape, device = shapes[0], devices[0]
    _check_shapes(*shapes)
    if angles is not None:
        _check_angles(shape, *angles[:4])
    if packed and shape[0] != 1:
        raise ArgumentError(
            f"flash_attention: q has {shape[0]} rows, and cu_seqlens packs one; flatten them into one "
            "and let cu_seqlens end their documents too."
        )
    if scale is None:
        scale = shape[3] ** -0.5
    _check_numbers(scale, window, softcap)
    if device < 0 or backend == "torch":
        return _Plan(scale, False, None, None)
    reason = _unsupported(q, shape, devices, angles)
    auto = backend == "auto" and not packed
    to_sdpa = auto and sdpa_is_faster(shape, q, device, window, softcap)
    call = None
    if reason is None and not torch.compiler.is_compiling() and cuda_unavailable_reason() is None:
        of_cos = None if angles is None else (angles[0], angles[2], angles[6])
        numbers = (causal, scale, window, softcap)
        call = call_for(device, q, shape, shapes[1], strides, packed, of_cos, *numbers)
    return _Plan(scale, to_sdpa, reason, call)


_plan = functools.lru_cache(maxsize=1024)(_make_plan)


def _unsupported(
    dtype: torch.dtype, shape: torch.Size, devices: tuple[int, int, int], angles: _Angles | None
) -> str | None:
    """Why the kernels cannot run, or None; whether angles need gradients is another question."""
    device = devices[0]
    if devices != (device, device, device):
        q, k, v = devices
        return f"q is on device {q}, k on {k} and v on {v} (-1: the CPU)."
    if angles is not None:
        _, _, of_cos, _, *places, _ = angles
        if places != [device, device]:
            return (
                f"q is on device {device}, cos on {places[0]} and sin on {places[1]} (-1: the CPU)."
            )
        if of_cos is not dtype and of_cos is not torch.float32:
            return f"q is {dtype} and cos {of_cos}; cast cos and sin to it or to float32."
        if shape[0] > MAX_ROWS:
            return f"there are {shape[0]} rows, more than RoPE's {MAX_ROWS}; split them."
    return _attention_tilings.unsupported(dtype, shape[3], device)


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


def _check_cu_seqlens(cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    """All but its values."""
    if cu_seqlens.dtype is not torch.int32:
        raise ArgumentTypeError(
            f"flash_attention: cu_seqlens is {cu_seqlens.dtype}; cast it to int32, once for all layers."
        )
    if cu_seqlens.dim() != 1:
        raise ArgumentError(
            f"flash_attention: cu_seqlens of shape {tuple(cu_seqlens.shape)} must be [documents + 1]."
        )
    # Two integers are compared faster than two devices, and tell GPUs apart.
    apart = cu_seqlens.get_device() != q.get_device()
    if apart or (not q.is_cuda and cu_seqlens.device != q.device):
        raise ArgumentError(
            f"flash_attention: cu_seqlens is on {cu_seqlens.device} and q on {q.device}; move it there, "
            "once for all layers."
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
