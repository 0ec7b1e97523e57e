"""Rotary embedding inside attention modules, without touching the function that all models of a file share.

Attention calls ``apply_rotary_pos_emb`` by its global name, which `scope` makes ours in one model.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from barqtrain_hf.ops import apply_rope
from barqtrain_hf.patching import glu, probe, scope
from barqtrain_hf.patching.candidate import Answer, Candidate, because
from barqtrain_hf.patching.report import PatchReport

OP = "rope"
OPS = (OP,)
_NAME = "apply_rotary_pos_emb"
_UNSQUEEZE = "unsqueeze_dim"
# Where our function keeps the _Rotation that it is.
_ROTATION = "rotation"
# Of q and of cos: all alike, or cos and sin, or q and k after a norm, kept in fp32 under autocast.
_DTYPES = tuple(
    (q, cos) for q in probe.DTYPES for cos in probe.DTYPES if q is cos or torch.float32 in (q, cos)
)
_HEAD_DIM, _TOKENS = 16, 64
_probed: dict[tuple[Any, ...], _Rotation | str] = {}


class _Rotation(NamedTuple):
    """What a stock function computes.

    Attributes:
        interleaved: pairs are neighbours, not halves.
        unsqueeze_dims: the values of that argument which it takes, the default first.
        partial: whether cos may be shorter than a head.
        keep_dtype: from the dtypes of q and cos to whether q's is returned and not the promoted one.
    """

    interleaved: bool
    unsqueeze_dims: tuple[int, ...]
    partial: bool
    keep_dtype: dict[tuple[torch.dtype, torch.dtype], bool]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Modules whose forward calls the function by its global name, and other attention."""
    # Of one forward one copy for all layers of a model.
    copies: dict[types.FunctionType, types.FunctionType] = {}
    for name, module in model.named_modules():
        lack = _lack(type(module))
        if lack is None:
            yield Candidate(OP, name, module, partial(_build, module, copies))
        elif scope.is_called_attention(module, _lack):
            yield Candidate(OP, name, module, because(lack))


def is_bound(forward: Any) -> bool:
    """Whether it is a function bound by this file."""
    return hasattr(getattr(forward, "__globals__", {}).get(_NAME), _ROTATION)


