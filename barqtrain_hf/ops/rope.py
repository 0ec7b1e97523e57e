"""Rotary position embedding of queries and keys (Su et al. 2021, arXiv:2104.09864).

The first R of a head's D dimensions are turned by the angles of their token; the others pass through.

    half-split (Llama):     y1 = x1 * cos1 - x2 * sin1,  y2 = x2 * cos2 + x1 * sin2,  x1, x2 the halves of R
    interleaved (Cohere):   the same with x1 the even and x2 the odd dimensions

The backward pass is the transpose, which needs the angles only. Products and sum are fp32 and rounded once.
``cuda/rope.cu`` reads and writes q and k once, in one launch.
"""

from __future__ import annotations

from typing import Any

import torch

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError
from barqtrain_hf.ops._backend import Backend, cached, check_dtypes, use_cuda
from barqtrain_hf.ops._rope_kernels import MAX_DIM, MAX_ROWS, Pair, empty_like, rotate


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    interleaved: bool = False,
    unsqueeze_dim: int = 1,
    keep_dtype: bool = False,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Pair:
    """Turns queries and keys by the angles of their tokens, in one launch.

    Args:
        q, k: [B, H, T, D] with any number of heads each, or [B, T, H, D] if ``unsqueeze_dim`` is 2; of
            one dtype, any strides.
        cos, sin: [B or 1, T, R] for each token, or tables [positions, R] if ``position_ids`` is given; R
            is even and at most D. They get no gradients from the kernel: if they need any, PyTorch runs.
        position_ids: [B or 1, T] int64, each token's row in the tables; packed rows start again at 0.
        interleaved: pair neighbouring dimensions instead of the two halves.
        unsqueeze_dim: where the heads are, as in transformers.
        keep_dtype: return q's and k's dtype. By default the promoted dtype of q and cos, as transformers'
            Llama does.
        inplace: write over q and k, where autograd allows: neither leaves nor views that need gradients.
        backend: "cuda" for the kernel, "torch" for the reference, "auto" for the kernel where it runs.

    Returns:
        q and k, turned.

    Raises:
        ArgumentError: shapes that do not fit; ``inplace`` where autograd does not allow it, or where the
            result has another dtype.
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16; position_ids that are not int64.
        UnsupportedError: ``backend="cuda"`` where the kernel cannot run.
    """
    out = _out_dtype(q.dtype, k.dtype, cos.dtype, sin.dtype, keep_dtype)
    _check_shapes(q, k, cos, sin, position_ids, unsqueeze_dim)
    if inplace:
        _check_inplace(q, k, out)
    if use_cuda("apply_rope", backend, q, _unsupported(q, k, cos, sin, position_ids)):
        options = (position_ids, interleaved, unsqueeze_dim, out)
        if torch.compiler.is_compiling():
            turned = torch.ops.barq.rope(q, k, cos, sin, *options, False)
        else:
            # The kernel needs neighbouring dimensions side by side; elsewhere the result is copied back.
            here = inplace and q.stride(3) == 1 == k.stride(3)
            turned = _Rope.apply(q, k, cos, sin, *options, here)
            if here == inplace:
                return turned  # type: ignore[no-any-return]
    else:
        turned = apply_rope_reference(
            q,
            k,
            cos,
            sin,
            position_ids=position_ids,
            interleaved=interleaved,
            unsqueeze_dim=unsqueeze_dim,
            keep_dtype=keep_dtype,
        )
    return (q.copy_(turned[0]), k.copy_(turned[1])) if inplace else turned


