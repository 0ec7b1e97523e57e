"""Peak memory of one training run, although several share a process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from construction to `read`.

    On a GPU this is the most that torch had allocated. On a CPU it is the peak resident memory of the
    process (Linux lets a process reset that mark) less what was resident at the start, after memory
    freed earlier has gone back to the system: what training itself needed.
    """

    def __init__(self, *, gpu: bool) -> None:
        gc.collect()
        self._gpu = gpu
        self._start: int | None = None
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            _return_freed_memory()
            try:
                _CLEAR_REFS.write_text("5")
                self._start = _status("VmRSS")
            except (OSError, LookupError):  # not Linux, or not allowed
                self._start = None

    def read(self) -> int | None:
        """Bytes, or None where it cannot be measured."""
        if self._gpu:
            return int(torch.cuda.max_memory_allocated())
        return None if self._start is None else max(0, _status("VmHWM") - self._start)


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise LookupError(name)


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
