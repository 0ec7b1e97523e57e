"""LoRA layers that are called with one input, such as query, key and value, are computed together.

Which they are is read in the source of their parent's forward. The call of the first computes all, and those
of the others are answered with what is there already, if they come with the same tensor and nothing has
changed in between; a wrong guess costs time and nothing else. The parent's code is not touched, and hooks on
the layers fire as ever. What runs depends on the calls of a pass alone and on nothing before it: gradient
checkpointing has to find the same in its second run. Layers of a group are one node of autograd's graph: a
backward pass through some of them before the others are called needs ``retain_graph``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from barqtrain_hf.ops import LoraLayer, LoraLinear
from barqtrain_hf.ops._backend import autocast_dtype

Layer = LoraLinear | LoraLayer


class _Answer(NamedTuple):
    """What a layer will be asked for, the input, and all else that the answer depends on."""

    x: torch.Tensor
    state: tuple[Any, ...]
    y: torch.Tensor


class Together:
    """The groups of a model's layers. A copy of the model has none: its layers are others."""

    def __init__(self) -> None:
        self._groups: weakref.WeakKeyDictionary[Any, list[weakref.ref[Any]]]
        self._groups = weakref.WeakKeyDictionary()
        self._here = threading.local()

    def add(self, parent: nn.Module, is_layer: Callable[[nn.Module], bool]) -> None:
        """The groups among a module's children."""
        for names in _called_alike(type(parent).forward):
            children = [parent._modules.get(name) for name in names]
            group = [child for child in children if child is not None and is_layer(child)]
            if len(group) > 1:
                self._groups[group[0]] = [weakref.ref(layer) for layer in group[1:]]

    def take(self, layer: Any, linear: Layer, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's answer, if the call of another has computed it for what the layer is now."""
        ready: dict[Any, _Answer] = getattr(self._here, "ready", {})
        answer = ready.pop(layer, None)
        if answer is not None and answer.x is x and answer.state == _state(linear, x):
            return answer.y
        ready.clear()  # what nobody has asked for by now, nobody will
        return None

    def others(self, layer: Any, x: torch.Tensor) -> list[Any]:
        """The layers to be computed with this one."""
        if x.is_inference():  # such a tensor does not tell when it is written to
            return []
        return [other for reference in self._groups.get(layer, ()) if (other := reference())]

    def keep(
        self,
        layers: Sequence[Any],
        linears: Sequence[Layer],
        x: torch.Tensor,
        ys: Sequence[torch.Tensor],
    ) -> None:
        """What the layers, each with what it is now, will be asked for next."""
        self._here.ready = {
            layer: _Answer(x, _state(linear, x), y)
            for layer, linear, y in zip(layers, linears, ys, strict=True)
        }


def _state(linear: Layer, x: torch.Tensor) -> tuple[Any, ...]:
    """All that a layer's answer depends on beside the values of x, each change of which counts."""
    own: Any
    if isinstance(linear, LoraLayer):
        base, a, b, scaling, dropout = linear
        own = base._parameters.values()  # type: ignore[attr-defined]  # of a module, here
    else:
        weight, a, b, scaling, bias, dropout = linear
        own = (weight, bias)
    tensors = (x, a, b, *(tensor for tensor in own if tensor is not None))
    return (
        *((id(t), t.data_ptr(), t._version, t.requires_grad) for t in tensors),
        scaling,
        dropout,
        torch.is_grad_enabled(),
        autocast_dtype(x),
    )


@functools.cache
def _called_alike(forward: Callable[..., Any]) -> list[list[str]]:
    """Names of children that a forward calls once each and with one value, in their order."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # no source: built at run time, or compiled
        return []
    reader = _Reader()
    reader.visit(tree)
    often = Counter(name for _, name, _ in reader.events if name)
    groups: list[list[str]] = []
    under_way: dict[str, list[str]] = {}
    for _, name, variable in sorted(reader.events):
        if not name:
            under_way.pop(variable, None)  # it has another value from here on
        elif often[name] == 1:
            if variable not in under_way:
                groups.append(under_way.setdefault(variable, []))
            under_way[variable].append(name)
    return [group for group in groups if len(group) > 1]


class _Reader(ast.NodeVisitor):
    """Collects where, in the order of the source, children are called and variables get values.

    Attributes:
        events: (place, the child's name or nothing, the variable).
    """

    def __init__(self) -> None:
        self.events: list[tuple[tuple[int, int], str, str]] = []
        self._ends: list[tuple[int, int]] = []

    def visit(self, node: ast.AST) -> None:
        """A statement gives its variables their values at its end."""
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            self._ends.append((node.end_lineno or 0, node.end_col_offset or 0))
            super().visit(node)
            self._ends.pop()
        else:
            super().visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """Wherever a name is not read: a loop, a with statement and the like give it a value at once."""
        if not isinstance(node.ctx, ast.Load):
            place = self._ends[-1] if self._ends else (node.lineno, node.col_offset)
            self.events.append((place, "", node.id))

    def visit_Call(self, node: ast.Call) -> None:
        """``self.child(variable)``."""
        function, one = node.func, node.args[0] if len(node.args) == 1 else None
        if (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id == "self"
        ):
            simple = isinstance(one, ast.Name) and not node.keywords
            variable = one.id if simple and isinstance(one, ast.Name) else ast.dump(node)
            self.events.append(((node.lineno, node.col_offset), function.attr, variable))
        self.generic_visit(node)
