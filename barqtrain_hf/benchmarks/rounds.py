"""Rivals in turn: rounds over all of them.

Drifts of clocks, memory and host then meet all of them alike; measured one after the other, the first and the
last differ by up to a few percent. `in_rounds` takes any measurement, which has waited for the device when it
returns, and gives the middle of the rounds. `interleave` is a measurement: of the device alone, by calls that
are queued over all rounds without waiting in between, each round one sample.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

import torch

from barqtrain_hf.benchmarks.harness import Timing
from barqtrain_hf.benchmarks.head_anchors import reason

# Of `interleave`: rounds, the device time of one turn, and the device's cycles in a millisecond, roughly.
_ROUNDS, _MILLISECONDS, _CYCLES = 20, 4.0, 2e6
# Milliseconds; a call that itself waits for the device is late after any.
_LONGEST_WAIT = 50.0


def in_rounds(
    names: Iterable[str], measure: Callable[[str, bool], dict[str, Any]], rounds: int
) -> dict[str, dict[str, Any]]:
    """What ``measure(name, first time?)`` gives for each, timings as the median of the rounds.

    Every other round is backwards.
    """
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


def interleave(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
    """Milliseconds per call of each, from rounds in which every one has its turn; or why there are none."""
    rows: dict[str, dict[str, Any]] = {}
    numbers, waits = {}, {}
    for name, call in calls.items():
        try:
            device_ms, host_ms = _once(call)
        except Exception as error:  # as above
            rows[name] = {"unavailable": reason(error)}
            continue
        numbers[name] = min(max(round(_MILLISECONDS / device_ms), 1), 20)
        waits[name] = 0.2 + 1.5 * host_ms * numbers[name]
    samples: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        name: [] for name in numbers
    }
    with_host = dict.fromkeys(numbers, 0)
    # In another order each round: after a kernel that draws much power the clock is lower for a while.
    order, shuffle = list(numbers), random.Random(0).shuffle
    for turn in range(_ROUNDS + 1):
        shuffle(order)
        for name in order:
            number = numbers[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(round(waits[name] * _CYCLES))
            start.record()
            for _ in range(number):
                calls[name]()
            # Had the wait ended before all calls were queued, the device may have waited for the host.
            late = start.query()
            end.record()
            if late:
                waits[name] = min(2 * waits[name], _LONGEST_WAIT)
            if turn:  # the first round warms up
                samples[name].append((start, end))
                with_host[name] += late
    torch.cuda.synchronize()
    for name, events in samples.items():
        ms = [start.elapsed_time(end) / numbers[name] for start, end in events]
        rows[name] = {"ms": Timing.of(ms)}
        if with_host[name]:
            rows[name]["rounds_with_host"] = with_host[name]
    return rows


def _once(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of an eager call after two others, with its host's work and of the host alone."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    call()
    torch.cuda.synchronize()
    before = time.perf_counter()
    start.record()
    call()
    end.record()
    host = time.perf_counter() - before
    end.synchronize()
    return max(start.elapsed_time(end), 1e-3), host * 1e3
