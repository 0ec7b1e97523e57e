"""Autograd of `linear_cross_entropy`: a Function for eager mode and custom ops for torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.ops._chunked_cross_entropy import (
    FiveTensors,
    Inputs,
    Options,
    early_dtypes,
    final_dtypes,
    mixes_rows,
    take,
    take_again,
)
from barqtrain_hf.ops._cross_entropy_rows import LossTerms
from barqtrain_hf.ops._targets import CountedTarget
from barqtrain_hf.runtime import Kernel, sm_count

_INPUTS = 5  # tensors that can have gradients; target, row_weight and divisor follow


class LinearCrossEntropy(torch.autograd.Function):
    """(loss, token statistics) of the inputs, target, row_weight, divisor; options, per_row, needs.

    What the forward pass keeps for the backward pass is used up by it; a second backward pass computes
    it again. It is no saved tensor, since hooks on those (activation offloading) would move it around.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, options, per_row, needs = arguments
        *inputs, target, row_weight, divisor = tensors
        result = take(inputs, target, row_weight, divisor, options, per_row, needs, keep=True)
        ctx.mark_non_differentiable(result.tokens)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.per_row, ctx.needs = options, per_row, needs
        ctx.grads, ctx.kept = result.grads, result.kept  # not the loss, which refers to ctx
        return result.loss, result.tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        *inputs, target, row_weight, divisor = ctx.saved_tensors  # once: hooks may unpack only once
        count = len(inputs) + 6
        if upstream is None:
            return (None,) * count
        early, kept = ctx.grads, ctx.kept
        ctx.grads = ctx.kept = None
        dtype = ctx.options.dtype
        if early is None:
            scale = upstream if ctx.per_row else upstream / divisor
            scale = (scale if row_weight is None else scale * row_weight).reshape(-1).contiguous()
            if kept is not None:
                grads = kept.gradients(inputs, scale, ctx.needs)
            else:
                grads = take_again(inputs, target, scale, ctx.options, ctx.needs)
            factor = None
        else:
            grads = early
            factor = _factor(upstream, divisor, dtype, ctx.per_row)
        del kept, early
        given = [
            _final(g, factor, x.dtype, ctx.options.cuda) if need else None
            for g, x, need in zip(grads, inputs, ctx.needs, strict=True)
        ]
        return (*given, *([None] * (count - _INPUTS)))


def _factor(
    upstream: torch.Tensor, divisor: torch.Tensor, dtype: torch.dtype, per_row: bool
) -> torch.Tensor:
    """What early gradients lack."""
    if per_row:
        return upstream.unsqueeze(1)
    if dtype is torch.float16:  # see `gradient_scale`
        return torch.ldexp(upstream, torch.frexp(1.0 / divisor).exponent)
    return upstream


