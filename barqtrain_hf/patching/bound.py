"""Our methods on instances: how they get there, and off again."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

from torch import nn


class Bound(NamedTuple):
    """A method of ours on an instance.

    Attributes:
        previous: what it lies over, where that is on the instance too.
    """

    op: str
    module: nn.Module
    attribute: str
    method: Any
    previous: Any = None

    @classmethod
    def of(cls, op: str, module: nn.Module, attribute: str, function: Any) -> Bound:
        """Binds a function.

        It gets the attribute's name, by which its method is pickled: where that is loaded, the class's own
        method is found under it.
        """
        function.__name__ = attribute
        method = types.MethodType(function, module)
        setattr(module, attribute, method)
        return cls(op, module, attribute, method)

    @property
    def is_stock(self) -> bool:
        """Whether it was unpickled, and is the class's own method."""
        own = getattr(type(self.module), self.attribute, None)
        return own is not None and getattr(self.method, "__func__", self.method) is own

    def remove(self) -> None:
        """Takes it off, unless something else is there by now."""
        if self.module.__dict__.get(self.attribute) is not self.method:
            return
        if self.previous is None:
            delattr(self.module, self.attribute)
        else:
            setattr(self.module, self.attribute, self.previous)
