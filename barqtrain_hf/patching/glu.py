"""Gated MLPs, ``down(act(gate(x)) * up(x))`` with gate and up apart or in one projection.

The projections are called as modules, so LoRA, quantisation and hooks stay what they are; one launch takes
the place of the activation and the product, which `recompute` keeps out of the graph. For the probe the
projections are stood in for by modules that return given tensors: no weight is needed, wherever it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, permutations
from typing import Any, NamedTuple

import torch
from torch import nn

from barqtrain_hf.ops import geglu, swiglu
from barqtrain_hf.ops._backend import autocast_dtype
from barqtrain_hf.patching import probe, recompute
from barqtrain_hf.patching.candidate import Answer, Candidate, because
from barqtrain_hf.patching.report import PatchReport

OP = "glu"
OPS = (OP,)
_CALLED_MLP = ("mlp", "feedforward", "feed_forward", "ffn")
# Activations by their names.
GATED: dict[str, Callable[..., torch.Tensor]] = {
    "silu": swiglu,
    "gelu_tanh": partial(geglu, approximate="tanh"),
    "gelu": partial(geglu, approximate="none"),
}
_probed: dict[tuple[Any, ...], _Layout | str] = {}


class _Layout(NamedTuple):
    """How an MLP is built: names of its projections and of its activation.

    ``inward`` are called with the MLP's input, in this order: one with gate and up, or two, of which
    ``gate`` is the index of the gate.
    """

    inward: tuple[str, ...]
    gate: int
    down: str
    activation: str
    dtypes: frozenset[torch.dtype]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Modules of two or three linear projections whose sizes fit, and what is only called an MLP."""
    called: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        projections = _projections(module)
        if projections is not None:
            yield Candidate(OP, name, module, partial(_build, module, *projections))
        elif _is_called_mlp(name, module) and next(module.children(), None) is not None:
            called.append((name, module))
    for name, module in called:
        # A block of experts holds them, a plain MLP its activation: they speak for themselves.
        matched = any(is_gated(inner) or is_experts(inner) for inner in module.modules())
        if not matched and not any(is_empty(inner) for inner in module.children()):
            reason = "it has no gate, up and down projections of fitting sizes"
            yield Candidate(OP, name, module, because(reason))


def is_gated(module: nn.Module) -> bool:
    """Whether a module has the structure of a gated MLP."""
    return _projections(module) is not None


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of a mixture's experts."""
    stacked = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(p is not None and len(getattr(p, "ds_shape", p.shape)) == 3 for p in stacked)


@functools.cache
def takes_one_tensor(forward: Callable[..., Any]) -> bool:
    """Whether a class's forward needs one argument and no more."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(needed) == 1 and needed[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def is_probed(x: Any, dtypes: frozenset[torch.dtype]) -> bool:
    """Whether an input is a plain tensor of one of the dtypes in which the op was found equal."""
    return type(x) is torch.Tensor and x.dtype in dtypes


def unusable(weight: torch.Tensor) -> str | None:
    """Why a module with such a weight cannot be probed without it, or cannot use the ops, or None."""
    if weight.is_meta:
        return "its weights are not on a device yet, so it cannot be probed"
    return "its weights are torch.float64" if weight.dtype is torch.float64 else None


def stateful(module: nn.Module) -> str | None:
    """Why a module cannot be probed once for all like it, or None."""
    if any(buffer is not None for buffer in module._buffers.values()):
        return "it has buffers, on which its answer may depend"
    return None


def is_empty(module: nn.Module) -> bool:
    """Whether there is nothing inside: an activation, or a dropout."""
    inside = (module.parameters(), module.buffers(), module.children())
    return all(next(iterator, None) is None for iterator in inside)


def _is_called_mlp(name: str, module: nn.Module) -> bool:
    names = (type(module).__name__.lower(), name.rpartition(".")[2].lower())
    return any(word in called for word in _CALLED_MLP for called in names)


def _projections(module: nn.Module) -> tuple[list[str], list[str]] | None:
    """Names of the projections that may be gate and up, and of those that may be down; None for no MLP."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, child in module.named_children():
        size = (getattr(child, "in_features", None), getattr(child, "out_features", None))
        if isinstance(size[0], int) and isinstance(size[1], int):
            sizes[name] = size  # type: ignore[assignment]
        elif not is_empty(child):
            return None
    own = any(parameter is not None for parameter in module._parameters.values())
    if len(sizes) not in (2, 3) or own or not takes_one_tensor(type(module).forward):
        return None
    halves = 2 if len(sizes) == 2 else 1
    for down, (inner, outer) in sizes.items():
        inward = [name for name in sizes if name != down]
        if all(sizes[name] == (outer, halves * inner) for name in inward):
            # Of square ones any may be down.
            square = len(inward) == 2 and inner == outer
            return (list(sizes), list(sizes)) if square else (inward, [down])
    return None