def _final(
    gradient: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype, cuda: bool
) -> torch.Tensor:
    """``gradient * factor`` in ``dtype``: in place, or rounded once from fp32."""
    if factor is None:
        return gradient.to(dtype)
    same, kernels = gradient.dtype is dtype, cuda and factor.dim() == 0 and gradient.numel() > 0
    blocks = (
        min(-(-gradient.numel() // 2048), 8 * sm_count(gradient.get_device())) if kernels else 0
    )
    if same and kernels:
        kernel = _scale_in_place(dtype)
        kernel((blocks, 1, 1), (256, 1, 1), gradient, factor, gradient.numel())
        return gradient
    if same:
        return gradient.mul_(factor)
    out = torch.empty_like(gradient, dtype=dtype)
    if kernels:
        kernel = _scale_to(dtype)
        kernel((blocks, 1, 1), (256, 1, 1), gradient, out, factor, gradient.numel())
        return out
    return torch.mul(gradient, factor, out=out)


@functools.cache
def _scale_in_place(dtype: torch.dtype) -> Kernel:
    parameters = {"x": dtype, "factor": torch.float32, "count": "int64"}
    return Kernel("scale.cu", f"scale_in_place<{CUDA_NAMES[dtype]}>", parameters)


@functools.cache
def _scale_to(dtype: torch.dtype) -> Kernel:
    parameters = {"x": torch.float32, "out": dtype, "factor": torch.float32, "count": "int64"}
    return Kernel("scale.cu", f"scale_to<{CUDA_NAMES[dtype]}>", parameters)


def compiled(
    tensors: Sequence[torch.Tensor | None], options: Options, per_row: bool, needs: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the Function, in an op that torch.compile takes as it is.

    Opaque to it, so that the number of valid rows causes no recompilation. Gradients are early ones.
    """
    terms, extra, dtype, cuda, _, per_token = options
    # A compiled model's CPU targets can be looked at inside the op, a GPU's not.
    compact = not cuda and tensors[0] is not None and not tensors[0].is_cuda
    loss, tokens, *_ = torch.ops.barq.linear_cross_entropy(
        *tensors, *terms, extra, dtype, cuda, compact, per_token, per_row, needs
    )
    return loss, tokens.detach()


@torch.library.custom_op("barq::linear_cross_entropy", mutates_args=())
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_input: torch.Tensor | None,
    lora_weight: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    divisor: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    max_extra_bytes: int | None,
    dtype: torch.dtype,
    cuda: bool,
    compact: bool,
    per_token: bool,
    per_row: bool,
    needs: Sequence[bool],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    inputs = (hidden, weight, bias, lora_input, lora_weight)
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    counted = CountedTarget(target, ignore_index) if compact else None
    options = Options(terms, max_extra_bytes, dtype, cuda, counted, per_token)
    result = take(inputs, target, row_weight, divisor, options, per_row, needs, keep=False)
    grads = result.grads or [None] * _INPUTS
    return (result.loss, result.tokens, *_as_dtypes(grads, early_dtypes(inputs, dtype), divisor))


@torch.library.custom_op("barq::linear_cross_entropy_again", mutates_args=())
def _op_again(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_input: torch.Tensor | None,
    lora_weight: torch.Tensor | None,
    target: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    max_extra_bytes: int | None,
    dtype: torch.dtype,
    cuda: bool,
    compact: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = (hidden, weight, bias, lora_input, lora_weight)
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    counted = CountedTarget(target, ignore_index) if compact else None
    options = Options(terms, max_extra_bytes, dtype, cuda, counted, per_token=False)
    grads = take_again(inputs, target, scale, options, needs)
    return _as_dtypes(grads, final_dtypes(inputs, dtype), scale)


def _as_dtypes(
    grads: Sequence[torch.Tensor | None], dtypes: Sequence[torch.dtype], like: torch.Tensor
) -> FiveTensors:
    """In dtypes that do not depend on the way they were computed; outputs of an op are never None."""
    a, b, c, d, e = (
        like.new_empty(0, dtype=torch.float32) if g is None else g.to(dtype)
        for g, dtype in zip(grads, dtypes, strict=True)
    )
    return a, b, c, d, e


@_op.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    inputs, target = arguments[:_INPUTS], arguments[_INPUTS]
    dtype, _, _, per_token, per_row, needs = arguments[-6:]
    loss = target.new_empty(target.shape if per_row else (), dtype=torch.float32)
    tokens = target.new_empty((3 if per_token else 0, *target.shape), dtype=torch.float32)
    needs = [need and not (per_row and mixes_rows(needs)) for need in needs]
    return (loss, tokens, *_fake_gradients(inputs, needs, early_dtypes(inputs, dtype)))


@_op_again.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    inputs = arguments[:_INPUTS]
    dtype, *_, needs = arguments[-4:]
    return _fake_gradients(inputs, needs, final_dtypes(inputs, dtype))


def _fake_gradients(
    inputs: Inputs, needs: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> tuple[torch.Tensor, ...]:
    hidden = inputs[0]
    assert hidden is not None
    return tuple(
        x.new_empty(x.shape, dtype=dtype)
        if x is not None and need
        else hidden.new_empty(0, dtype=torch.float32)
        for x, need, dtype in zip(inputs, needs, dtypes, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.per_row, ctx.needs = inputs
    ctx.count = len(inputs)
    tensors, ctx.terms = tensors[: _INPUTS + 3], tensors[_INPUTS + 3 : -1]
    ctx.save_for_backward(*tensors, *output[2:])


def _op_backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    inputs, (target, row_weight, divisor) = tensors[:_INPUTS], tensors[_INPUTS : _INPUTS + 3]
    grads = tensors[_INPUTS + 3 :]
    if ctx.per_row and mixes_rows(ctx.needs):
        scale = upstream if row_weight is None else upstream * row_weight
        scale = scale.contiguous()
        grads = torch.ops.barq.linear_cross_entropy_again(
            *inputs, target, scale, *ctx.terms, ctx.needs
        )
    else:
        # ctx.terms: five of the loss, max_extra_bytes, dtype, cuda, compact.
        factor = _factor(upstream, divisor, ctx.terms[6], ctx.per_row)
        grads = [g * factor if need else g for g, need in zip(grads, ctx.needs, strict=True)]
    given = [
        g.to(x.dtype) if need else None for g, x, need in zip(grads, inputs, ctx.needs, strict=True)
    ]
    return (*given, *([None] * (ctx.count - _INPUTS)))


_op.register_autograd(_op_backward, setup_context=_setup_context)
