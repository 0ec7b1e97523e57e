"""Adapters (LoRA) beside frozen layers that are called, whatever they compute: quantised ones, above all.

    y = base(x) + s (x A^T) B^T
    t = x A^T,  u = s dy B,  dx = (base's own) + u A,  dA = u^T x,  dB = s dy^T t

`lora_linear` has the weight and adds both products up in one. Here base is a function: its product and its
backward pass stay its own, and the adapter's part is added to their results where they lie, by products that
end in an addition. x is not copied to the adapter's dtype, and nothing of y's size is made. Kept for the
backward pass, beside what base keeps: x, and t, which is N rows of the rank.

In autograd's graph the adapter is two nodes, of which base's are in between. `_Low` hands x on to base and
gives t, so that in the backward pass it gets base's gradient of x together with u; `_Added` adds t's product
to y. Layers of one input share the first: x is read once for all t and once for all dA, u A is one product.

Dropout is as in `lora_linear`: each layer's mask is kept as a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops._backend import Backend, autocast_dtype, cached, check_dtypes, use_cuda
from barqtrain_hf.ops._dropout import Masks
from barqtrain_hf.ops._lora_gradients import low_rank_gradients
from barqtrain_hf.ops._lora_products import low_products, summed
from barqtrain_hf.ops._lora_ranks import low_ranks

_Shape = tuple[int, ...]
Base = Callable[[torch.Tensor], torch.Tensor]


class LoraLayer(NamedTuple):
    """A frozen layer and its adapter, as of :func:`lora_layer`."""

    base: Base
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    dropout: float = 0.0


def lora_layer(
    x: torch.Tensor,
    base: Base,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """``base(x) + scaling * (drop(x) @ lora_a.T) @ lora_b.T``.

    Args:
        x: [..., I], fp32, fp16 or bf16, any strides.
        base: [..., I] to [..., O], a frozen layer that multiplies x by something. It is called once. What it
            returns, and what its backward pass gives for x, must be new tensors that nobody else has: they
            are written to. A view is recognised and left as it is.
        lora_a: [r, I], fp32, fp16 or bf16. It is rounded to x's dtype, or autocast's, for the products; its
            gradient is summed in fp32.
        lora_b: [O, r], as lora_a.
        scaling: of the adapter's part.
        dropout: as of `lora_linear`.
        backend: "cuda" for the fused path, "torch" for the reference, "auto" for the fused one on a GPU.

    Returns:
        [..., O] in the dtype that base returns.

    Raises:
        ArgumentError: shapes or devices that do not fit; a dropout that is not in [0, 1).
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"`` off a GPU, or inside torch.compile.
    """
    layer = LoraLayer(base, lora_a, lora_b, scaling, dropout)
    return lora_layers(x, [layer], backend=backend)[0]


def lora_layers(
    x: torch.Tensor, layers: Sequence[LoraLayer], *, backend: Backend = "auto"
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_layer` of each layer, for one input; arguments, results and errors are the same."""
    for _, a, b, _, dropout in layers:
        _check((x.shape, a.shape, b.shape), (x.dtype, a.dtype, b.dtype))
        for name, tensor in (("lora_a", a), ("lora_b", b)):
            if tensor.device != x.device:
                raise ArgumentError(
                    f"lora_layer: {name} is on {tensor.device} and x on {x.device}; move them to one "
                    "device."
                )
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(
                f"lora_layer: dropout={dropout!r} must be at least 0 and below 1, a probability."
            )
    reason = None
    if torch.compiler.is_compiling():
        reason = "it writes to what base returns, which torch.compile cannot trace."
    if use_cuda("lora_layer", backend, x, reason):
        return apply(x, layers, autocast_dtype(x) or x.dtype)
    return tuple(lora_layer_reference(x, *layer) for layer in layers)


