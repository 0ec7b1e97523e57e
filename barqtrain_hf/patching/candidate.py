"""What the files per kind of layer hand to `install`: modules that may take an op, and how to find out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from barqtrain_hf.patching.report import PatchReport

# The op that matched and the function to bind, or the reason why there is none; an empty one is not reported.
Answer = tuple[str, Callable[..., Any]] | str


class Candidate(NamedTuple):
    """One module that may take an op, or that a reader of the report would expect to.

    Attributes:
        op: the op it is reported under if it does not match.
        name: its name in the model.
        module: the module.
        build: probes it and answers; it is not called where nothing could be bound.
        attribute: what to bind on the instance.
        over: whether it may be bound over something bound there already.
    """

    op: str
    name: str
    module: nn.Module
    build: Callable[[PatchReport], Answer]
    attribute: str = "forward"
    over: Callable[[Any], bool] = lambda bound: False


def because(reason: str) -> Callable[[PatchReport], Answer]:
    """The ``build`` of a module of which it is known already that it does not match."""
    return lambda report: reason
