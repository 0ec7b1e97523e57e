"""Does a module's forward, given our attention, compute what it computes with stock attention?

The projections are stood in for by modules that return given tensors, so no weight is needed, wherever it is;
what reaches the output projection is compared, and the gradients of what the others returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from barqtrain_hf.patching import probe
from barqtrain_hf.patching.attention_interface import NAME
from barqtrain_hf.patching.attention_mask import mask

# Tokens of the documents in each row; the window is shorter than most.
_DOCUMENTS = ((13, 30, 21), (64,))
_WINDOW = 7
Forward = Callable[..., Any]
# From the dtypes to trust and whoever is told of fallbacks: the forward that turns q and k before attention,
# and the one that leaves it to attention, if there is one.
Forwards = Callable[[frozenset[torch.dtype], Callable[[str], None]], tuple[Forward, Forward | None]]


class Found(NamedTuple):
    """What a probe found.

    Attributes:
        dtypes: those in which ours is as accurate as stock.
        apart: why q and k are to be turned before attention, or None if attention may do it.
    """

    dtypes: frozenset[torch.dtype]
    apart: str | None


def examine(module: nn.Module, forwards: Forwards, stock: str, generator: torch.Generator) -> Found:
    """Compares a module's forwards with ours to its stock one.

    Raises:
        probe.Mismatch: it is no attention that ours could compute.
    """
    setting = _Setting(module, stock, generator)
    every = frozenset(probe.DTYPES)
    dtypes = set()
    apart: str | None = "there is no rotary embedding of ours in it"
    told: list[str] = []
    whole, fused = forwards(every, told.append)
    for dtype in probe.DTYPES:
        reason = probe.ask(partial(setting.inaccuracy, whole, dtype, told))
        if reason is None:
            dtypes.add(dtype)
        elif dtype is torch.float32:
            raise probe.Mismatch(reason)
        if fused is not None and (dtype is torch.float32 or apart is None):
            found = probe.ask(partial(setting.inaccuracy, fused, dtype, told))
            # Only what passes in every dtype is fused: one forward serves them all.
            apart = found if reason is None else apart
    return Found(frozenset(dtypes), apart)


def sizes(module: nn.Module) -> dict[str, int]:
    """Names of a module's projections, and how many features each gives."""
    found = {}
    for name, child in module.named_children():
        # Conv1D of GPT-2 calls it nf.
        size = getattr(child, "out_features", getattr(child, "nf", None))
        if isinstance(size, int):
            found[name] = size
    return found


