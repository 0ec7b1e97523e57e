"""Autograd of `flash_attention`: a Function for eager mode and custom ops for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.ops import _attention_kernels
from barqtrain_hf.ops._attention_call import Call, Kept, are_vectors, call_for
from barqtrain_hf.ops._attention_kernels import Gradients
from barqtrain_hf.ops._attention_torch import attend


def run(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> torch.Tensor:
    """The output, through the kernels, in eager mode; ``call`` is that of q, k and v."""
    # Outside the Function, so that autograd knows of the copies it may save.
    call, q, k, v, cos, sin = _loadable(call, q, k, v, cos, sin)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        # Nothing to remember: a Function would cost some microseconds.
        return _attention_kernels.forward(call, max_seqlen, q, k, v, cos, sin, cu_seqlens)[0]
    return _FlashAttention.apply(q, k, v, (cos, sin, cu_seqlens), (call, max_seqlen))  # type: ignore[no-any-return]


def traced(*arguments: Any) -> torch.Tensor:
    """The same for torch.compile, by the custom op below, with its arguments."""
    return torch.ops.barq.flash_attention(*arguments)[0]  # type: ignore[no-any-return]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        others: tuple[Any, ...],  # cos, sin and cu_seqlens: each argument costs host time
        about: tuple[Call, int | None],  # and max_seqlen
    ) -> torch.Tensor:
        out, kept = _attention_kernels.forward(*about, q, k, v, *others)
        # Of q and k that are turned, ``kept`` has what the backward pass needs.
        inputs = (q, k) if others[0] is None else (None, None)
        ctx.save_for_backward(*inputs, v, out, kept, *others)
        ctx.about = about
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        call, max_seqlen = ctx.about
        if not torch.is_grad_enabled():
            grads = _attention_kernels.backward(call, max_seqlen, _vectors(dout), *saved)
        elif saved[0] is not None:  # create_graph: the gradient's own graph, by the definition
            q, k, v, *_, cu_seqlens = saved
            grads = _differentiable(call, max_seqlen, dout, q, k, v, cu_seqlens)
        else:
            raise UnsupportedError(
                "flash_attention: RoPE inside has no second derivative;",
                "turn q and k by apply_rope before, or use backend='torch'.",
            )
        return *grads, None, None


def _differentiable(
    call: Call,
    max_seqlen: int | None,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> Gradients:
    q, k, v = (t if t.requires_grad else t.detach().requires_grad_() for t in (q, k, v))
    numbers = (call.causal, call.scale, call.window, call.softcap)
    out = attend(q, k, v, cu_seqlens, max_seqlen, *numbers, materialise=True)
    return torch.autograd.grad(out, (q, k, v), dout, create_graph=True)  # type: ignore[no-any-return]


def _loadable(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[
    Call, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]:
    """The inputs as the kernels read them, and their call."""
    if not call.loadable or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        q, k, v = _vectors(q), _vectors(k), _vectors(v)
        call = call.strided((q.stride(), k.stride(), v.stride()))
    if cos is not None and sin is not None:
        cos, sin = _aligned(cos), _aligned(sin)
    return call, q, k, v, cos, sin


def _vectors(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its heads are no whole vectors of 16 bytes, or too far apart."""
    if are_vectors(x.stride()) and not x.data_ptr() % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous and in whole vectors."""
    if x.is_contiguous() and not x.data_ptr() % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _call_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
) -> Call:
    angles = None if cos is None else (cos.shape, cos.dtype, interleaved)
    shapes = (q.get_device(), q.dtype, q.shape, k.shape, (q.stride(), k.stride(), v.stride()))
    return call_for(*shapes, cu_seqlens is not None, angles, causal, scale, window, softcap)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = (causal, scale, window, softcap, interleaved)
    call = _call_of(q, k, v, cos, cu_seqlens, *numbers)
    call, q, k, v, cos, sin = _loadable(call, q, k, v, cos, sin)
    return _attention_kernels.forward(call, max_seqlen, q, k, v, cos, sin, cu_seqlens)


@_op.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _attention_kernels.outputs(q, Kept.of(q.shape, k.shape, cos is not None))


@torch.library.custom_op(
    "barq::flash_attention_backward", mutates_args=(), device_types="cuda", tags=_TAGS
)
def _backward_op(
    dout: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    out: torch.Tensor,
    kept: torch.Tensor,
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
    numbers = (causal, scale, window, softcap, interleaved)
    call = _call_of(
        out, v, v, cos, cu_seqlens, *numbers
    )  # the backward pass asks for strides itself
    q, k, dout, v = (None if x is None else _vectors(x) for x in (q, k, dout, v))
    kept, cos, sin = (None if x is None else _aligned(x) for x in (kept, cos, sin))
    tensors = (dout, q, k, v, out, kept, cos, sin, cu_seqlens)
    return _attention_kernels.backward(call, max_seqlen, *tensors)  # type: ignore[arg-type]


@_backward_op.register_fake
def _(dout: torch.Tensor, q: Any, k: Any, v: torch.Tensor, out: torch.Tensor, *_: Any) -> Gradients:
    return _attention_kernels.gradients(out, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, *others = inputs
    turned = others[0] is not None
    ctx.save_for_backward(*((None, None) if turned else (q, k)), v, *output, *others[:3])
    ctx.numbers = others[3:]


def _op_backward(ctx: Any, dout: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    grads = torch.ops.barq.flash_attention_backward(dout, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *(None,) * 9


_op.register_autograd(_op_backward, setup_context=_setup_context)
