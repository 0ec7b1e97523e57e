"""Attention modules that ask transformers for their attention function: ours, with the rotation inside.

A module's forward looks two names up: ``apply_rotary_pos_emb`` and ``ALL_ATTENTION_FUNCTIONS``. Both are
made ours in one model (`scope`). Where nothing comes between the two, the first returns q and k as they are,
inside objects that carry the angles and that nothing but the second can use; the second opens them. So the
hand-over is local to the call, and a forward that does more to q or k fails the probe and gets rotation and
attention apart. With a key cache, which wants keys that are turned, they are apart too.

Masks are made by the name in the model's config, so that name is ``"barq"`` while the model is patched; it is
not part of a saved config.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from barqtrain_hf.patching import attention_probe, glu, probe, rope, scope
from barqtrain_hf.patching.attention_interface import (
    NAME,
    How,
    Rotation,
    Unturned,
    attend,
    register_attention,
)
from barqtrain_hf.patching.candidate import Answer, Candidate, because
from barqtrain_hf.patching.report import PatchReport
from barqtrain_hf.runtime import cuda_unavailable_reason

OP = "attention"
OPS = (OP,)
_TABLE = "ALL_ATTENTION_FUNCTIONS"
_ASKS_FOR_SDPA = '_attn_implementation == "sdpa"'
# Arguments of any other type, such as a key cache, may need q and k as the stock forward makes them.
_PLAIN = (torch.Tensor, type(None), bool, int, float, str, tuple)
_probed: dict[tuple[Any, ...], attention_probe.Found | str] = {}


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Modules whose forward looks the table of attention functions up by its global name, and others."""
    families: dict[int, _Family] = {}
    found = []
    for name, module in model.named_modules():
        lack = _lack(type(module))
        if lack is None:
            config = module.__dict__.get("config")
            family = families.setdefault(id(config), _Family(model, config))
            family.members[module] = _base(module)
            found.append((name, module, family))
        elif scope.is_called_attention(module, _lack):
            yield Candidate(OP, name, module, because(lack))
    for name, module, family in found:
        yield Candidate(OP, name, module, partial(family.build, module), over=_is_rope)


def _lack(cls: type[nn.Module]) -> str | None:
    return scope.lack(cls, _TABLE)


def switch(modules: Iterable[nn.Module]) -> list[tuple[Any, str]]:
    """Sets the name in the configs of modules that were bound; returns them with their former names."""
    before = []
    for config in {id(module.config): module.config for module in modules}.values():
        name = config._attn_implementation  # type: ignore[union-attr]
        if name != NAME:
            register_attention()
            before.append((config, name))
            config._attn_implementation_internal = NAME  # type: ignore[union-attr]
    return before  # type: ignore[return-value]


def switch_back(before: Iterable[tuple[Any, str]]) -> None:
    """Sets former names again, but where another was chosen since."""
    for config, name in before:
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = name


def _is_rope(bound: Any) -> bool:
    return rope.is_bound(getattr(bound, "__func__", None))


