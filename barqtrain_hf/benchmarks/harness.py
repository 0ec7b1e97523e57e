"""What every benchmark shares: timing with CUDA events, the machine's description, JSON and a table."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from barqtrain_hf import __version__
from barqtrain_hf.errors import DataError, UnsupportedError

_PACKAGES = (
    *("torch", "transformers", "accelerate", "cupy-cuda13x", "cupy-cuda12x"),
    *("liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "cut-cross-entropy", "trl", "peft"),
    *("datasets", "tokenizers", "bitsandbytes"),
)


@dataclass(frozen=True)
class Timing:
    """Median of repeated runs and the range of their middle half."""

    median: float
    quartile_1: float
    quartile_3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        low, middle, high = statistics.quantiles(samples, n=4)
        return cls(middle, low, high)


@dataclass
class Report:
    """Rows of one benchmark with everything needed to run it again."""

    benchmark: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def add(self, **row: Any) -> None:
        """Adds one row; `Timing` values are written out in full."""
        self.rows.append({k: asdict(v) if isinstance(v, Timing) else v for k, v in row.items()})

    def write(self, path: Path) -> None:
        """Writes the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def print(self) -> None:
        """Prints the rows as one table for each part; a timing is shown by its median."""
        parts: dict[Any, list[dict[str, Any]]] = {}
        for row in self.rows:
            parts.setdefault(row.get("part"), []).append(row)
        console = Console(width=None if sys.stdout.isatty() else 160)
        for part, rows in parts.items():
            columns = [key for row in rows for key in row if key != "part"]
            columns = list(dict.fromkeys(columns))
            title = ", ".join(filter(None, (self.benchmark, part)))
            table = Table(*columns, title=f"{title} on {self.environment['device']}")
            for row in rows:
                table.add_row(*(_cell(row.get(column)) for column in columns))
            console.print(table)


def environment() -> dict[str, Any]:
    """Device, versions and command of this process."""
    versions = {
        "barqtrain_hf": __version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} threads",
        "command": _command(sys.argv[1:]),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _command(words: Sequence[str]) -> str:
    if words[:1] == ["bench"]:
        return " ".join(["barqtrain", *words])
    return " ".join(["python", "-m", "barqtrain_hf.benchmarks", *words])


def time_gpu(
    call: Callable[[], Any],
    repeats: int = 100,
    warm_up: int = 20,
    before: Callable[[], Any] = lambda: None,
) -> Timing:
    """Milliseconds on the device, each call between two events; ``before`` runs ahead of the first."""
    for _ in range(warm_up):
        before()
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, end in events:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return Timing.of([start.elapsed_time(end) for start, end in events])


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """The stream that `time_graph` captures on.

    Autograd runs a backward pass on the stream of its forward pass: to capture one, run the other here.
    """
    return torch.cuda.Stream()


def time_graph(
    call: Callable[[], Any],
    calls: int = 20,
    repeats: int = 40,
    before: Callable[[], Any] = lambda: None,
) -> Timing:
    """Milliseconds per call on the device, from replays of a CUDA graph: no host time in between.

    ``before`` runs ahead of each replay and is not timed.
    """
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(), capture_stream()
    try:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            before()
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own in place
    total = time_gpu(graph.replay, repeats=repeats, warm_up=5, before=before)
    return Timing(total.median / calls, total.quartile_1 / calls, total.quartile_3 / calls)


def time_host(call: Callable[[], Any], calls: int = 2000, repeats: int = 9) -> Timing:
    """Microseconds of host time per call, while the device keeps up."""
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return Timing.of(samples)


def copy_bandwidth() -> Timing:
    """TB/s of a large device-to-device copy, counting bytes read and written: the ceiling."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms = time_gpu(lambda: target.copy_(source), repeats=30)
    terabytes = 2 * source.numel() / 1e9
    return Timing(terabytes / ms.median, terabytes / ms.quartile_3, terabytes / ms.quartile_1)


def new_figure(size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of a size in inches.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "The plot is drawn with matplotlib, which is not installed.",
            "pip install 'barqtrain_hf[bench]'",
        ) from None
    return Figure(figsize=size, layout="constrained")


def draw_report(
    benchmark: str, draw: Callable[[dict[str, Any], Path], None], argv: Sequence[str] | None
) -> int:
    """The command ``REPORT.json OUTPUT.png`` of a benchmark with a plot; returns its exit code."""
    parser = argparse.ArgumentParser(description="Draws the plot of a report.")
    parser.add_argument("report", type=Path, help=f"JSON of the benchmark {benchmark}")
    parser.add_argument("output", type=Path, help="PNG to write")
    arguments = parser.parse_args(argv)
    try:
        draw(json.loads(arguments.report.read_text(encoding="utf-8")), arguments.output)
    except (DataError, UnsupportedError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = value["median"]
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