def deferring(forward: Callable[..., Any], later: Callable[..., Any]) -> dict[str, Any] | None:
    """The global, by its name, over which attention may turn q and k itself; None if it is not ours there.

    Args:
        forward: one bound by this file.
        later: takes our function, q, k, cos, sin and ``interleaved`` and returns what stands for q and k;
            it is called where `apply_rope` would be, with the heads before the tokens.
    """
    if not is_bound(forward):
        return None
    turn = forward.__globals__[_NAME]  # type: ignore[attr-defined]
    rotation: _Rotation = getattr(turn, _ROTATION)
    if rotation.unsqueeze_dims[0] != 1:
        return None

    def apply_rotary_pos_emb(
        q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if args or kwargs or _unusual(q, k, cos, sin, 2, rotation.partial) is not None:
            return turn(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return, misc]
        if (q.dtype, cos.dtype) not in rotation.keep_dtype:
            return turn(q, k, cos, sin)  # type: ignore[no-any-return, misc]
        return later(turn, q, k, cos, sin, rotation.interleaved)  # type: ignore[no-any-return]

    return {_NAME: apply_rotary_pos_emb}


def _lack(cls: type[nn.Module]) -> str | None:
    """Why a class's forward cannot be bound over other globals, or None."""
    reason = scope.lack(cls, _NAME)
    if reason is None and not isinstance(cls.forward.__globals__.get(_NAME), types.FunctionType):
        return f"{_NAME} is not a plain function there"
    return reason


def _build(
    module: nn.Module,
    copies: dict[types.FunctionType, types.FunctionType],
    report: PatchReport,
) -> Answer:
    weight = next(module.parameters(), None)
    if weight is None:
        return "it has no weights, so its device is not known"
    reason = glu.unusable(weight)
    if reason is not None:
        return reason
    forward = type(module).forward
    if forward not in copies:
        original = forward.__globals__[_NAME]
        key = (weakref.ref(original), weight.device)
        found = probe.recall(_probed, key, partial(_probe, original), weight.device)
        if isinstance(found, str):
            return f"{original.__module__}.{_NAME} is another rotation: {found}"
        copies[forward] = scope.with_globals(
            forward, {_NAME: _replacement(original, found, report)}
        )
    return OP, copies[forward]


def _replacement(
    original: Callable[..., Any], rotation: _Rotation, report: PatchReport
) -> Callable[..., Any]:
    interleaved, dims, partly, keep_dtype = rotation

    def apply_rotary_pos_emb(
        q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dim = kwargs.get(_UNSQUEEZE, dims[0]) if kwargs else dims[0]
        unusual: str | None
        if args or len(kwargs) > (_UNSQUEEZE in kwargs) or dim not in dims:
            unusual = "called with other arguments than q, k, cos, sin and unsqueeze_dim"
        else:
            unusual = _unusual(q, k, cos, sin, 3 - dim, partly)
        if unusual is None:
            keep = keep_dtype.get((q.dtype, cos.dtype))
            if keep is not None:
                return apply_rope(
                    q,
                    k,
                    cos,
                    sin,
                    interleaved=interleaved,
                    unsqueeze_dim=dim,
                    keep_dtype=keep,
                )
            unusual = f"not probed, or not equal, for {q.dtype} and cos in {cos.dtype}"
        report.fall_back(OP, unusual)
        return original(q, k, cos, sin, *args, **kwargs)

    setattr(apply_rotary_pos_emb, _ROTATION, rotation)
    return apply_rotary_pos_emb


def _unusual(q: Any, k: Any, cos: Any, sin: Any, tokens: int, partly: bool) -> str | None:
    """Why a call is left to the stock function; ``tokens`` is the dimension of q and k that counts them."""
    plain = torch.Tensor
    if not (type(q) is type(k) is type(cos) is type(sin) is plain):
        return "called with something else than plain tensors"
    if q.dtype is not k.dtype or cos.dtype is not sin.dtype:
        return "q and k, or cos and sin, differ in dtype"
    q_shape, k_shape, shape = q.shape, k.shape, cos.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or len(shape) != 3 or shape != sin.shape:
        return "q and k have not four dimensions, or cos and sin not three"
    batch, count, head_dim = q_shape[0], q_shape[tokens], q_shape[3]
    if k_shape[0] != batch or k_shape[tokens] != count or k_shape[3] != head_dim:
        return "q and k differ in batch, tokens or head size"
    if shape[0] not in (1, batch) or shape[1] != count:
        return "cos and sin are not of these tokens"
    if shape[2] > head_dim or (shape[2] < head_dim and not partly):
        return "cos and sin have another size than a head"
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin needs a gradient"
    return None


def _probe(original: Callable[..., Any], generator: torch.Generator) -> _Rotation:
    """What the function computes.

    Raises:
        probe.Mismatch: it is no rotation of ours.
    """
    parameter = inspect.signature(original).parameters.get(_UNSQUEEZE)
    default = 1 if parameter is None else parameter.default
    fp32 = (torch.float32, torch.float32)
    check = partial(_inaccuracy, original, generator)
    reasons = []
    for interleaved in (False, True):
        reasons.append(check(default, fp32, _HEAD_DIM, interleaved, backend="torch"))
        if reasons[-1] is None:
            break
    else:
        raise probe.Mismatch(f"as halves, {reasons[0]}; as neighbours, {reasons[1]}")
    keep_dtype = {}
    for dtypes in _DTYPES:
        reason = probe.ask(partial(check, default, dtypes, _HEAD_DIM, interleaved))
        if reason is None:
            keep_dtype[dtypes] = _keeps_dtype(original, default, dtypes, generator)
        elif dtypes == fp32:
            raise probe.Mismatch(reason)
    dims = [default]
    if parameter is not None:
        stated = {d: partial(check, d, fp32, _HEAD_DIM, interleaved) for d in {1, 2} - {default}}
        dims += [d for d, question in stated.items() if probe.ask(question) is None]
    shorter = partial(check, default, fp32, _HEAD_DIM // 2, interleaved)
    return _Rotation(interleaved, tuple(dims), probe.ask(shorter) is None, keep_dtype)


def _inaccuracy(
    original: Callable[..., Any],
    generator: torch.Generator,
    dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    size: int,
    interleaved: bool,
    **options: Any,
) -> str | None:
    """Why our rotation of ``size`` dimensions of a head is not the stock one, or None."""
    inputs = _inputs(dim, dtypes, size, generator)
    keep = _keeps_dtype(original, dim, dtypes, generator)
    ours = partial(
        apply_rope, interleaved=interleaved, unsqueeze_dim=dim, keep_dtype=keep, **options
    )
    return probe.inaccuracy(ours, _at(original, dim), inputs, generator)


def _keeps_dtype(
    original: Callable[..., Any],
    dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    generator: torch.Generator,
) -> bool:
    """Whether the function returns q's dtype where cos has a wider one."""
    found = [y.dtype for y in _at(original, dim)(*_inputs(dim, dtypes, _HEAD_DIM, generator))]
    for keep, dtype in ((False, torch.promote_types(*dtypes)), (True, dtypes[0])):
        if found == [dtype, dtype]:
            return keep
    raise probe.Mismatch(f"it turns {dtypes[0]} by {dtypes[1]} into {found[0]} and {found[-1]}")


def _at(original: Callable[..., Any], dim: int) -> Callable[..., Any]:
    parameter = inspect.signature(original).parameters.get(_UNSQUEEZE)
    stated = parameter is not None and parameter.default != dim
    return partial(original, **{_UNSQUEEZE: dim}) if stated else original


def _inputs(
    dim: int, dtypes: tuple[torch.dtype, torch.dtype], size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """q and k that ask for gradients, and cos and sin that are no circle's: halves need not be alike."""
    tensors = []
    for heads in (3, 2):
        shape = [2, _TOKENS, _HEAD_DIM]
        shape.insert(dim, heads)
        tensors.append(probe.draw(shape, dtypes[0], generator))
    for _ in ("cos", "sin"):
        tensors.append(probe.draw((2, _TOKENS, size), dtypes[1], generator).detach())
    return tensors
