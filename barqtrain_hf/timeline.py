"""Where the time of training goes: marks on the device's timeline, read only when something is logged.

Marks split a run into intervals, each named by the mark at its end:

- ``WORK``: training, from the launch of a step to its end, and what is done between steps on the host;
- ``DATA``: a step has ended and the batches of the next one have not arrived;
- ``PAUSE``: evaluation, a checkpoint, samples: no training, and left out of everything.

On a GPU a mark is a CUDA event beside the host's clock. An event is reached when the device has done all
that was launched before it, so an interval lasts from when the device reached one mark to when it reached the
next: a ``DATA`` interval is what the device waits, and nothing where batches arrive while it still computes.

How far the device is behind when the host sets a mark is the mark's backlog. Up to so much of the interval
before it, the device computed without pause, for all of it had been launched. What remains of ``WORK`` may
have been idle: the device was as fast as the host launched, and the host set the pace.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

WORK, DATA, PAUSE = "work", "data", "pause"
# Events that nobody reads for a long time are read as soon as the device has passed them.
_KEPT = 256


@dataclass(frozen=True)
class Span:
    """A stretch of training, without pauses.

    Attributes:
        seconds: how long it took, greater than 0.
        data_wait: the share of it that the device waited for batches; 0 to 1.
        host_bound: the share of it, beside ``data_wait``, in which the host set the pace; 0 to 1, or None
            where there is no CUDA device. The device was idle for no more than that.
    """

    seconds: float
    data_wait: float
    host_bound: float | None


@dataclass(frozen=True)
class _Mark:
    kind: str
    host: float  # seconds, as perf_counter
    event: torch.cuda.Event | None


class Timeline:
    """Marks, and what lies between them. Waits for the device when it is made and when it is read.

    Args:
        device: on which training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.synchronize(device)
        self._begin()

    def mark(self, kind: str) -> None:
        """Ends an interval; does not wait for the device.

        Args:
            kind: ``WORK``, ``DATA`` or ``PAUSE``: what the interval was.
        """
        self._marks.append(self._now(kind))
        if len(self._marks) > _KEPT:
            self._count()

    def read(self) -> Span:
        """What there was since this was made or read, until now; waits for the device."""
        last = self._now(WORK)
        self._marks.append(last)
        if last.event is not None:
            last.event.synchronize()
        self._count()
        seconds = max(self._seconds, 1e-9)
        span = Span(
            seconds=seconds,
            data_wait=self._waited / seconds,
            host_bound=max(0.0, self._unhurried / seconds) if self.on_gpu else None,
        )
        self._begin()
        return span

    def _now(self, kind: str) -> _Mark:
        event = None
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
        return _Mark(kind, time.perf_counter(), event)

    def _begin(self) -> None:
        """The device has nothing to do here, so it reaches this mark when the host sets it."""
        first = self._now(PAUSE)
        self._marks = deque([first])
        self._reached = (
            first.host
        )  # when the device reached the first of the marks, on the host's clock
        self._seconds = self._waited = self._unhurried = 0.0

    def _count(self) -> None:
        """Counts the intervals that the device has passed, and forgets their marks."""
        while len(self._marks) > 1:
            first, mark = self._marks[0], self._marks[1]
            if first.event is None or mark.event is None:
                duration = mark.host - first.host
            elif first.event.query() and mark.event.query():
                duration = max(0.0, first.event.elapsed_time(mark.event) / 1e3)
            else:
                return
            self._marks.popleft()
            self._reached += duration
            if mark.kind == PAUSE:
                continue
            self._seconds += duration
            if mark.kind == DATA:
                self._waited += duration
            else:
                backlog = min(max(self._reached - mark.host, 0.0), duration)
                self._unhurried += duration - backlog
