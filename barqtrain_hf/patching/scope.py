"""Forwards over other globals: how a name that a stock forward looks up becomes ours in one model only.

What is bound on the instance is the class's own code over a copy of its module's globals in which that name
is ours. A later change of those globals is not seen until the model is patched again.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_CALLED_ATTENTION = ("attention", "attn")


def lack(cls: type[nn.Module], name: str) -> str | None:
    """Why a class's forward cannot be bound over globals in which ``name`` is another, or None."""
    forward = cls.forward
    plain = inspect.unwrap(forward)
    if not isinstance(plain, types.FunctionType) or not _looks_up(plain, name):
        return f"its forward does not call {name}"
    if plain is not forward:
        return f"its forward is wrapped, and {name} is called inside"
    return None


def _looks_up(function: types.FunctionType, name: str) -> bool:
    if name not in function.__code__.co_names:
        return False
    instructions = dis.get_instructions(function)
    return any(i.opname == "LOAD_GLOBAL" and i.argval == name for i in instructions)


def is_called_attention(module: nn.Module, lack: Callable[[type[nn.Module]], str | None]) -> bool:
    """Whether a reader of the report would expect a module, although it and all inside lack something."""
    called = type(module).__name__.lower()
    return (
        any(word in called for word in _CALLED_ATTENTION)
        and next(module.parameters(), None) is not None
        and all(lack(type(inner)) is not None for inner in module.modules())
    )


def with_globals(
    function: types.FunctionType, replacements: Mapping[str, Any]
) -> types.FunctionType:
    """A copy of a function for which some globals are others."""
    scope = {**function.__globals__, **replacements}
    # torch.compile looks the globals of a module that has a name up in that module.
    scope.pop("__name__", None)
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy
