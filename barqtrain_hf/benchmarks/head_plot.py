"""Time against memory of the linear layer with cross-entropy, from a report of its benchmark.

`python -m barqtrain_hf.benchmarks.head_plot REPORT.json OUTPUT.png`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barqtrain_hf.benchmarks.harness import draw_report, new_figure
from barqtrain_hf.benchmarks.linear_cross_entropy import OURS, PLAIN
from barqtrain_hf.errors import DataError

Json = dict[str, Any]
_CASE = ("rows", "hidden", "vocab", "weight", "ignored")


def draw(report: Json, path: Path) -> None:
    """Writes a PNG with one panel for the trained head and one for the frozen.

    Raises:
        DataError: the report has no rows of the sweep for one of the two.
        UnsupportedError: matplotlib is not installed.
    """
    figure = new_figure((11, 4.5))
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axes, weight in zip(figure.subplots(1, 2), ("trained", "frozen"), strict=True):
        sweep, others, gemm = _panel(report["rows"], weight)
        axes.axhline(gemm, color="gray", linestyle="--", label="the products alone")
        largest = max(row["extra_bytes"] for row in others) / 2**30
        for row in others:
            point, name, near = _point(row), row["implementation"], (6.0, 6.0)
            if name == OURS:
                axes.plot(*point, "*", markersize=13, color="C0")
                name, near = "ours, default", (-6.0, -15.0)  # the curve bends away from there
            else:
                axes.plot(*point, "o", color="C1")
                if point[0] == largest:
                    near = (-6.0, 6.0)  # inside the panel
            side = "left" if near[0] > 0 else "right"
            axes.annotate(name, point, near, textcoords="offset points", fontsize=9, ha=side)
        curve = zip(*map(_point, sweep), strict=True)
        axes.plot(*curve, "o-", color="C0", markersize=4, label="ours, by max_extra_bytes")
        axes.set_xscale("log")  # materialised logits take ten times the memory of the others
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12, y=0.1)
        shape = "×".join(str(sweep[0][key]) for key in ("rows", "hidden", "vocab"))
        axes.set(title=f"{shape}, {weight} head", xlabel="extra memory, GiB (gradients included)")
        axes.set_ylabel("forward and backward, ms")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Linear layer with cross-entropy, bf16, {report['environment']['device']}")
    figure.savefig(path, dpi=120)


def _panel(rows: Sequence[Json], weight: str) -> tuple[list[Json], list[Json], float]:
    """Rows of our sweep by memory, rows of everything in the same case, and the products' time."""
    measured = [row for row in rows if row.get("weight") == weight and "ms" in row]
    sweep = sorted((row for row in measured if row["part"] == "sweep"), key=_point)
    if not sweep:
        raise DataError(f"the report has no rows of the sweep with a {weight} head")
    case = {key: sweep[0][key] for key in _CASE}
    same = [row for row in measured if row["part"] == "case" and case.items() <= row.items()]
    gemm = next(row["ms"]["median"] for row in same if row["implementation"] == "pure GEMM")
    shown = [row for row in same if "extra_bytes" in row and row["implementation"] != PLAIN]
    return sweep, shown, gemm


def _point(row: Json) -> tuple[float, float]:
    return row["extra_bytes"] / 2**30, row["ms"]["median"]


def main(argv: Sequence[str] | None = None) -> int:
    """Draws one report; returns the exit code."""
    return draw_report("linear_cross_entropy", draw, argv)


if __name__ == "__main__":
    sys.exit(main())
