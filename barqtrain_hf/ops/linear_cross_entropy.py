"""Linear layer and cross-entropy in one op that never holds all logits.

For each row i with a target t that is not ``ignore_index``:

    z    = logit_scale * (hidden @ weight.T + bias),   then z = softcap * tanh(z / softcap)
    lse  = log(sum_v exp(z_v))
    loss = (1 - s) * (lse - z_t) + s * (lse - mean_v(z)) + z_loss * lse^2      s = label_smoothing
    dz_v = softmax(z)_v * (1 + 2 * z_loss * lse) - (1 - s) * [v == t] - s / V

Ignored rows are dropped before the first product. The rest go through in chunks as large as
``max_extra_bytes`` allows, and each chunk's gradients are taken while its logits are there, so the
products cost 6·N·H·V FLOPs with a trained head and 4·N·H·V with a frozen one, against 8 and 6 for a
backward pass that recomputes the logits.

The gradient is scaled by 1/num_items before it is rounded to a 16-bit type, but only by the mantissa:
the power of two is applied to the result, exactly, so that fp16 does not underflow. The products of
16-bit operands keep their fp32 accumulators, so gradients are rounded once, in the backward pass.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops._backend import Backend, check_dtype, use_cuda
from barqtrain_hf.ops._chunked_cross_entropy import forward, recompute

Reduction = Literal["mean", "sum", "none"]

# Of logits and their gradient at once. At a 128k vocabulary in bf16 this is about 700 rows, enough for
# the products to run near their full rate.
_DEFAULT_EXTRA_BYTES = 512 * 2**20


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_extra_bytes: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against ``target`` without holding all logits.

    Args:
        hidden: [..., H], fp32, fp16 or bf16.
        weight: [V, H], the head's weight. Under autocast the products run in the autocast dtype, else
            in hidden's; gradients return in each input's own dtype.
        target: [...], int64 class indices or ``ignore_index``.
        bias: [V] or None.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduction: "mean" (over the rows that are not ignored, or ``num_items``), "sum" or "none".
        num_items: divisor of "mean": a number or a 0-dim tensor on any device, such as the Trainer's
            ``num_items_in_batch``.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        z_loss: weight of lse^2, which keeps the logits' scale in place (PaLM, arXiv:2204.02311).
        softcap: bound of the logits, as in Gemma 2, or None.
        logit_scale: factor of the logits, as in Cohere and Granite.
        max_extra_bytes: memory for a chunk's logits and their gradient; default 512 MiB.
        backend: "torch" is the only implementation so far; "auto" chooses it.

    Returns:
        An fp32 scalar, or [...] in fp32 for "none". With every row ignored it is 0, connected to the
        graph, with zero gradients.

    Raises:
        ArgumentError: shapes that disagree, a target outside [0, V), an option out of its range,
            ``max_extra_bytes`` too small for one row.
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"``.
    """
    _check_arguments(hidden, weight, target, bias, reduction, label_smoothing, softcap)
    use_cuda("linear_cross_entropy", backend, hidden, "there is no CUDA kernel for it yet.")
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat_target = target.reshape(-1)
    if reduction == "mean":
        if num_items is None:
            num_items = (flat_target != ignore_index).sum().clamp(min=1)
        divisor = torch.as_tensor(num_items, dtype=torch.float32, device=hidden.device)
        # No target in the whole batch: a loss of zero and not of 0 / 0.
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    elif num_items is not None:
        raise ArgumentError(
            f"linear_cross_entropy: num_items divides reduction='mean', not {reduction!r}; drop it."
        )
    else:
        divisor = torch.ones((), dtype=torch.float32, device=hidden.device)
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    extra = _DEFAULT_EXTRA_BYTES if max_extra_bytes is None else max_extra_bytes
    options = (
        *(ignore_index, label_smoothing, z_loss, softcap, logit_scale, extra, dtype),
        reduction == "none",
    )
    needs = tuple(
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    )
    if torch.compiler.is_compiling():
        function = torch.ops.barq.linear_cross_entropy
    else:
        function = _LinearCrossEntropy.apply
    loss = function(rows, weight, bias, flat_target, divisor, *options, *needs)[0]
    return loss.view(target.shape) if reduction == "none" else loss  # type: ignore[no-any-return]


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """The definition in plain PyTorch, with all logits in memory; see :func:`linear_cross_entropy`."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    logits, target = logits.flatten(0, -2), target.flatten()
    losses = F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    valid = target != ignore_index
    losses = losses + torch.where(valid, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses.view(hidden.shape[:-1])
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (valid.sum().clamp(min=1) if num_items is None else num_items)


def _check_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> None:
    op = "linear_cross_entropy"
    check_dtype(op, "hidden", hidden)
    check_dtype(op, "weight", weight)
    if weight.dim() != 2 or hidden.dim() == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ArgumentError(
            f"{op}: weight of shape {tuple(weight.shape)} does not fit hidden of shape "
            f"{tuple(hidden.shape)}; weight must be [V, H] for hidden [..., H]."
        )
    if target.shape != hidden.shape[:-1]:
        raise ArgumentError(
            f"{op}: target of shape {tuple(target.shape)} must have hidden's shape without its last "
            f"dimension, {tuple(hidden.shape[:-1])}."
        )
    if target.dtype is not torch.int64:
        raise ArgumentError(f"{op}: target is {target.dtype}; cast it to int64.")
    if bias is not None:
        check_dtype(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ArgumentError(
                f"{op}: bias of shape {tuple(bias.shape)} must be [V] = [{weight.shape[0]}]."
            )
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f"{op}: reduction={reduction!r} must be 'mean', 'sum' or 'none'.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"{op}: label_smoothing={label_smoothing} must be in [0, 1].")
    if softcap is not None and softcap <= 0.0:
        raise ArgumentError(f"{op}: softcap={softcap} must be positive, or None for no cap.")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, target, divisor, *options = inputs
    *ctx.options, ctx.per_row, ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad = options
    ctx.recomputes = ctx.per_row and (ctx.weight_grad or ctx.bias_grad)
    if ctx.recomputes:
        ctx.save_for_backward(hidden, weight, bias, target)
    else:
        ctx.save_for_backward(*output[1:], divisor)
        ctx.dtypes = [t.dtype if t is not None else None for t in (hidden, weight, bias)]


def _backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    needs = (ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad)
    if ctx.recomputes:
        hidden, weight, bias, target = ctx.saved_tensors
        dtypes = [t.dtype if t is not None else None for t in (hidden, weight, bias)]
        arguments = (upstream, hidden, weight, bias, target, *ctx.options, *needs)
        grads = torch.ops.barq.linear_cross_entropy_recompute(*arguments)
        wanted = [
            g.to(dtype) if need else None
            for g, dtype, need in zip(grads, dtypes, needs, strict=True)
        ]
    else:
        *grads, divisor = ctx.saved_tensors
        if ctx.per_row:
            factor = upstream.unsqueeze(1)
        else:
            factor = torch.ldexp(upstream, torch.frexp(1.0 / divisor).exponent)
        wanted = [
            _scaled(g, factor, dtype) if need else None
            for g, dtype, need in zip(grads, ctx.dtypes, needs, strict=True)
        ]
    return (*wanted, *([None] * 13))


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradient * factor`` rounded to ``dtype`` in one pass, without an fp32 product in memory."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


class _LinearCrossEntropy(torch.autograd.Function):
    """Eager twin of the custom op: the same forward and backward with less dispatch in between."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if upstream is None:
            return (None,) * 16
        return _backward(ctx, upstream)


# torch.compile traces these: opaque to it, so the number of valid rows causes no recompilation.
_op = torch.library.custom_op("barq::linear_cross_entropy", forward, mutates_args=())
_recompute_op = torch.library.custom_op(
    "barq::linear_cross_entropy_recompute", recompute, mutates_args=()
)


@_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    divisor: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    per_row, hidden_grad, weight_grad, bias_grad = options[-4:]
    loss = hidden.new_empty(target.shape if per_row else (), dtype=torch.float32)
    if per_row:
        hidden_grad = hidden_grad and not (weight_grad or bias_grad)
        weight_grad = bias_grad = False
    return (loss, *_fake_gradients(hidden, weight, bias, hidden_grad, weight_grad, bias_grad))


@_recompute_op.register_fake
def _(
    upstream: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    return _fake_gradients(hidden, weight, bias, *options[-3:])


def _fake_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *wanted: bool
) -> tuple[torch.Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if want else 0, dtype=torch.float32)
        for shape, want in zip(shapes, wanted, strict=True)
    )


_op.register_autograd(_backward, setup_context=_setup_context)
