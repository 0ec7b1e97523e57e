"""Frozen linear layers with low-rank adapters beside them (LoRA: Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + bias + s (x A^T) B^T
    t = x A^T,  u = s dy B,  dx = u A + dy W,  dA = u^T x,  dB = s dy^T t

On Hopper y and dx are one sum each in a kernel of ours, which begins with the adapter's product
(`_lora_kernels`), and u and dB come from one read of dy (`_lora_gradients`). Elsewhere the adapter's part of
y and of dx is written first, and the product with W is added to it where it lies: an addition inside cuBLAS's
product costs next to nothing, one after it would read and write y and dx once more. x is not copied to the
adapter's dtype. Kept for the backward pass: x, and t, which is N rows of the rank.

Layers of one input (query, key and value; gate and up) are better computed together: x is read once for all
their t and once for all their dA, and their parts of dx are added up inside the products too.

With dropout the adapter reads ``m * x``, where m is a layer's own mask:

    t = (m * x) A^T,  dx = m * (u A) + dy W,  dA = u^T (m * x)

Of m and of ``m * x`` nothing is kept but a seed. Each layer then has t, dA and its part of dx by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops._backend import Backend, autocast_dtype, cached, check_dtypes, use_cuda
from barqtrain_hf.ops._dropout import Masks
from barqtrain_hf.ops._lora_gradients import low_rank_gradients
from barqtrain_hf.ops._lora_kernels import Pair, summed_products
from barqtrain_hf.ops._lora_products import low_products, summed
from barqtrain_hf.ops._lora_ranks import low_ranks

_Shape = tuple[int, ...]


class LoraLinear(NamedTuple):
    """A layer and its adapter; shapes and dtypes as of :func:`lora_linear`."""

    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    dropout: float = 0.0


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """``x @ weight.T + bias + scaling * (drop(x) @ lora_a.T) @ lora_b.T``, for a weight that is not trained.

    Args:
        x: [..., I], fp32, fp16 or bf16, any strides.
        weight: [O, I] of x's dtype, or any of the three under autocast, which x is then cast to as well.
        lora_a: [r, I], fp32, fp16 or bf16. It is rounded to x's dtype, or autocast's, for the products; its
            gradient is summed in fp32.
        lora_b: [O, r], as lora_a.
        scaling: of the adapter's part.
        bias: [O] of weight's dtype, or None.
        dropout: the probability, in [0, 1), with which drop sets an element of x to zero; it divides the
            others by ``1 - dropout``. The choice is repeated by `torch.manual_seed`, and differs between
            backends.
        backend: "cuda" for the fused path, "torch" for the reference, "auto" for the fused one on a GPU.

    Returns:
        [..., O] in x's dtype (autocast's if enabled).

    Raises:
        ArgumentError: shapes, devices or dtypes that do not fit; a dropout that is not in [0, 1).
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"`` off a GPU, for a weight that is trained, or for dropout inside
            torch.compile.
    """
    layer = LoraLinear(weight, lora_a, lora_b, scaling, bias, dropout)
    return lora_linears(x, [layer], backend=backend)[0]


def lora_linears(
    x: torch.Tensor, layers: Sequence[LoraLinear], *, backend: Backend = "auto"
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_linear` of each layer, for one input; arguments, results and errors are the same."""
    autocast, reason = autocast_dtype(x), None
    for layer in layers:
        w, a, b, _, bias, dropout = layer
        _check(
            (x.shape, w.shape, a.shape, b.shape, None if bias is None else bias.shape),
            (x.dtype, w.dtype, a.dtype, b.dtype, None if bias is None else bias.dtype),
            autocast,
        )
        _check_devices(x, w, a, b, bias)
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(
                f"lora_linear: dropout={dropout!r} must be at least 0 and below 1, a probability."
            )
        reason = reason or _unsupported(w, bias, dropout)
    if use_cuda("lora_linear", backend, x, reason):
        return apply(x, layers, autocast or x.dtype)
    return tuple(lora_linear_reference(x, *layer) for layer in layers)


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The definition in plain PyTorch, step by step as PEFT computes it; arguments as :func:`lora_linear`."""
    # In PEFT's order, in which autograd adds up the gradient of x.
    y = F.linear(x, weight, bias)
    dropped = x.to(lora_a.dtype)
    if dropout:
        dropped = F.dropout(dropped, dropout)
    return _with_adapter(y, dropped, lora_a, lora_b, scaling)


def _with_adapter(
    y: torch.Tensor,
    dropped: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The frozen layer's y and the adapter's part, of what the adapter reads in x's place."""
    low = F.linear(F.linear(dropped, lora_a), lora_b)
    return (y + low * scaling).to(y.dtype)


