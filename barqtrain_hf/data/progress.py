"""Progress bars for what may take long."""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from typing import Any

# Before that a bar would only flash by.
_SECONDS_BEFORE_SHOWN = 1.5


def progress(description: str, unit: str, total: int | None = None, **options: Any) -> Any:
    """A tqdm bar that appears after a second and a half.

    There is none where output goes to a file, where the progress bars of ``datasets`` or
    ``huggingface_hub`` (and so of transformers) are switched off, and in other processes of a machine
    than the first that torchrun starts there.

    Args:
        description: what is done.
        unit: what is counted.
        total: how many there are, if that is known.
        options: as of ``tqdm``.
    """
    bar = _bar()
    return bar(
        desc=description,
        total=total,
        unit=unit,
        disable=_disabled(bar),
        delay=_SECONDS_BEFORE_SHOWN,
        miniters=1,  # look at the clock at each update, of which there are few
        **options,
    )


@functools.cache
def _bar() -> Any:
    """tqdm with a lock and a list of bars of our own, and without a thread.

    All bars of tqdm, those that are not shown too, share a lock with those of forked processes. Killed
    while it held that lock, such a process would stop us for ever.
    """
    from tqdm.auto import tqdm

    bar = type(
        "Bar", (tqdm,), {"monitor_interval": 0, "monitor": None, "_instances": weakref.WeakSet()}
    )
    bar.set_lock(threading.RLock())  # type: ignore[attr-defined]
    return bar


if hasattr(os, "register_at_fork"):  # not on Windows
    # Another thread may hold the lock at that moment; in the child nobody would release it.
    os.register_at_fork(after_in_child=_bar.cache_clear)


def _disabled(bar: type) -> bool | None:
    """As ``disable`` of tqdm, where None leaves it to whether the output is a terminal."""
    import huggingface_hub.utils as hub

    if hub.are_progress_bars_disabled() or os.environ.get("LOCAL_RANK", "0") != "0":
        return True
    datasets = sys.modules.get("datasets")  # it can only have been told so if it was imported
    if datasets is not None and datasets.are_progress_bars_disabled():
        return True
    # Neither a notebook nor a log that is shown as it grows is a terminal.
    in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in bar.__mro__)
    return False if in_notebook or os.environ.get("TQDM_POSITION") == "-1" else None
