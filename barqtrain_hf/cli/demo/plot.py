"""The picture of a run: loss and speed over the tokens trained on."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from barqtrain_hf.errors import UnsupportedError


def figure_class() -> Any:
    """matplotlib's ``Figure``, which needs no display.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "The demo draws its plot with matplotlib, which is not installed.",
            "pip install 'barqtrain_hf[bench]'",
        ) from None
    return Figure


def draw(runs: dict[str, dict[str, Any]], name: str, path: Path) -> None:
    """Writes a PNG.

    Args:
        runs: `RunResult` as plain data, by trainer.
        name: what was trained on, for the title.
        path: the file to write.
    """
    figure = figure_class()(figsize=(10, 4), layout="constrained")
    from matplotlib.ticker import EngFormatter

    loss, speed = figure.subplots(1, 2)
    for run in runs.values():
        # The first window holds warm-up of libraries and caches, which would set the scale.
        curve = [entry for entry in run["curve"] if "loss" in entry]
        tokens = list(accumulate(entry["real_tokens"] for entry in curve))
        loss.plot(tokens, [float(entry["loss"]) for entry in curve], label=run["title"])
        rates = [entry["real_tokens"] / entry["real_seconds"] for entry in curve]
        speed.plot(tokens[1:], rates[1:], label=run["title"])
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    loss.set(ylabel="training loss", yscale="log")
    speed.set(ylabel="real tokens per second", ylim=(0, None))
    for axes in (loss, speed):
        axes.set(xlabel="real tokens trained on")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"barqtrain demo: {name}")
    figure.savefig(path, dpi=120)