def _build(
    module: nn.Module, inward: list[str], downward: list[str], report: PatchReport
) -> Answer:
    # What is quantised may have nothing but buffers.
    weight = next(chain(module.parameters(), module.buffers()), None)
    if weight is None:
        return "it has no weights, so its device is not known"
    reason = unusable(weight) or stateful(module)
    if reason is not None:
        return reason
    down = getattr(module, downward[0])
    sizes = (down.in_features, down.out_features)
    key: tuple[Any, ...] = (probe.kind_of(module), *inward, *downward, *sizes, weight.device)
    key += tuple(
        (n, probe.kind_of(child)) for n, child in module.named_children() if is_empty(child)
    )
    question = partial(_probe, module, inward, downward, sizes)
    found = probe.recall(_probed, key, question, weight.device)
    if isinstance(found, str):
        return f"{type(module).__name__}: {found}"
    return OP, _new_forward(found, report)


def _new_forward(layout: _Layout, report: PatchReport) -> Callable[..., Any]:
    inward, gate_index, down, activation, dtypes = layout
    op = GATED[activation]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unusual = _unusual_call(args, kwargs, dtypes)
        if unusual is not None:
            report.fall_back(OP, unusual)
            return type(self).forward(self, *args, **kwargs)
        parts = [getattr(self, name)(args[0]) for name in inward]
        unusual = _unusual(parts, dtypes)
        if unusual is None:
            if gate_index:
                parts.reverse()
            product, layer = op(*parts), getattr(self, down)
            if recompute.applies(layer, product):
                return recompute.call_without_saving(layer, product, op, parts)
            del parts  # nothing else may hold them
            return layer(product)
        report.fall_back(OP, unusual)
        # The stock forward, for which the projections are not run again.
        with _standing_in(self, dict(zip(inward, parts, strict=True)), {}):
            return type(self).forward(self, args[0])

    return forward


def _unusual_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtypes: frozenset[torch.dtype]
) -> str | None:
    """Why a call is left to the stock forward, as far as it shows before the projections are called."""
    if kwargs:
        return "called with keyword arguments"
    if len(args) != 1:
        return "called with more than the hidden states"
    x = args[0]
    if type(x) is not torch.Tensor:
        return f"called with a {type(x).__name__}"
    dtype = autocast_dtype(x) or x.dtype
    return None if dtype in dtypes else f"not probed, or not equal, for {dtype}"


def _unusual(parts: Sequence[Any], dtypes: frozenset[torch.dtype]) -> str | None:
    first = parts[0]
    for part in parts:
        if type(part) is not torch.Tensor:
            return f"a projection gives a {type(part).__name__}"
        if part.dtype not in dtypes:
            return f"not probed, or not equal, for {part.dtype}"
    if len(parts) == 2 and (first.dtype is not part.dtype or first.shape != part.shape):
        return "gate and up differ in dtype or shape"
    return None


