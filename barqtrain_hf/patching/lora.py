"""PEFT's LoRA around a linear layer: the adapter's part is added inside the layer's own product.

Around a layer that bitsandbytes has quantised it is added to what that layer returns. Whether a call is plain
enough is asked each time, for adapters are switched, merged and scaled while a model lives. Of the layer's
modules none is called but a quantised one, so that a hook on one of them, or a forward that somebody has put
there, keeps PEFT's forward. Adapters stay the parameters they are: saving, merging and disabling are PEFT's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError
from barqtrain_hf.ops import (
    LoraLayer,
    LoraLinear,
    lora_layer,
    lora_layers,
    lora_linear,
    lora_linears,
)
from barqtrain_hf.ops._backend import autocast_dtype, use_cuda
from barqtrain_hf.patching import probe, recompute
from barqtrain_hf.patching.candidate import Answer, Candidate, because
from barqtrain_hf.patching.head_lora import is_lora_linear
from barqtrain_hf.patching.lora_quantized import is_lora_quantized, unusual
from barqtrain_hf.patching.lora_together import Layer, Together
from barqtrain_hf.patching.report import PatchReport

OP = "lora"
OPS = (OP,)
_PACKAGE = "peft.tuners.lora."
_PLAIN = (torch.Tensor, nn.Parameter)
# Of the probe's layer: rows, dimensions in and out, rank.
_ROWS, _IN, _OUT, _RANK = 64, 48, 80, 4
_probed: dict[tuple[Any, ...], frozenset[torch.dtype] | str] = {}


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """PEFT's LoRA layers, but for the LM head, whose adapter is part of the fused loss."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    together = Together()
    for name, module in model.named_modules():
        for is_layer in (is_lora_linear, is_lora_quantized):
            together.add(module, is_layer)
        if not type(module).__module__.startswith(_PACKAGE) or not hasattr(module, "lora_A"):
            continue
        if module is head:
            continue
        if is_lora_linear(module) or is_lora_quantized(module):
            yield Candidate(OP, name, module, partial(_build, module, name, together))
        else:
            kind = type(getattr(module, "base_layer", module)).__name__
            reason = (
                f"{type(module).__name__} around {kind}: only linear layers, plain or quantised by "
                "bitsandbytes, are fused"
            )
            yield Candidate(OP, name, module, because(reason))


def _build(module: Any, name: str, together: Together, report: PatchReport) -> Answer:
    weight = module.base_layer.weight
    if weight.is_meta:
        return "its weights are not on a device yet, so it cannot be probed"
    # All but the sizes and the numbers is PEFT's code, which the class stands for.
    key = (type(module), weight.device)
    found = probe.recall(_probed, key, partial(_probe, module), weight.device)
    if isinstance(found, str):
        return found
    return OP, _new_forward(name, together, found, report)


def _new_forward(
    name: str, together: Together, dtypes: frozenset[torch.dtype], report: PatchReport
) -> Callable[..., Any]:
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        own = "called with more than its input" if args or kwargs else _read(self, x)
        if not isinstance(own, str) and x.is_floating_point():
            dtype = autocast_dtype(x) or x.dtype
            if dtype not in dtypes:
                own = f"not probed, or not equal, for {dtype}"
        if isinstance(own, str):
            report.fall_back(OP, own)
            return type(self).forward(self, x, *args, **kwargs)
        try:
            if torch.compiler.is_compiling():
                return _together(x, [own])[0]
            y = together.take(self, own, x)
            if y is not None:
                return y
            others = together.others(self, x)
            linears = _read_all(others, x)
            if linears:
                # What is wrong with another is said when that is called.
                with contextlib.suppress(ArgumentError, ArgumentTypeError):
                    ys = _computed(x, [own, *linears])
                    together.keep(others, linears, x, ys[1:])
                    return ys[0]
            return _computed(x, [own])[0]
        except (ArgumentError, ArgumentTypeError) as error:
            raise type(error)(f"{name}: {error}") from None

    return forward


def _read_all(layers: Sequence[Any], x: torch.Tensor) -> list[Layer]:
    """What the op is given of each layer; nothing if one of them does not take part."""
    linears: list[Layer] = []
    for layer in layers:
        linear = None if _is_bound_elsewhere(layer) else _read(layer, x)
        if linear is None or isinstance(linear, str):
            return []
        linears.append(linear)
    return linears


def _computed(x: torch.Tensor, linears: Sequence[Layer]) -> tuple[torch.Tensor, ...]:
    with recompute.without_saving(x):
        return _together(x, linears)