def lora_layer_reference(
    x: torch.Tensor,
    base: Base,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The definition in plain PyTorch, step by step as PEFT computes it; arguments as :func:`lora_layer`."""
    y = base(x)
    _check_output(y, x, lora_b)
    dropped = x.to(lora_a.dtype)
    if dropout:
        dropped = F.dropout(dropped, dropout)
    return y + (F.linear(F.linear(dropped, lora_a), lora_b) * scaling).to(y.dtype)


def apply(
    x: torch.Tensor, layers: Sequence[LoraLayer], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The fused path, on any device; inputs as `lora_layers` has checked them."""
    cast = x if x.dtype is dtype else x.to(dtype)
    lora_a, lora_b = [layer.lora_a for layer in layers], [layer.lora_b for layer in layers]
    with torch.no_grad():
        a, ups = low_ranks(lora_a, lora_b, [layer.scaling for layer in layers], dtype)
    widths = tuple(up.shape[1] for up in ups)
    dropouts = tuple(layer.dropout for layer in layers)
    given, *lows = _Low.apply(x, cast, a, (widths, dropouts), *lora_a)
    if not x.requires_grad:
        given = x  # of which base must not compute a gradient that nobody wants
    ys = []
    for layer, low, up in zip(layers, lows, ups, strict=True):
        y = layer.base(given)
        _check_output(y, x, layer.lora_b)
        ys.append(_Added.apply(y, low, up, layer.lora_b, layer.scaling))
    return tuple(ys)


class _Low(torch.autograd.Function):
    """x as it is, for base, and t of each layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cast: torch.Tensor,  # x in the dtype that is computed in; gets no gradient of its own
        a: torch.Tensor,  # all of lora_a, in that dtype
        numbers: tuple[tuple[int, ...], tuple[float, ...]],
        *lora_a: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        widths, dropouts = numbers
        masks = Masks.draw(dropouts, x.device) if any(dropouts) else None
        rows = cast.reshape(-1, cast.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            t = rows @ a.T if masks is None else low_products(rows, a.split(widths), masks)
        seed = () if masks is None else (masks.seed,)
        ctx.save_for_backward(cast, a, *lora_a, *seed)
        ctx.widths, ctx.dropouts, ctx.dtype = widths, dropouts, x.dtype
        ctx.set_materialize_grads(False)
        return x, *t.split(widths, dim=1)

    @staticmethod
    def backward(
        ctx: Any, dx: torch.Tensor | None, *us: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        cast, a, *rest = ctx.saved_tensors
        masks = Masks(ctx.dropouts, rest.pop()) if any(ctx.dropouts) else None
        given = [i for i, u in enumerate(us) if u is not None]
        das: list[torch.Tensor | None] = [None] * len(rest)
        if not given:
            return dx, None, None, None, *das
        if torch.is_grad_enabled():  # create_graph
            dx, das = _differentiable(dx, us, cast, rest, masks, ctx)
            return dx, None, None, None, *das
        rows = cast.reshape(-1, cast.shape[-1])
        parts = [part for part, u in zip(a.split(ctx.widths), us, strict=True) if u is not None]
        # A column of zeros for a layer whose result is not used would give its A a gradient.
        chosen = [u for u in us if u is not None]
        u = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)
        each = u.split([part.shape[0] for part in parts], dim=1)
        with torch.autocast(cast.device.type, enabled=False):
            if any(ctx.needs_input_grad[4:]):
                one = masks is None
                sums = summed(u, rows).split([len(part) for part in parts]) if one else ()
                for k, i in enumerate(given):
                    if ctx.needs_input_grad[4 + i]:
                        da = sums[k] if masks is None else summed(each[k], masks.drop(rows, i))
                        das[i] = da[: rest[i].shape[0]].to(rest[i].dtype)
            if ctx.needs_input_grad[0]:
                if dx is None:  # base has none
                    dx = torch.zeros(cast.shape, dtype=ctx.dtype, device=cast.device)
                if masks is None:
                    together = parts[0] if len(parts) == 1 else torch.cat(parts)
                    dx = _plus(dx, u, a if len(parts) == len(us) else together)
                else:
                    for k, i in enumerate(given):
                        dx = _plus(dx, each[k], parts[k], masks, i)
        return dx, None, None, None, *das


class _Added(torch.autograd.Function):
    """y, which is base's, plus the adapter's part."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        low: torch.Tensor,
        up: torch.Tensor,  # lora_b times the scaling, in low's dtype
        lora_b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        # To a view of something autograd would add in its own way, or refuse to if it is a Function's: for
        # that PEFT copies every result of 4-bit layers.
        alone = not y._is_view()
        with torch.autocast(y.device.type, enabled=False):
            out = _plus(y if alone else y.clone(), low, up.T)
        if out is y:
            ctx.mark_dirty(y)
        ctx.save_for_backward(low, up, lora_b)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        low, up, lora_b = ctx.saved_tensors
        u = db = None
        _, need_low, _, need_b, _ = ctx.needs_input_grad
        if dy is None or not (need_low or need_b):
            return dy, None, None, None, None
        rank = lora_b.shape[1]
        with torch.autocast(dy.device.type, enabled=False):
            rows = dy.reshape(-1, dy.shape[-1]).to(up.dtype)
            if torch.is_grad_enabled():  # create_graph
                u = F.pad(rows @ (lora_b.to(up.dtype) * ctx.scaling), (0, low.shape[1] - rank))
            elif need_low:
                u = low.new_empty(low.shape)
                if need_b:
                    db = low_rank_gradients(rows, up, low, u, lora_b, ctx.scaling)
                if db is None:
                    torch.mm(rows, up, out=u)
            if need_b and db is None:
                db = (summed(rows, low)[:, :rank] * ctx.scaling).to(lora_b.dtype)
        return dy, u, None, db, None


def _plus(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    masks: Masks | None = None,
    layer: int = 0,
) -> torch.Tensor:
    """``out + left @ right``, under a layer's mask, in out where it is contiguous."""
    out = out.contiguous()
    flat = out.view(-1, out.shape[-1])
    # To fp32 what is added is fp32 too: a product over the rank is as fast as its result is written.
    left, right = left.to(out.dtype), right.to(out.dtype)
    if masks is None or not masks.probabilities[layer]:
        flat.addmm_(left, right)
    else:
        masks.add(flat, left @ right, layer)
    return out


def _differentiable(
    dx: torch.Tensor | None,
    us: Sequence[torch.Tensor | None],
    cast: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    masks: Masks | None,
    ctx: Any,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradients of x and of each A, by functions that have gradients themselves."""
    das: list[torch.Tensor | None] = []
    with torch.autocast(cast.device.type, enabled=False):
        for i, (u, a) in enumerate(zip(us, lora_a, strict=True)):
            da = None
            if u is not None:
                u = u[:, : a.shape[0]]
                dropped = cast if masks is None else masks.differentiable(cast, i)
                da = (u.T @ dropped.reshape(-1, a.shape[1])).to(a.dtype)
                part = (u @ a.to(u.dtype)).view(cast.shape)
                part = part if masks is None else masks.differentiable(part, i)
                part = part.to(ctx.dtype)
                dx = part if dx is None else dx + part
            das.append(da)
    return dx, das


@cached
def _check(
    shapes: tuple[_Shape, _Shape, _Shape], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    """Refuses shapes and dtypes that do not fit."""
    x, a, b = shapes
    check_dtypes("lora_layer", **dict(zip(("x", "lora_a", "lora_b"), dtypes, strict=True)))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise ArgumentError(
            f"lora_layer: lora_a of shape {tuple(a)} and lora_b of {tuple(b)} must be [r, I] and [O, r] of "
            "one rank r > 0."
        )
    if not x or x[-1] != a[1]:
        raise ArgumentError(
            f"lora_layer: x of shape {tuple(x)} does not fit lora_a of {tuple(a)}; they must be [..., I] "
            "and [r, I]."
        )


def _check_output(y: torch.Tensor, x: torch.Tensor, lora_b: torch.Tensor) -> None:
    """Refuses what base returns if the adapter's part cannot be added to it."""
    if y.shape != (*x.shape[:-1], lora_b.shape[0]):
        raise ArgumentError(
            f"lora_layer: base returns shape {tuple(y.shape)} for x of {tuple(x.shape)}, which does not fit "
            f"lora_b of {tuple(lora_b.shape)}; it must be [..., O] for [O, r]."
        )
