"""Runs of benchmarks in processes of their own: their results, failures and limits."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from barqtrain_hf.benchmarks.apart import run_apart

_CHILD = """
import json, os, sys, time
from pathlib import Path
Path(sys.argv[1]).touch()
settings = json.loads(sys.stdin.readline() or "null")
if settings is None:
    sys.exit(0)
if settings.get("fails"):
    raise ImportError("no flash")
time.sleep(settings.get("sleeps", 0))
print("something else")
print(json.dumps({"next_is_there": Path(sys.argv[1] + "+").exists(), **settings}))
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """One in which the module ``child`` is found and files are written below `tmp_path`."""
    (tmp_path / "child.py").write_text(_CHILD)
    monkeypatch.chdir(tmp_path)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_results_and_failures_in_turn(environment: dict[str, str]) -> None:
    runs: list[tuple[str, dict[str, Any]]] = [
        ("a", {"value": 1}),
        ("b", {"fails": True}),
        ("c", {"sleeps": 60}),
        ("d", {"value": 2}),
    ]
    results = list(run_apart("child", runs, 5, 60, environment))
    assert [row.get("value") for row in results] == [1, None, None, 2]
    assert results[1] == {"unavailable": "ImportError: no flash"}
    assert results[2] == {"unavailable": "took more than 5 seconds"}


def test_the_next_is_started_before_its_turn(environment: dict[str, str]) -> None:
    first, second = run_apart("child", [("x", {"sleeps": 1}), ("x+", {})], 30, 60, environment)
    assert first["next_is_there"]
    assert not second["next_is_there"]


def test_no_run_after_the_end(environment: dict[str, str]) -> None:
    results = list(run_apart("child", [("a", {}), ("b", {})], 30, 0, environment))
    assert results == 2 * [{"unavailable": "not run: 0 minutes were over"}]


def test_nobody_waits_for_ever(environment: dict[str, str]) -> None:
    """Who stops asking ends the process that waits for its turn."""
    start = time.monotonic()
    results = run_apart("child", [("a", {}), ("b", {"sleeps": 60})], 30, 60, environment)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 20
