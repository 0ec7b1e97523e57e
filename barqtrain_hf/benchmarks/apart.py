"""Runs in processes of their own, one after another: what one of them patches or compiles meets no other.

While one runs, the next imports what it needs and waits: torch and transformers take as long to import as
many steps take to run, and they are imported while the run before loads its model and warms up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

_SHOWN = 160  # characters of a failure


def run_apart(
    module: str,
    runs: Sequence[tuple[str, dict[str, Any]]],
    each_s: float,
    all_s: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """The results of all runs in turn: each one's numbers, or why there are none as "unavailable".

    Args:
        module: run as ``python -m module name``; it imports what `name` needs, reads a line of JSON from
            stdin (`read_settings`), and prints its result as the last line, in JSON.
        runs: the name and the settings of each.
        each_s, all_s: seconds that one run and all of them may take; those after the end are not run.
        environment: of the processes; None for this one's.
    """
    end = time.monotonic() + all_s
    with ExitStack() as at_exit:

        def start(name: str) -> subprocess.Popen[str]:
            pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            command = [sys.executable, "-m", module, name]
            child = subprocess.Popen(command, text=True, env=environment, **pipes)
            at_exit.callback(_end, child)
            return child

        waiting: subprocess.Popen[str] | None = None
        for number, (name, settings) in enumerate(runs):
            seconds = min(each_s, end - time.monotonic())
            if seconds <= 0:
                yield {"unavailable": f"not run: {all_s / 60:g} minutes were over"}
                continue
            child = waiting or start(name)
            if number + 1 < len(runs):
                waiting = start(runs[number + 1][0])
            begin = time.monotonic()
            result = _result(child, settings, seconds)
            took = time.monotonic() - begin
            print(f"{number + 1} of {len(runs)}, {name}: {took:.0f} s", file=sys.stderr, flush=True)
            yield result


def read_settings() -> dict[str, Any]:
    """What a run was asked for, once its turn has come. Without an answer there is nothing to run."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    return json.loads(line)  # type: ignore[no-any-return]


def _result(
    child: subprocess.Popen[str], settings: dict[str, Any], seconds: float
) -> dict[str, Any]:
    try:
        out, errors = child.communicate(json.dumps(settings) + "\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(child)  # now, for the next one's turn begins
        return {"unavailable": f"took more than {seconds:.0f} seconds"}
    if child.returncode:
        lines = errors.strip().splitlines()
        return {"unavailable": lines[-1][:_SHOWN] if lines else f"exit code {child.returncode}"}
    return json.loads(out.strip().splitlines()[-1])  # type: ignore[no-any-return]


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None and not pipe.closed:
            pipe.close()