def apply(
    x: torch.Tensor, layers: Sequence[LoraLinear], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The fused path, on any device; inputs as `lora_linears` has checked them."""
    if x.dtype is not dtype:
        x = x.to(dtype)  # outside the Function: autograd casts the gradient back
    scalings = tuple(layer.scaling for layer in layers)
    dropouts = tuple(layer.dropout for layer in layers)
    tensors = [t for w, a, b, _, bias, _ in layers for t in (w, bias, a, b)]
    return _LoraLinears.apply(x, (scalings, dropouts), *tensors)  # type: ignore[no-any-return]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        numbers: tuple[tuple[float, ...], tuple[float, ...]],
        *tensors: Any,
    ) -> tuple[torch.Tensor, ...]:
        dtype = x.dtype
        scalings, dropouts = numbers
        masks = Masks.draw(dropouts, x.device) if any(dropouts) else None
        rows = x.reshape(-1, x.shape[-1])
        weights, biases, lora_a, lora_b = (tensors[i::4] for i in range(4))
        with torch.autocast(x.device.type, enabled=False):
            a, b = low_ranks(lora_a, lora_b, scalings, dtype)
            widths = [part.shape[1] for part in b]
            t = rows @ a.T if masks is None else low_products(rows, a.split(widths), masks)
            ys = []
            parts = t.split(widths, dim=1)
            for weight, bias, low, up in zip(weights, biases, parts, b, strict=True):
                # Not a view in the end: users may write to it in place.
                y = x.new_empty(*x.shape[:-1], up.shape[0])
                added = None if bias is None else bias.to(dtype).contiguous()
                _sum(y.view(-1, up.shape[0]), [(low, up), (rows, weight.to(dtype))], True, added)
                ys.append(y)
        seed = () if masks is None else (masks.seed,)
        ctx.save_for_backward(x, t, a, *b, *tensors, *seed)
        ctx.scalings, ctx.dropouts = scalings, dropouts
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, t, a, *rest = ctx.saved_tensors
        number = len(dys)
        masks = Masks(ctx.dropouts, rest.pop()) if any(ctx.dropouts) else None
        b, tensors = rest[:number], rest[number:]
        if torch.is_grad_enabled():  # create_graph: the gradient's own graph, by the definition
            return _differentiable(dys, x, tensors, ctx.scalings, masks, ctx.needs_input_grad)
        weights, _, lora_a, lora_b = (tensors[i::4] for i in range(4))
        need_x, need_a, need_b = (ctx.needs_input_grad[i::4] for i in (0, 4, 5))
        rows, widths = x.reshape(-1, x.shape[-1]), [part.shape[1] for part in b]
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        das: list[torch.Tensor | None] = [None] * number
        dbs: list[torch.Tensor | None] = [None] * number
        dx = None
        with torch.autocast(x.device.type, enabled=False):
            u = torch.empty_like(t)
            each_u = u.split(widths, dim=1)
            parts = zip(flat, t.split(widths, dim=1), each_u, strict=True)
            for i, (dy, low, part) in enumerate(parts):
                if dy is None:
                    part.zero_()
                    continue
                need_u = need_x[0] or any(need_a)
                if need_u and need_b[i]:
                    dbs[i] = low_rank_gradients(dy, b[i], low, part, lora_b[i], ctx.scalings[i])
                    if dbs[i] is not None:
                        continue
                if need_u:
                    torch.mm(dy, b[i], out=part)
                if need_b[i]:
                    db = summed(dy, low)[:, : lora_b[i].shape[1]]
                    dbs[i] = (db * ctx.scalings[i]).to(lora_b[i].dtype)
            if need_x[0] or any(need_a):
                if any(need_a):
                    sums = () if masks is not None else summed(u, rows).split(widths)
                    for i, part in enumerate(each_u):
                        if need_a[i] and flat[i] is not None:
                            da = sums[i] if masks is None else summed(part, masks.drop(rows, i))
                            das[i] = da[: lora_a[i].shape[0]].to(lora_a[i].dtype)
                if need_x[0]:
                    frozen = [
                        (dy, weight.to(x.dtype))
                        for dy, weight in zip(flat, weights, strict=True)
                        if dy is not None
                    ]
                    dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
                    if masks is None:
                        _sum(dx, [(u, a), *frozen], False)
                    else:
                        pairs = zip(each_u, a.split(widths), strict=True)
                        given = [(i, p) for i, p in enumerate(pairs) if flat[i] is not None]
                        _masked_sum(dx, given, frozen, masks)
                    dx = dx.view(x.shape)
        grads = [grad for pair in zip(das, dbs, strict=True) for grad in (None, None, *pair)]
        return dx, None, *grads


def _differentiable(
    dys: Sequence[torch.Tensor | None],
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    scalings: Sequence[float],
    masks: Masks | None,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    layers = zip(*(tensors[i::4] for i in range(4)), scalings, strict=True)
    wanted = [i for i, need in enumerate(needed) if need]
    inputs = [(x, None, *tensors)[i] for i in wanted]
    ys = []
    for i, (weight, bias, a, b, scaling) in enumerate(layers):
        y = F.linear(x, weight, bias)
        dropped = x if masks is None else masks.differentiable(x, i)
        ys.append(_with_adapter(y, dropped.to(a.dtype), a, b, scaling))
    outputs = [y for y, dy in zip(ys, dys, strict=True) if dy is not None]
    given = [dy for dy in dys if dy is not None]
    found = torch.autograd.grad(outputs, inputs, given, create_graph=True, allow_unused=True)
    grads: list[torch.Tensor | None] = [None] * len(needed)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def _sum(
    out: torch.Tensor,
    pairs: Sequence[Pair],
    transposed: bool,
    bias: torch.Tensor | None = None,
) -> None:
    """`summed_products`, wherever; the first pair is the adapters'."""
    if summed_products(out, pairs, transposed, bias):
        return
    for i, (left, right) in enumerate(pairs):
        right = right.T if transposed else right
        if i > 0:
            out.addmm_(left, right)
        elif bias is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(bias, left, right, out=out)


def _masked_sum(
    out: torch.Tensor, low: Sequence[tuple[int, Pair]], frozen: Sequence[Pair], masks: Masks
) -> None:
    """The products of the layers that `low` numbers, each under its mask, and all others, added up."""
    if not low:
        out.zero_()
    for number, (i, (left, right)) in enumerate(low):
        if number == 0:
            torch.mm(left, right, out=out)
            masks.drop_(out, i)
        elif masks.probabilities[i]:
            masks.add(out, left @ right, i)
        else:
            out.addmm_(left, right)
    for left, right in frozen:
        out.addmm_(left, right)


@cached
def _check(
    shapes: tuple[_Shape, _Shape, _Shape, _Shape, _Shape | None],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, torch.dtype | None],
    autocast: torch.dtype | None,
) -> None:
    """Refuses shapes and dtypes that do not fit."""
    x, weight, a, b, bias = shapes
    names = dict(zip(("x", "weight", "lora_a", "lora_b", "bias"), dtypes, strict=True))
    check_dtypes("lora_linear", **{n: dtype for n, dtype in names.items() if dtype is not None})
    if len(weight) != 2 or not x or x[-1] != weight[1]:
        raise ArgumentError(
            f"lora_linear: x of shape {tuple(x)} does not fit weight of {tuple(weight)}; they must be "
            "[..., I] and [O, I]."
        )
    if (
        len(a) != 2
        or len(b) != 2
        or a[1] != weight[1]
        or b[0] != weight[0]
        or a[0] != b[1]
        or not a[0]
    ):
        raise ArgumentError(
            f"lora_linear: lora_a of shape {tuple(a)} and lora_b of {tuple(b)} must be [r, {weight[1]}] "
            f"and [{weight[0]}, r] of one rank r > 0, for weight of {tuple(weight)}."
        )
    if bias is not None and bias != weight[:1]:
        raise ArgumentError(
            f"lora_linear: bias of shape {tuple(bias)} must be [{weight[0]}], for weight of {tuple(weight)}."
        )
    if autocast is None and (dtypes[0] is not dtypes[1] or dtypes[4] not in (None, dtypes[1])):
        raise ArgumentError(
            f"lora_linear: x is {dtypes[0]}, weight {dtypes[1]} and bias {dtypes[4]}; cast them to one "
            "dtype, or use autocast."
        )


def _check_devices(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    device = x.device
    for name, tensor in zip(("weight", "lora_a", "lora_b", "bias"), others, strict=True):
        if tensor is not None and tensor.device != device:
            raise ArgumentError(
                f"lora_linear: {name} is on {tensor.device} and x on {x.device}; move them to one device."
            )


def _unsupported(weight: torch.Tensor, bias: torch.Tensor | None, dropout: float) -> str | None:
    """Why the fused path cannot take these inputs, or None."""
    if dropout and torch.compiler.is_compiling():
        return "its dropout is a kernel that torch.compile cannot trace."
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} is trained; the fused path is for frozen ones."
    return None
