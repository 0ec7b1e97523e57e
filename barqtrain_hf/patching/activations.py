"""Activation modules of MLPs without a gate: GELU, exact or by tanh, however it is written.

A GELU written out in 16 bits rounds after every step, ours once. Under CUDA's autocast one that calls
``pow`` returns fp32; ours returns the input's dtype, which the projection behind it would cast to anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from barqtrain_hf.ops import gelu
from barqtrain_hf.patching import glu, probe
from barqtrain_hf.patching.candidate import Answer, Candidate
from barqtrain_hf.patching.report import PatchReport

OPS = (glu.OP,)
_GELUS: dict[str, Callable[..., torch.Tensor]] = {
    name: partial(gelu, approximate=name) for name in ("tanh", "none")
}
_SHAPE = (64, 64)
# What is run to see whether it is a GELU: other modules without weights may do anything.
_CALLED_ACTIVATION = ("act", "elu", "silu", "swish", "mish", "tanh", "sigmoid")
_probed: dict[tuple[Any, ...], tuple[str, frozenset[torch.dtype]] | str] = {}


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Activations beside the weights that they stand between, unless the op of an MLP includes them."""
    seen: set[nn.Module] = set()  # one instance may serve all layers
    for name, parent in model.named_modules():
        weight = next(parent.parameters(), None)
        if weight is None or "forward" in parent.__dict__ or "_apply_gate" in parent.__dict__:
            continue
        # Of an MLP with a gate that did not match, the report says so already.
        reported = not glu.is_gated(parent) and not glu.is_experts(parent)
        for child_name, module in parent.named_children():
            if module not in seen and _is_activation(child_name, module):
                seen.add(module)
                full_name = f"{name}.{child_name}" if name else child_name
                build = partial(_build, module, weight, reported)
                yield Candidate(glu.OP, full_name, module, build)


def _is_activation(name: str, module: nn.Module) -> bool:
    called = f"{name} {type(module).__name__}".lower()
    return (
        any(word in called for word in _CALLED_ACTIVATION)
        and glu.is_empty(module)
        and glu.takes_one_tensor(type(module).forward)
    )


def _build(module: nn.Module, weight: torch.Tensor, reported: bool, report: PatchReport) -> Answer:
    reason = glu.unusable(weight)
    if reason is not None:
        return reason
    key = (probe.kind_of(module), weight.device)
    with probe.training(module):
        found = probe.recall(_probed, key, partial(_probe, module), weight.device)
    if isinstance(found, str):
        return f"{type(module).__name__} is not a GELU: {found}" if reported else ""
    return glu.OP, _new_forward(*found, report)


def _new_forward(
    approximate: str, dtypes: frozenset[torch.dtype], report: PatchReport
) -> Callable[..., Any]:
    op = _GELUS[approximate]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and glu.is_probed(args[0], dtypes):
            return op(args[0])
        report.fall_back(glu.OP, "an activation called with something that was not probed")
        return type(self).forward(self, *args, **kwargs)

    return forward


def _probe(module: nn.Module, generator: torch.Generator) -> tuple[str, frozenset[torch.dtype]]:
    """Which GELU the module is, with the dtypes in which ours is as accurate."""
    stock: Callable[..., torch.Tensor] = partial(type(module).forward, module)
    x = probe.draw(_SHAPE, torch.float32, generator, 4.0)
    theirs = stock(x)
    reason: str | None = None
    for approximate, op in _GELUS.items():
        reason = probe.as_accurate(op(x, backend="torch"), theirs, theirs)
        if reason is None:
            return approximate, probe.accurate_dtypes(op, stock, [_SHAPE], generator)
    raise probe.Mismatch(reason)
