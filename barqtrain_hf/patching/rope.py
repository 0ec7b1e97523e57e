"""Rotary embedding inside attention modules, without touching the function that all models of a file share.

Attention calls ``apply_rotary_pos_emb`` by its global name. What is bound on the instance is the class's own
forward with the same code, over a copy of its module's globals in which that one name is ours. A later
change of those globals is not seen until the model is patched again.
"""

from __future__ import annotations

import dis
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from barqtrain_hf.ops import apply_rope
from barqtrain_hf.patching import glu, probe
from barqtrain_hf.patching.candidate import Answer, Candidate, because
from barqtrain_hf.patching.report import PatchReport

OP = "rope"
OPS = (OP,)
_NAME = "apply_rotary_pos_emb"
_UNSQUEEZE = "unsqueeze_dim"
_CALLED_ATTENTION = ("attention", "attn")
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
        elif _is_called_attention(module):
            yield Candidate(OP, name, module, because(lack))


def _lack(cls: type[nn.Module]) -> str | None:
    """Why a class's forward cannot be bound over other globals, or None."""
    forward = cls.forward
    plain = inspect.unwrap(forward)
    if not isinstance(plain, types.FunctionType) or not _calls_by_name(plain):
        return f"its forward does not call {_NAME}"
    if plain is not forward:
        return f"its forward is wrapped, and {_NAME} is called inside"
    if not isinstance(plain.__globals__.get(_NAME), types.FunctionType):
        return f"{_NAME} is not a plain function there"
    return None


def _calls_by_name(function: types.FunctionType) -> bool:
    if _NAME not in function.__code__.co_names:
        return False
    instructions = dis.get_instructions(function)
    return any(i.opname == "LOAD_GLOBAL" and i.argval == _NAME for i in instructions)


def _is_called_attention(module: nn.Module) -> bool:
    called = type(module).__name__.lower()
    return (
        any(word in called for word in _CALLED_ATTENTION)
        and next(module.parameters(), None) is not None
        and all(_lack(type(inner)) is not None for inner in module.modules())
    )


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
        copies[forward] = _with_global(forward, _replacement(original, found, report))
    return OP, copies[forward]


def _with_global(
    forward: types.FunctionType, replacement: Callable[..., Any]
) -> types.FunctionType:
    """A copy of a function for which one global is another."""
    scope = {**forward.__globals__, _NAME: replacement}
    # torch.compile looks the globals of a module that has a name up in that module.
    del scope["__name__"]
    copy = types.FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    copy.__dict__.update(forward.__dict__)
    copy.__module__, copy.__qualname__ = forward.__module__, forward.__qualname__
    return copy


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