def apply_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    interleaved: bool = False,
    unsqueeze_dim: int = 1,
    keep_dtype: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain PyTorch; arguments and result of :func:`apply_rope`."""
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        out_dtype = x.dtype if keep_dtype else torch.promote_types(x.dtype, cos.dtype)
        turned, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
        if interleaved:
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            other = torch.cat((-second, first), dim=-1)
        y = (turned * cos.float() + other * sin.float()).to(out_dtype)
        return torch.cat((y, rest.to(out_dtype)), dim=-1) if rest.shape[-1] else y

    return turn(q), turn(k)


@cached
def _out_dtype(
    q: torch.dtype, k: torch.dtype, cos: torch.dtype, sin: torch.dtype, keep_dtype: bool
) -> torch.dtype:
    check_dtypes("apply_rope", q=q, k=k, cos=cos, sin=sin)
    if q is not k or cos is not sin:
        raise ArgumentError(f"apply_rope: q is {q} and k {k}, cos {cos} and sin {sin}; cast them.")
    return q if keep_dtype else torch.promote_types(q, cos)


def _check_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    unsqueeze_dim: int,
) -> None:
    if unsqueeze_dim not in (1, 2):
        raise ArgumentError(f"apply_rope: unsqueeze_dim={unsqueeze_dim!r} must be 1 or 2.")
    heads = unsqueeze_dim
    q_shape, k_shape = q.shape, k.shape
    if (
        len(q_shape) != 4
        or len(k_shape) != 4
        or any(q_shape[d] != k_shape[d] for d in (0, 1, 2, 3) if d != heads)
    ):
        raise ArgumentError(
            f"apply_rope: q of shape {tuple(q_shape)} and k of {tuple(k_shape)} must be 4-D and differ "
            f"in the number of heads, dimension {heads}, only."
        )
    batch, length, dim = q_shape[0], q_shape[3 - heads], q_shape[3]
    rows = cos.shape if position_ids is None else (*position_ids.shape, *cos.shape[1:])
    tables = position_ids is None or (position_ids.dim() == 2 and cos.dim() == 2)
    if (
        not tables
        or cos.shape != sin.shape
        or len(rows) != 3
        or rows[0] not in (1, batch)
        or rows[1] != length
        or rows[2] > dim
        or rows[2] % 2
    ):
        given = "" if position_ids is None else f" for position_ids of {tuple(position_ids.shape)}"
        raise ArgumentError(
            f"apply_rope: cos of shape {tuple(cos.shape)} and sin of {tuple(sin.shape)}{given} do not "
            f"give {batch} or 1 rows of {length} tokens with an even number of angles up to {dim}."
        )
    if position_ids is not None and position_ids.dtype is not torch.int64:
        raise ArgumentTypeError(
            f"apply_rope: position_ids is {position_ids.dtype}; cast it to int64."
        )


def _check_inplace(q: torch.Tensor, k: torch.Tensor, out: torch.dtype) -> None:
    if out is not q.dtype:
        raise ArgumentError(f"apply_rope: inplace=True cannot turn {q.dtype} into {out}.")
    for name, tensor in (("q", q), ("k", k)):
        if (
            tensor.requires_grad
            and torch.is_grad_enabled()
            and (tensor.is_leaf or tensor._is_view())
        ):
            kind = "a leaf" if tensor.is_leaf else "a view"
            raise ArgumentError(
                f"apply_rope: {name} is {kind} that needs gradients, which autograd does not allow to "
                "change in place; drop inplace=True."
            )


def _unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> str | None:
    device = q.get_device()
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin), ("position_ids", position_ids)):
        if tensor is not None and tensor.get_device() != device:
            return f"{name} is on {tensor.device} and q on {q.device}."
    if q.shape[3] > MAX_DIM:
        return f"a head has {q.shape[3]} dimensions, more than {MAX_DIM}."
    if q.shape[0] > MAX_ROWS:
        return f"there are {q.shape[0]} rows, more than {MAX_ROWS}."
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        return "cos or sin needs gradients."
    if cos.dtype is not q.dtype and cos.dtype is not torch.float32 and q.dtype is not torch.float32:
        return f"q is {q.dtype} and cos {cos.dtype}; one of them must be float32."
    return None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None,
        interleaved: bool,
        heads_dim: int,
        out: torch.dtype,
        inplace: bool,
    ) -> Pair:
        if inplace:
            ctx.mark_dirty(q, k)
        turned = rotate(q, k, cos, sin, position_ids, interleaved, heads_dim, out, False, inplace)
        saved = (cos, sin) if position_ids is None else (cos, sin, position_ids)
        ctx.save_for_backward(*saved)
        ctx.options = (interleaved, heads_dim, q.dtype)
        return turned

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, *rest = ctx.saved_tensors
        ids = rest[0] if rest else None
        if torch.is_grad_enabled():  # create_graph
            grads = _RopeBackward.apply(dq, dk, cos, sin, ids, *ctx.options)
        else:
            interleaved, heads_dim, out = ctx.options
            grads = rotate(dq, dk, cos, sin, ids, interleaved, heads_dim, out, True)
        return *grads, None, None, None, None, None, None, None


class _RopeBackward(torch.autograd.Function):
    """The backward pass for create_graph: linear in dq and dk, so the forward pass is its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        dq: torch.Tensor,
        dk: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None,
        interleaved: bool,
        heads_dim: int,
        out: torch.dtype,
    ) -> Pair:
        ctx.save_for_backward(cos, sin, *(() if position_ids is None else (position_ids,)))
        ctx.options = (interleaved, heads_dim, dq.dtype)
        return rotate(dq, dk, cos, sin, position_ids, interleaved, heads_dim, out, True)

    @staticmethod
    def backward(ctx: Any, ddq: torch.Tensor, ddk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, *rest = ctx.saved_tensors
        ids = rest[0] if rest else None
        interleaved, heads_dim, out = ctx.options
        grads = _Rope.apply(ddq, ddk, cos, sin, ids, interleaved, heads_dim, out, False)
        return *grads, None, None, None, None, None, None


# torch.compile traces this instead of the Function above: opaque to it, so no graph break. Its backward
# pass is the op itself with the last flag set.
@torch.library.custom_op("barq::rope", mutates_args=(), device_types="cuda")
def _rope_op(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    interleaved: bool,
    heads_dim: int,
    out: torch.dtype,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotate(q, k, cos, sin, position_ids, interleaved, heads_dim, out, backward)


@_rope_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    interleaved: bool,
    heads_dim: int,
    out: torch.dtype,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    contiguous = [t if t.stride(3) == 1 else t.contiguous() for t in (q, k)]
    return empty_like(contiguous[0], heads_dim, out), empty_like(contiguous[1], heads_dim, out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, _, cos, sin, position_ids, interleaved, heads_dim, _, ctx.backwards = inputs
    ctx.save_for_backward(cos, sin, *(() if position_ids is None else (position_ids,)))
    ctx.options = (interleaved, heads_dim, q.dtype)


def _op_backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
    cos, sin, *rest = ctx.saved_tensors
    ids = rest[0] if rest else None
    grads = torch.ops.barq.rope(dq, dk, cos, sin, ids, *ctx.options, not ctx.backwards)
    return *grads, None, None, None, None, None, None, None


_rope_op.register_autograd(_op_backward, setup_context=_setup_context)
