"""The parity probe: does an op compute what a module's stock forward computes?

Run once per kind of module at install, on the module's own device, forward and gradients. It is what
makes an unknown model or a new transformers release safe: a mismatch keeps the stock forward.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from barqtrain_hf.errors import BarqError

T = TypeVar("T")
Tensors = Sequence[torch.Tensor]
Function = Callable[..., torch.Tensor | Tensors]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Enough numbers that the few on a rounding boundary stay few, and that a ratio of errors is no luck.
ELEMENTS = 4096
# Allowed ‖ours − stock‖ / ‖stock‖ of a gradient or a loss. Both sides round in the working dtype, so
# they differ by a few of its units in the last place.
_GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# An output must agree element by element but for the few that sit on a rounding boundary; another
# order of rounding changes a third of them.
_MAX_DIFFERING = 0.02
# The gate of the ops' own tests: error(ours) against error(stock), both measured against fp64.
_MAX_ERROR_RATIO = 1.25
# Units in the last place that stock's rounding after every step may add up to, over a whole tensor.
_MOST_ROUNDING = 64
# Rounding in fp32. Below it errors are not compared: a stock function that works in fp32 inside gives an
# oracle which is no better than that.
_FP32_ROUNDING = 1e-6
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def same_rounding(ours: torch.Tensor, stock: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why two outputs are not the same function, rounded to ``dtype`` in the same order, or None."""
    if ours.dtype is not stock.dtype or ours.shape != stock.shape:
        return f"gives {stock.dtype} {tuple(stock.shape)}, not {ours.dtype} {tuple(ours.shape)}"
    truth = stock.double()
    # One unit in the last place is 4e-4 in fp16 and 1e-7 in fp32, whose sums differ by a few.
    differing = ((ours.double() - truth).abs() > 1e-5 * truth.abs()).double().mean().item()
    if differing > _MAX_DIFFERING:
        return f"rounds {differing:.0%} of its outputs differently in {dtype}"
    return close(ours, stock, dtype)


