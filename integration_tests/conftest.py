"""Shared by all tests: no hub, one thread where processes share the cores, and what a GPU test needs."""

from __future__ import annotations

import collections
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, and by child processes

import pytest
import torch

from barqtrain_hf.benchmarks.harness import environment
from barqtrain_hf.runtime import cuda_unavailable_reason


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="file to write the outcome of every test to")


class _Results:
    """Writes what passed where, so that a run on a GPU can be committed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        command = " ".join(["python", "-m", "pytest", *sys.argv[1:]])
        content = {
            "environment": {**environment(), "command": command},
            "counts": collections.Counter(self.outcomes.values()),
            "outcomes": self.outcomes,
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--results")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to one
        config.pluginmanager.register(_Results(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cuda_unavailable_reason()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skipif(True, reason=reason))


def pytest_collection_finish() -> None:
    # Every Trainer calls gc.collect(), which would look at all that was imported, for most of the test.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions complain at exit of what was never collected


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fp32() -> Iterator[None]:
    """A Trainer that compiles turns TF32 on, and leaves it on."""
    # From torch 2.9 on the first, which must not be mixed with the other.
    new = hasattr(torch.backends, "fp32_precision")
    place: Any = torch.backends if new else torch.backends.cuda.matmul
    name = "fp32_precision" if new else "allow_tf32"
    before = getattr(place, name)
    yield
    setattr(place, name, before)