def _together(x: torch.Tensor, layers: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """All by one op: a group's layers are of one kind."""
    op = lora_layers if isinstance(layers[0], LoraLayer) else lora_linears
    return op(x, layers)


def _is_bound_elsewhere(layer: Any) -> bool:
    """Whether a layer's call does not come to our forward, but to another's."""
    return getattr(layer.__dict__.get("forward"), "__module__", None) != __name__


def _read(layer: Any, x: Any) -> Layer | str:
    """What the op is given of a layer, or why a call is left to PEFT.

    Every call asks, for a member of a group also that of the first, which computes it: a hook may change the
    layer in between. Modules are slow to look parts and weights up, so that each is looked up once.
    """
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    active = layer.active_adapters
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    adapter, parts = active[0], layer._modules
    a = parts["lora_A"]._modules.get(adapter)
    if a is None:
        return f"it has no adapter {adapter!r}"
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is not plain LoRA"
    if layer.fan_in_fan_out:
        return "its adapter has fan_in_fan_out"
    dropout = parts["lora_dropout"]._modules[adapter]
    p = 0.0 if type(dropout) is nn.Identity else _probability(dropout)
    if p is None or (p and not _is_dropped_here(x)):
        return "its adapter has dropout"
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (int, float)):
        return "its scaling is a tensor"
    base, b = parts["base_layer"], parts["lora_B"]._modules[adapter]
    if a.bias is not None or b.bias is not None:
        return "its adapter has a bias"
    for module in (base, a, b, dropout):
        if "forward" in module.__dict__ or _is_hooked(module):
            return "there are hooks inside (offloading, ZeRO-3, or the user's)"
    quantized = type(base) is not nn.Linear and is_lora_quantized(layer)
    if quantized:
        reason = unusual(base)
        if reason is not None:
            return reason
    weights = []
    for linear in (a, b) if quantized else (base, a, b):
        if type(linear) is not nn.Linear:
            return f"there is a {type(linear).__name__} inside"
        weight = linear.weight
        if type(weight) not in _PLAIN or not weight.numel():
            return "its weights are in parts (FSDP, tensor parallelism or ZeRO-3)"
        weights.append(weight)
    bias = base.bias
    if not quantized and (weights[0].requires_grad or (bias is not None and bias.requires_grad)):
        return "its own weight is trained too"
    if type(x) is not torch.Tensor:
        return f"called with a {type(x).__name__}"
    if x.is_meta:
        return "called with a tensor on meta"
    if quantized:
        return _quantized(base, weights[0], weights[1], scaling, p, x)
    return LoraLinear(weights[0], weights[1], weights[2], scaling, bias, p)


def _quantized(
    base: Any, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float, x: torch.Tensor
) -> LoraLayer | str:
    dtype = autocast_dtype(x)
    if x.dtype not in (torch.float32, dtype or x.dtype):
        # PEFT adds to what is in one 16-bit dtype what is in the other, and the sum is in fp32.
        return f"called with {x.dtype} under autocast in {dtype}"
    return LoraLayer(base, a, b, scaling, dropout)


def _probability(dropout: Any) -> float | None:
    """Of a plain dropout, 0 if it is idle; else None. In training is what it is itself, not its layer."""
    if type(dropout) is not nn.Dropout:
        return None
    if not dropout.training or dropout.p == 0.0:
        return 0.0
    p = dropout.p
    plain = isinstance(p, (int, float)) and 0.0 < p < 1.0 and not dropout.inplace
    return float(p) if plain else None


def _is_dropped_here(x: Any) -> bool:
    """Whether the op's kernel drops elements of x. Off a GPU PEFT does: seeds give its numbers."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    return use_cuda(OP, "auto", x, None)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _Product(nn.Module):
    """Stands for a linear layer, with tensors that are given."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        # Beside the module's parameters, so that the graph goes on through them.
        self.__dict__["weight"], self.__dict__["bias"] = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def _probe(module: Any, generator: torch.Generator) -> frozenset[torch.dtype]:
    """The dtypes in which the op is PEFT's forward of such a layer.

    Raises:
        probe.Mismatch: it is not in fp32.
    """
    scaling = 0.7

    def stock(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        layer = _stand_in(module, scaling, weight, bias, a, b)
        return type(module).forward(layer, x)  # type: ignore[no-any-return]

    def ours(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        if is_lora_quantized(module):
            return lora_layer(x, _Product(weight, bias), a, b, scaling)
        return lora_linear(x, weight, a, b, scaling, bias=bias)

    shapes = [(_ROWS, _IN), (_OUT, _IN), (_OUT,), (_RANK, _IN), (_OUT, _RANK)]
    return probe.accurate_dtypes(ours, stock, shapes, generator, frozen=(1, 2))


def _stand_in(
    module: Any,
    scaling: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> Any:
    """The layer with one plain adapter that is active, of given tensors."""
    layer = copy.copy(module)
    layer.__dict__ = {**vars(module), "training": False}
    name = "probe"
    layer._modules = {
        "base_layer": _Product(weight, bias),
        "lora_A": nn.ModuleDict({name: _Product(a)}),
        "lora_B": nn.ModuleDict({name: _Product(b)}),
        "lora_dropout": nn.ModuleDict({name: nn.Identity()}),
    }
    layer.__dict__ |= {
        "scaling": {name: scaling},
        "lora_variant": {},
        "merged_adapters": [],
        "_active_adapter": [name],
        "_disable_adapters": False,
    }
    return layer
