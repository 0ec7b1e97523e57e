"""Mixtures of experts whose weights are stacked: the gate of all experts' tokens in one launch.

transformers' batched and grouped implementations call the module's ``_apply_gate`` with gate and up side
by side; that is what is bound on the instance. Its own eager loop over the experts does not call it, and
what the second product of weights saves stays saved: it is no module, so there is no call to bind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from barqtrain_hf.patching import glu, probe
from barqtrain_hf.patching.candidate import Answer, Candidate
from barqtrain_hf.patching.report import PatchReport

OPS = (glu.OP,)
_METHOD = "_apply_gate"
_SHAPE = (64, 128)
_probed: dict[tuple[Any, ...], tuple[str, frozenset[torch.dtype]] | str] = {}


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Modules with the stacked weights of several experts."""
    for name, module in model.named_modules():
        if glu.is_experts(module):
            yield Candidate(glu.OP, name, module, partial(_build, module), _METHOD)


def _build(module: nn.Module, report: PatchReport) -> Answer:
    weight = module._parameters["gate_up_proj"]
    assert weight is not None
    reason = glu.unusable(weight) or glu.stateful(module) or _unused(module)
    if reason is not None:
        return reason
    key: tuple[Any, ...] = (probe.kind_of(module), weight.device)
    key += tuple((name, probe.kind_of(child)) for name, child in module.named_children())
    with probe.training(module):
        found = probe.recall(_probed, key, partial(_probe, module), weight.device)
    return found if isinstance(found, str) else (glu.OP, _new_method(*found, report))


def _unused(module: nn.Module) -> str | None:
    """Why binding the method would change nothing, or None."""
    if not callable(getattr(type(module), _METHOD, None)):
        return f"its experts have no {_METHOD} method"
    forward = inspect.unwrap(type(module).forward)
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None) or "eager"
    if chosen != "eager":
        try:
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        except ImportError:  # before transformers chose between implementations
            chosen = "eager"
        else:
            forward = ALL_EXPERTS_FUNCTIONS.get_interface(chosen, forward)
    if _METHOD in forward.__code__.co_names:
        return None
    return f"the {chosen} implementation of its experts does not call {_METHOD}"


def _new_method(
    activation: str, dtypes: frozenset[torch.dtype], report: PatchReport
) -> Callable[..., Any]:
    op = glu.GATED[activation]

    def apply_gate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and glu.is_probed(args[0], dtypes):
            return op(args[0])
        report.fall_back(glu.OP, f"{_METHOD} called with something that was not probed")
        return getattr(type(self), _METHOD)(self, *args, **kwargs)

    return apply_gate


def _probe(module: nn.Module, generator: torch.Generator) -> tuple[str, frozenset[torch.dtype]]:
    """The activation of the gate, with the dtypes in which ours is as accurate."""
    stock: Callable[..., torch.Tensor] = partial(getattr(type(module), _METHOD), module)
    gate_up = probe.draw(_SHAPE, torch.float32, generator, 4.0)
    theirs = stock(gate_up)
    reason: str | None = None
    for activation, op in glu.GATED.items():
        reason = probe.as_accurate(op(gate_up, backend="torch"), theirs, theirs)
        if reason is None:
            return activation, probe.accurate_dtypes(op, stock, [_SHAPE], generator)
    raise probe.Mismatch(f"{type(module).__name__}: its gate is no SwiGLU or GeGLU: {reason}")
