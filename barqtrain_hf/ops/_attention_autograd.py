"""Autograd of `flash_attention`: a Function for eager mode and custom ops for torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.ops import _attention_kernels
from barqtrain_hf.ops._attention_kernels import Angles, Gradients
from barqtrain_hf.ops._attention_torch import attend
from barqtrain_hf.ops._documents import longest


def unsupported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Angles | None
) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    device = q.get_device()
    if k.get_device() != device or v.get_device() != device:
        return f"q is on {q.device}, k on {k.device} and v on {v.device}."
    if rope is not None:
        cos, sin, _ = rope
        if cos.get_device() != device or sin.get_device() != device:
            return f"q is on {q.device}, cos on {cos.device} and sin on {sin.device}."
        if cos.dtype is not q.dtype and cos.dtype is not torch.float32:
            return f"q is {q.dtype} and cos {cos.dtype}; cast cos and sin to it or to float32."
        if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
            return "cos or sin needs gradients."
    return _attention_kernels.unsupported(q)


def apply(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Angles | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The output, through the kernels."""
    cos, sin, interleaved = (None, None, False) if rope is None else rope
    numbers = (max_seqlen, causal, scale, window, softcap, interleaved)
    if torch.compiler.is_compiling():
        tensors = (q, k, v, cos, sin, cu_seqlens)
        return torch.ops.barq.flash_attention(*tensors, *numbers)[0]  # type: ignore[no-any-return]
    # Outside the Function, so that autograd knows of the copies it may save.
    inputs = _loadable(q, k, v, cos, sin)
    return _FlashAttention.apply(*inputs, cu_seqlens, numbers)  # type: ignore[no-any-return]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        numbers: tuple[Any, ...],  # one argument, since each costs host time
    ) -> torch.Tensor:
        out, lse, q, k = _forward(q, k, v, cos, sin, cu_seqlens, *numbers)
        ctx.save_for_backward(q, k, v, out, lse, cos, sin, cu_seqlens)
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, cos, sin, cu_seqlens = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grads = _backward(dout, q, k, v, out, lse, cos, sin, cu_seqlens, *ctx.numbers)
        elif cos is None:  # create_graph: the gradient's own graph, by the definition
            grads = _differentiable(dout, q, k, v, cu_seqlens, *ctx.numbers)
        else:
            raise UnsupportedError(
                "flash_attention: RoPE inside has no second derivative;",
                "turn q and k by apply_rope before, or use backend='torch'.",
            )
        return *grads, None, None, None, None


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, lse [Hq, B * T], and q and k, turned if there are angles: the backward pass needs these."""
    if cu_seqlens is not None:
        longest(cu_seqlens, q.shape[1], max_seqlen)  # checks
    if not q.numel():
        return *_outputs(q), q, k
    if cos is not None and sin is not None:
        q, k = _attention_kernels.turned(q, k, (cos, sin, interleaved))
    out, lse = _attention_kernels.forward(q, k, v, cu_seqlens, causal, scale, window, softcap)
    return out, lse, q, k


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    _: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
) -> Gradients:
    if not q.numel():
        return _gradients(q, k, v)
    rope = None if cos is None or sin is None else (cos, sin, interleaved)
    options = (cu_seqlens, causal, scale, window, softcap, rope)
    return _attention_kernels.backward(_vectors(dout), q, k, v, out, lse, *options)


def _differentiable(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *numbers: Any,
) -> Gradients:
    q, k, v = (t if t.requires_grad else t.detach().requires_grad_() for t in (q, k, v))
    out = attend(q, k, v, cu_seqlens, *numbers[:-1], materialise=True)
    return torch.autograd.grad(out, (q, k, v), dout, create_graph=True)  # type: ignore[no-any-return]


def _loadable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The inputs as the kernels read them."""
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
        if (cos.data_ptr() | sin.data_ptr()) % 16:
            cos, sin = cos.clone(), sin.clone()
    return _vectors(q), _vectors(k), _vectors(v), cos, sin


def _vectors(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its heads are no whole vectors of 16 bytes."""
    batch, token, head, last = x.stride()
    if last == 1 and not (x.data_ptr() | 2 * (batch | token | head)) % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty ones: the output, contiguous, and lse."""
    batch, tokens, heads, _ = q.shape
    lse = torch.empty((heads, batch * tokens), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Gradients:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


# torch.compile traces these instead of the Function above: opaque to it, so no graph break. Documents are
# read on the host, which a CUDA graph would not repeat.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("barq::flash_attention", mutates_args=(), device_types="cuda", tags=_TAGS)
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = (max_seqlen, causal, scale, window, softcap, interleaved)
    q, k, v, cos, sin = _loadable(q, k, v, cos, sin)
    out, lse, turned_q, turned_k = _forward(q, k, v, cos, sin, cu_seqlens, *numbers)
    if cos is None:  # an output may not be an input
        turned_q, turned_k = q.new_empty(0), k.new_empty(0)
    elif not q.numel():
        turned_q, turned_k = q.new_empty(q.shape), k.new_empty(k.shape)
    return out, lse, turned_q, turned_k


@_op.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if cos is None:
        return *_outputs(q), q.new_empty(0), q.new_empty(0)
    return *_outputs(q), q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op(
    "barq::flash_attention_backward", mutates_args=(), device_types="cuda", tags=_TAGS
)
def _backward_op(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = (max_seqlen, causal, scale, window, softcap, interleaved)
    q, k, v, cos, sin = _loadable(q, k, v, cos, sin)
    return _backward(dout, q, k, v, out, lse, cos, sin, cu_seqlens, *numbers)


@_backward_op.register_fake
def _(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Gradients:
    return _gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, *others = inputs
    out, lse, *turned = output
    ctx.save_for_backward(*((q, k) if others[0] is None else turned), v, out, lse, *others[:3])
    ctx.numbers = others[3:]


def _op_backward(ctx: Any, dout: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    grads = torch.ops.barq.flash_attention_backward(dout, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *(None,) * 9


_op.register_autograd(_op_backward, setup_context=_setup_context)
