"""An iterator that runs ahead of its reader on a thread."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from barqtrain_hf.errors import UnsupportedError

Item = TypeVar("Item")

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_STOP = 0.9


class Prefetcher(Generic[Item]):
    """Keeps one item of an iterator ready, in order; an exception in it comes out where its item would.

    The queue is bounded, so at most three items exist: the one in use, the one that is ready and the
    one being made. Used in a ``with`` block, at whose end the thread stops. It is a daemon, so an
    iterator that blocks for ever cannot keep the interpreter from ending.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(1)
        self._stop = threading.Event()
        self._process = os.getpid()
        self._thread = threading.Thread(
            target=self._run, args=(items,), name="barqtrain-prefetch", daemon=True
        )
        self._thread.start()
        _running.add(self)

    def _run(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, None))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Item]:
        while True:
            item, error = self._get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def _get(self) -> tuple[Item | None, BaseException | None]:
        while True:
            if os.getpid() != self._process:
                raise UnsupportedError(
                    "This iterator was made before a fork, and its thread stayed in the parent.",
                    "Call iter() on the stream in the process that reads it.",
                )
            try:
                # Without a timeout Ctrl-C would wait for the item.
                return self._queue.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                continue

    def close(self) -> None:
        """Stops the thread after what it is doing; waits for that at most a second."""
        self._stop.set()
        _running.discard(self)
        if os.getpid() == self._process:
            self._thread.join(_SECONDS_TO_STOP)

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_running: weakref.WeakSet[Prefetcher[Any]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A daemon thread must not come back from Rust into an interpreter that is going away.
    for prefetcher in list(_running):
        prefetcher.close()