def close(ours: torch.Tensor, stock: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why two tensors differ by more than rounding in ``dtype`` explains, or None."""
    difference = (ours.double() - stock.double()).norm()
    relative = (difference / stock.double().norm().clamp(min=1e-30)).item()
    tolerance = _GRADIENT_TOLERANCE.get(dtype, 0.0)
    if relative <= tolerance:  # NaN fails
        return None
    return f"differs by {relative:.1e}, more than {tolerance:.0e}"


def as_accurate(ours: torch.Tensor, stock: torch.Tensor, oracle: torch.Tensor) -> str | None:
    """Why ours is further than stock from what stock gives in fp64, or None.

    For stock functions that round after every step: ours, which rounds once, is another rounding of the
    same function. Which function it is must be known from fp32; 16 bits cannot tell, say, the two GELUs.
    """
    if ours.shape != oracle.shape:
        return f"gives {tuple(oracle.shape)}, not {tuple(ours.shape)}"
    truth = oracle.double()
    size = truth.norm().clamp(min=1e-30)
    mine = ((ours.double() - truth).norm() / size).item()
    theirs = ((stock.double() - truth).norm() / size).item()
    # Stock may do something else in one dtype alone, such as a clamp in fp16: no rounding is that large.
    if theirs > _MOST_ROUNDING * torch.finfo(stock.dtype).eps:
        return f"is not a rounding of fp64's in stock itself: {theirs:.1e} off in {stock.dtype}"
    if mine <= max(_MAX_ERROR_RATIO * theirs, _FP32_ROUNDING):  # NaN fails
        return None
    return f"is {mine:.1e} off in {ours.dtype}, stock {theirs:.1e}"


def first_difference(
    names: Sequence[str],
    ours: Sequence[torch.Tensor],
    stock: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> str | None:
    """The first of several tensors that is not `close`, as a sentence, or None."""
    for name, mine, theirs in zip(names, ours, stock, strict=True):
        reason = close(mine, theirs, dtype)
        if reason is not None:
            return f"{name} {reason}"
    return None


def first_inaccuracy(
    names: Sequence[str], ours: Tensors, stock: Tensors, oracle: Tensors
) -> str | None:
    """The first of several tensors that is not `as_accurate`, as a sentence, or None."""
    for name, mine, theirs, truth in zip(names, ours, stock, oracle, strict=True):
        reason = as_accurate(mine, theirs, truth)
        if reason is not None:
            return f"{name} {reason}"
    return None


@contextmanager
def training(module: nn.Module, mode: bool = True) -> Iterator[None]:
    """The module in training mode while the context lasts: in evaluation a dropout would not show."""
    before = {inner: inner.training for inner in module.modules()}
    try:
        for inner in before:
            inner.training = mode
        yield
    finally:
        for inner, was in before.items():
            inner.training = was


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 in fp32 while the context lasts, though the user may train in TF32.

    Otherwise stock itself is further from fp64 than rounding in fp32 explains, and tells nothing.
    """
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        before = matmul.allow_tf32
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = before
        return
    precision = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"  # what is set for all backends
        if matmul.fp32_precision != precision:
            matmul.fp32_precision = precision


class Mismatch(Exception):
    """A probe's way of saying that a module is not what an op computes, and why."""


def ask(question: Callable[[], T]) -> T | str:
    """The answer of a part of a probe, or why there is none. Want of memory ends the whole probe."""
    try:
        return question()
    except Mismatch as mismatch:
        return str(mismatch)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> str:
    if isinstance(error, BarqError):  # a dtype without kernel, a failed compilation
        return f"the op fails on the probe: {error}"
    # Whatever foreign code raises, the op is not for it.
    return f"its stock code fails on the probe: {type(error).__name__}: {error}"


# By cache and key; see `recall`.
_failures: dict[tuple[int, Any], str] = {}


def recall(
    answers: dict[Any, T | str],
    key: Any,
    question: Callable[[torch.Generator], T | str],
    device: torch.device,
) -> T | str:
    """The answer of a probe on a device, or why there is none; found once and kept in ``answers``.

    That a probe failed is kept until `forget_failures` only: memory may be free the next time.
    """
    if key in answers:
        return answers[key]
    failed = (id(answers), key)
    if failed not in _failures:
        try:
            with undisturbed(device) as generator:
                answers[key] = question(generator)
            return answers[key]
        except Mismatch as mismatch:
            answers[key] = str(mismatch)
            return answers[key]
        except Exception as error:
            _failures[failed] = _failure(error)
    return _failures[failed]


def forget_failures() -> None:
    """Called whenever a model is patched."""
    _failures.clear()


def draw(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> torch.Tensor:
    """A leaf of normal numbers that asks for a gradient."""
    numbers = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return (scale * numbers).to(dtype).requires_grad_()


def inaccuracy(
    ours: Function, stock: Function, inputs: Tensors, generator: torch.Generator
) -> str | None:
    """Why ours is further than stock from what stock gives in fp64, in an output or a gradient, or None."""
    upstream: list[torch.Tensor] = []

    def results(function: Function, given: Tensors) -> list[torch.Tensor]:
        outputs = function(*given)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        if not upstream:
            upstream.extend(draw(y.shape, torch.float32, generator).detach() for y in outputs)
        leaves = [tensor for tensor in given if tensor.requires_grad]
        dys = [dy.to(y.dtype) for dy, y in zip(upstream, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]

    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    theirs, mine = results(stock, inputs), results(ours, inputs)
    names = [f"output {i}" for i in range(len(upstream))]
    names += [f"gradient {i}" for i in range(len(mine) - len(upstream))]
    return first_inaccuracy(names, mine, theirs, results(stock, wide))


def accurate_dtypes(
    ours: Function,
    stock: Function,
    shapes: Sequence[Sequence[int]],
    generator: torch.Generator,
    frozen: Collection[int] = (),
) -> frozenset[torch.dtype]:
    """The dtypes in which ours is as accurate as stock; inputs in places of ``frozen`` get no gradient.

    Raises:
        Mismatch: it is not in fp32.
    """
    found = set()
    for dtype in DTYPES:
        # Small numbers, where activations differ, and large ones, which some clip.
        for scale in (1.0, 8.0):
            inputs = [
                draw(shape, dtype, generator, scale).requires_grad_(i not in frozen)
                for i, shape in enumerate(shapes)
            ]
            reason = ask(partial(inaccuracy, ours, stock, inputs, generator))
            if reason is not None:
                break
        if reason is None:
            found.add(dtype)
        elif dtype is torch.float32:
            raise Mismatch(reason)
    return frozenset(found)


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """What instances of one class may differ by: all their attributes are part of the key."""
    own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
    return (type(module), *((name, _value(own[name], module)) for name in sorted(own)))


def _value(value: Any, module: nn.Module) -> Any:
    """Plain values compare as such, functions and objects by identity. Keeps nothing alive."""
    if value is None or isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), *(_value(item, module) for item in value)
    if isinstance(value, dict):
        return dict, *((repr(name), _value(item, module)) for name, item in value.items())
    if isinstance(value, partial):
        return partial, *(_value(v, module) for v in (value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        owner = None if value.__self__ is module else _Same(value.__self__)
        return _Same(value.__func__), owner
    return _Same(value)


class _Same:
    """Equal for the same living object only."""

    def __init__(self, value: Any) -> None:
        self.address = id(value)
        try:
            self.get: Callable[[], Any] = weakref.ref(value)
        except TypeError:  # it cannot be held weakly
            self.get = lambda: None

    def __hash__(self) -> int:
        return self.address

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Same) and self.get() is not None and self.get() is other.get()


@contextmanager
def undisturbed(device: torch.device) -> Iterator[torch.Generator]:
    """A generator for the probe's numbers; the user's random state is the same afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield torch.Generator(device).manual_seed(0)