class _Family:
    """The attention modules that share a config, and so the name of their attention: all get ours or none."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        # The function that each would call now, before anything of ours is bound.
        self.members: dict[nn.Module, Any] = {}
        self.stock = "sdpa"
        # Of one forward one copy for all layers.
        self.bound: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def build(self, module: nn.Module, report: PatchReport) -> Answer:
        """As `Candidate.build`."""
        if self._refusal is not None:
            return self._refusal
        own = self._found[module]
        if isinstance(own, str):
            return own
        other = next((found for found in self._found.values() if isinstance(found, str)), None)
        if other is not None:
            return f"it shares its config with one that keeps its own. {other}"
        base = self.members[module]
        key = (base, own)
        if key not in self.bound:
            forwards = _forwards(base, self.stock, own.dtypes, partial(report.fall_back, OP))
            self.bound[key] = _joined(forwards, own.apart is None)
            note = f"{OP}: {type(module).__name__} turns queries and keys before it: {own.apart}"
            if forwards[1] is not None and own.apart is not None and note not in report.notes:
                report.notes.append(note)
        return OP, self.bound[key]

    @functools.cached_property
    def _refusal(self) -> str | None:
        """Why no module of the family gets it, as far as it shows without a probe."""
        name = getattr(self.config, "_attn_implementation", None)
        owners = [
            m
            for m in self.model.modules()
            if isinstance(m, PreTrainedModel) and m.config is self.config
        ]
        if not owners or name is None:
            return "it is not inside a transformers model that has its config"
        has_sdpa = all(owner._supports_sdpa for owner in owners)
        self.stock = "sdpa" if has_sdpa and name != "eager" else "eager"
        if name not in ("sdpa", "eager", NAME) or (name == "eager" and has_sdpa):
            return f"the model was loaded with attn_implementation={name!r}"
        if not all(o._can_set_attn_implementation() and o._supports_flash_attn for o in owners):
            return f"{type(owners[0]).__name__} does not take attention functions such as flash attention"
        # Gemma 4 drops queries, and asks for the name to know what to make of masks then.
        parents = chain.from_iterable(type(owner).__mro__ for owner in owners)
        for cls in dict.fromkeys(c for c in parents if issubclass(c, PreTrainedModel)):
            source = _source(cls)
            if source is None:
                return f"the source of {cls.__name__} cannot be read"
            if _ASKS_FOR_SDPA in source:
                return f"{cls.__name__} does something else under the name of sdpa"
        if getattr(self.config, "output_attentions", False):
            return "the config asks for attention weights (output_attentions)"
        for module in self.members:
            table = type(module).forward.__globals__[_TABLE]
            if not isinstance(table, AttentionInterface):
                return f"its {_TABLE} is not that of transformers"
            if self.stock == "sdpa" and table["sdpa"] is not sdpa_attention_forward:
                return "its sdpa is another package's"
            bound = module.__dict__.get("forward")
            if bound is not None and not _is_rope(bound):
                return "an attention module of its config is already patched"
            reason = _unusable(module, name == NAME)
            if reason is not None:
                return reason
        return None

    @functools.cached_property
    def _found(self) -> dict[nn.Module, attention_probe.Found | str]:
        """What the probe finds of each."""
        config = self.config.to_json_string(use_diff=False)
        return {module: self._probe(module, config) for module in self.members}

    def _probe(self, module: nn.Module, config: str) -> attention_probe.Found | str:
        base = self.members[module]
        device = _weight(module).device  # type: ignore[union-attr]
        kind, *attributes = probe.kind_of(module)
        # Of layers that differ in their number alone one is probed; what is bound is looked at apart.
        settings = [a for a in attributes if a[0] not in ("config", "layer_idx", "forward")]
        children = tuple(attention_probe.sizes(module).items())
        key = (kind, *settings, config, children, rope.is_bound(base), self.stock, device)
        forwards = partial(_forwards, base, self.stock)
        question = partial(attention_probe.examine, module, forwards, self.stock)
        found = probe.recall(_probed, key, question, device)
        return f"{type(module).__name__}: {found}" if isinstance(found, str) else found


def _source(cls: type[nn.Module]) -> str | None:
    """The code of the file that a class is from, None for one of a notebook."""
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (KeyError, OSError, TypeError):
        return None


def _unusable(module: nn.Module, asked_for: bool) -> str | None:
    weight = _weight(module)
    if weight is None:
        return "it has no weights, so its device is not known"
    reason = glu.unusable(weight)
    if reason is not None or asked_for:
        return reason
    if weight.device.type != "cuda":
        return f"our kernels do not run on {weight.device.type}, so stock attention stays"
    reason = cuda_unavailable_reason()
    return None if reason is None else f"stock attention stays: {reason}"


def _weight(module: nn.Module) -> torch.Tensor | None:
    # What is quantised may have nothing but buffers.
    return next(chain(module.parameters(), module.buffers()), None)


def _base(module: nn.Module) -> Any:
    """The function that would be called: the class's, or the copy of it with our rotation."""
    bound = module.__dict__.get("forward")
    return bound.__func__ if _is_rope(bound) else type(module).forward


class _Table:
    """Stands for the table of attention functions in one model."""

    def __init__(
        self,
        table: AttentionInterface,
        stock: str,
        dtypes: frozenset[torch.dtype],
        tell: Callable[[str], None],
    ) -> None:
        self.table, self.stock, self.dtypes, self.tell = table, stock, dtypes, tell

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function of a name; as the stock table's."""
        if name == NAME:
            how = How(self.stock, default, self.dtypes, self.tell)

            def ours(
                module: nn.Module,
                query: Any,
                key: Any,
                value: Any,
                attention_mask: Any,
                **kwargs: Any,
            ) -> Any:
                return attend(module, query, key, value, attention_mask, how, kwargs)

            return ours
        stock = self.table.get_interface(name, default)

        def other(module: nn.Module, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(query, Unturned):
                query, key = query.rotation.of(query.tensor, key.tensor)
            return stock(module, query, key, *args, **kwargs)

        return other


def _defer(
    turn: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> tuple[Unturned, Unturned]:
    rotation = Rotation(turn, cos, sin, interleaved)
    return Unturned(q, rotation), Unturned(k, rotation)


def _forwards(
    base: types.FunctionType,
    stock: str,
    dtypes: frozenset[torch.dtype],
    tell: Callable[[str], None],
) -> tuple[attention_probe.Forward, attention_probe.Forward | None]:
    """A forward over our table, and one that leaves the rotation to attention."""
    table = _Table(base.__globals__[_TABLE], stock, dtypes, tell)
    deferring = rope.deferring(base, _defer)
    whole = scope.with_globals(base, {_TABLE: table})
    if deferring is None:
        return whole, None
    return whole, scope.with_globals(base, {_TABLE: table, **deferring})


def _joined(
    forwards: tuple[attention_probe.Forward, attention_probe.Forward | None], fuses: bool
) -> Callable[..., Any]:
    whole, fused = forwards
    if fused is None or not fuses:
        return whole

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in chain(args, kwargs.values()):
            if not isinstance(value, _PLAIN):
                return whole(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    return functools.update_wrapper(forward, whole)