class _Setting:
    """A module with stand-ins, and what it is called with."""

    def __init__(self, module: nn.Module, stock: str, generator: torch.Generator) -> None:
        self.module, self.stock, self.generator = module, stock, generator
        self.sizes = sizes(module)
        self.parameters = inspect.signature(type(module).forward).parameters
        self.numbers = torch.tensor(
            [[i for i, n in enumerate(row) for _ in range(n)] for row in _DOCUMENTS]
        )
        self.numbers = self.numbers.to(generator.device)
        self.shape = self.numbers.shape
        # Which projections are called with the hidden states, and how many angles a token has: found out by
        # running it.
        self.inward: list[str] = []
        hidden = self._draw(1, torch.float32)
        for count in self._numbers_of_angles():
            self.angles = count
            self.inward.clear()
            angles = self._angles(torch.float32)
            reason = probe.ask(
                partial(self.run, type(module).forward, stock, False, hidden, *angles)
            )
            if not isinstance(reason, str):
                return
        raise probe.Mismatch(reason)

    def inaccuracy(self, forward: Forward, dtype: torch.dtype, told: list[str]) -> str | None:
        """Why ``forward`` is less accurate than stock in a dtype, or None."""
        told.clear()
        for packed in (False, True):
            inputs = [self._draw(self.sizes[name], dtype) for name in self.inward]
            hidden = self._draw(1, dtype)

            def result(function: Forward, how: str, *given: torch.Tensor) -> torch.Tensor:
                *parts, cos, sin = given
                x = hidden.to(cos.dtype)  # noqa: B023
                return self.run(function, how, packed, x, cos, sin, *parts)  # noqa: B023

            reason = probe.inaccuracy(
                partial(result, forward, NAME),
                partial(result, type(self.module).forward, self.stock),
                [*inputs, *self._angles(dtype)],
                self.generator,
            )
            if told:
                return f"it is called in a way that ours does not cover: {told.pop()}"
            if reason is not None:
                return reason
        return None

    def run(
        self,
        forward: Forward,
        implementation: str,
        packed: bool,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *parts: torch.Tensor,
    ) -> torch.Tensor:
        """What the output projection is called with."""
        given = dict(zip(self.inward, parts, strict=bool(parts)))
        standing = _StandIns(self, hidden, given)
        arguments: dict[str, Any] = {"hidden_states": hidden}
        if "position_embeddings" in self.parameters:
            arguments["position_embeddings"] = (cos, sin)
        arguments["attention_mask"] = self._mask(implementation, packed, hidden.dtype)
        with standing.inside(self.module, implementation), probe.training(self.module, False):
            forward(self.module, **arguments)
        if standing.result is None:
            raise probe.Mismatch("its forward calls no output projection")
        return standing.result

    def _mask(self, implementation: str, packed: bool, dtype: torch.dtype) -> torch.Tensor | None:
        function = causal_mask_function
        if packed:
            apart = packed_sequence_mask_function(self.numbers)
            function = and_masks(sliding_window_causal_mask_function(_WINDOW), apart)
        make = {"sdpa": sdpa_mask, "eager": eager_mask, NAME: mask}[implementation]
        return make(  # type: ignore[no-any-return]
            batch_size=self.shape[0],
            q_length=self.shape[1],
            kv_length=self.shape[1],
            mask_function=function,
            allow_is_causal_skip=not packed,
            dtype=dtype,
            device=self.numbers.device,
        )

    def _draw(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return probe.draw((*self.shape, size), dtype, self.generator)

    def _numbers_of_angles(self) -> list[int]:
        config: Any = self.module.config
        whole = getattr(self.module, "head_dim", getattr(self.module, "head_size", None))
        if not isinstance(whole, int):
            whole = config.hidden_size // config.num_attention_heads
        part = getattr(self.module, "rotary_ndims", whole)  # Phi cuts it out of a head itself
        return [part, whole, whole // 2] if part != whole else [whole, whole // 2]

    def _angles(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [self._draw(self.angles, dtype).detach() for _ in ("cos", "sin")]


class _StandIns:
    """Stand-ins for the children of one module during one call."""

    def __init__(
        self, setting: _Setting, hidden: torch.Tensor, given: dict[str, torch.Tensor]
    ) -> None:
        self.setting, self.hidden, self.given = setting, hidden, given
        self.result: torch.Tensor | None = None

    @contextmanager
    def inside(self, module: nn.Module, implementation: str) -> Iterator[None]:
        """The module has them, and attention of this name, while the context lasts."""
        config: Any = module.config
        children, before = dict(module._modules), config._attn_implementation
        try:
            for name, child in children.items():
                if child is not None:
                    call = self._project if name in self.setting.sizes else self._pass
                    module._modules[name] = _StandIn(partial(call, name))
            config._attn_implementation_internal = implementation
            yield
        finally:
            module._modules.update(children)
            config._attn_implementation_internal = before

    def _project(self, name: str, x: Any) -> torch.Tensor:
        size = self.setting.sizes[name]
        if x is self.hidden:
            if name not in self.given:
                self.given[name] = self.setting._draw(size, x.dtype)
                self.setting.inward.append(name)
            return self.given[name]
        if self.result is not None or type(x) is not torch.Tensor:
            raise probe.Mismatch("its projections are called one on another's output")
        self.result = x
        return x.new_zeros((*x.shape[:-1], size))

    def _pass(self, name: str, x: Any) -> torch.Tensor:
        """A norm of queries or keys, or a dropout."""
        if type(x) is not torch.Tensor:
            raise probe.Mismatch(f"{name} is called with a {type(x).__name__}")
        return x


class _StandIn(nn.Module):
    def __init__(self, call: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Any) -> torch.Tensor:
        return self.call(x)