class _Given(nn.Module):
    """Stands for a projection: returns what it is given and remembers what it was called with."""

    def __init__(self, name: str, output: Any, calls: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.calls, self.output = name, calls, output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls[self.name] = args[0] if len(args) == 1 and not kwargs else None
        return self.output


@contextmanager
def _standing_in(
    module: nn.Module, outputs: dict[str, Any], calls: dict[str, Any]
) -> Iterator[None]:
    """The projections return ``outputs`` while the context lasts; their inputs go into ``calls``."""
    stock = {name: module._modules[name] for name in outputs}
    module._modules.update({n: _Given(n, output, calls) for n, output in outputs.items()})
    try:
        yield
    finally:
        module._modules.update(stock)


def _probe(
    module: nn.Module,
    inward: list[str],
    downward: list[str],
    sizes: tuple[int, int],
    generator: torch.Generator,
) -> _Layout:
    """How the MLP is built.

    Raises:
        probe.Mismatch: it is no gated MLP of ours.
    """
    for index, down in enumerate(downward, 1):
        names = [name for name in inward if name != down]
        width = sizes[0] * (2 if len(names) == 1 else 1)
        shapes = [(1, max(2, -(-probe.ELEMENTS // sizes[0])), width) for _ in names]
        try:
            layout = _layout(module, names, down, shapes, sizes[1], generator)
        except probe.Mismatch:
            if index == len(downward):
                raise
            continue
        break
    order = slice(None, None, -1 if layout.gate else 1)

    def ours(*parts: torch.Tensor) -> torch.Tensor:
        return GATED[layout.activation](*parts[order])

    def stock(mode: bool, *parts: torch.Tensor) -> torch.Tensor:
        given = dict(zip(layout.inward, parts, strict=True))
        return _stock(module, given, layout.down, sizes[1], generator, mode)[0]

    in_training, in_evaluation = (
        probe.accurate_dtypes(ours, partial(stock, mode), shapes, generator)
        for mode in (True, False)
    )
    return layout._replace(dtypes=in_training & in_evaluation)


def _layout(
    module: nn.Module,
    names: list[str],
    down: str,
    shapes: Sequence[Sequence[int]],
    width: int,
    generator: torch.Generator,
) -> _Layout:
    """Which projection is the gate and which activation it is, told in fp32."""
    parts = {
        name: probe.draw(shape, torch.float32, generator, 4.0)
        for name, shape in zip(names, shapes, strict=True)
    }
    stock, order = _stock(module, parts, down, width, generator)
    reason: str | None = None
    for activation, op in GATED.items():
        for indices in permutations(range(len(order))):
            ours = op(*(parts[order[i]] for i in indices), backend="torch")
            reason = probe.as_accurate(ours, stock, stock)
            if reason is None:
                return _Layout(tuple(order), indices[0], down, activation, frozenset())
    raise probe.Mismatch(
        f"what {down} gets is no SwiGLU or GeGLU of the other projections: {reason}"
    )


def _stock(
    module: nn.Module,
    parts: dict[str, torch.Tensor],
    down: str,
    width: int,
    generator: torch.Generator,
    mode: bool = True,
) -> tuple[torch.Tensor, list[str]]:
    """What the stock forward hands to ``down``, and the order in which it calls the others."""
    part = next(iter(parts.values()))
    x, answer = (
        probe.draw((*part.shape[:-1], width), part.dtype, generator).detach() for _ in range(2)
    )
    calls: dict[str, Any] = {}
    with _standing_in(module, {**parts, down: answer}, calls), probe.training(module, mode):
        result = type(module).forward(module, x)
    if calls.keys() != {*parts, down} or any(calls[name] is not x for name in parts):
        raise probe.Mismatch("its projections are not all called with its input, and only that")
    if not isinstance(result, torch.Tensor) or not torch.equal(result, answer):
        raise probe.Mismatch(f"it does not return what {down} returns")
    return calls[down], [name for name in calls if name != down]
