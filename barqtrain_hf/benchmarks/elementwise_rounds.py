"""Rivals in turn: rounds over all of them, every other one backwards.

Drifts of clocks, memory and host then meet all of them alike; measured one after the other, the first and the
last differ by up to a few percent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

from barqtrain_hf.benchmarks.harness import Timing
from barqtrain_hf.benchmarks.head_anchors import reason


def in_rounds(
    names: Iterable[str], measure: Callable[[str, bool], dict[str, Any]], rounds: int
) -> dict[str, dict[str, Any]]:
    """What ``measure(name, first time?)`` gives for each, timings as the median of the rounds."""
    order = list(names)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    failed: dict[str, dict[str, Any]] = {}
    for i in range(rounds):
        for name in order if i % 2 == 0 else reversed(order):
            if name not in failed:
                try:
                    found[name].append(measure(name, i == 0))
                except Exception as error:
                    # A kernel that does not build, a limit of its own, no memory: the row says so.
                    failed[name] = {"unavailable": reason(error)}
    return {name: failed.get(name) or _middle(found[name]) for name in order}


def _middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row = dict(rounds[0])
    for key, value in row.items():
        if isinstance(value, Timing):
            timings = (astuple(timing[key]) for timing in rounds)
            row[key] = Timing(*map(statistics.median, zip(*timings, strict=True)))
    return row
