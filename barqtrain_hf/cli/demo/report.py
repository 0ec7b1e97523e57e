"""What the user sees at the end: one table and some samples."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHOWN = 150


def table(record: dict[str, Any]) -> Table:
    """The table of a run, from its demo.json."""
    runs: dict[str, dict[str, Any]] = record["runs"]
    gpu = record["settings"]["scale"] == "gpu"
    result = Table(title=f"barqtrain demo: {record['data']['name']}", title_justify="left")
    result.add_column("")
    result.add_column("untrained", justify="right")
    for run in runs.values():
        result.add_column(run["title"], justify="right")
    result.caption = "Real tokens are those of documents: padding is computed but not counted. " + (
        "" if gpu else "Added memory is what the process took beyond what it held before."
    )
    result.caption_justify = "left"
    speeds = {name: run["tokens_per_second"] for name, run in runs.items()}
    memory = "peak GPU memory" if gpu else "added memory"

    def row(label: str, before: str, cells: list[str], *, style: str = "") -> None:
        result.add_row(label, before, *cells, style=style)

    each = list(runs.values())
    row(
        "steps × documents",
        "",
        [f"{run['steps']:,} × {run['documents_per_step']:.1f}" for run in each],
    )
    row("real tokens", "", [f"{run['tokens']:,}" for run in each])
    row("training time", "", [f"{run['seconds']:.1f} s" for run in each])
    row("real tokens/s", "", [_speed(name, speeds) for name in runs], style="bold")
    row(memory, "", [_memory(run["peak_bytes"]) for run in each])
    row("padding share", "", [f"{run['padding']:.1%}" for run in each])
    before = record["before"]
    row("held-out loss", f"{before['loss']:.3f}", [f"{r['scores']['loss']:.3f}" for r in each])
    if before["exact_match"] is not None:
        row(
            "exact match, held-out",
            f"{before['exact_match']:.1%}",
            [f"{run['scores']['exact_match']:.1%}" for run in each],
            style="bold",
        )
        for family, share in before["by_family"].items():
            scores = [f"{run['scores']['by_family'][family]:.0%}" for run in each]
            row(f"  {family}", f"{share:.0%}", scores, style="dim")
    return result


def samples(record: dict[str, Any]) -> RenderableType:
    """Held-out prompts with what should come and what the trained model said."""
    scores = record["runs"]["barq"]["scores"]
    exact = scores["exact_match"] is not None
    expected = "expected" if exact else "original"
    lines = [Text("Samples from the model trained with BarqTrainer:", style="bold")]
    for sample in scores["samples"]:
        right = exact and sample["said"] == sample["expected"]
        lines += [
            Text(f"\n  {'prompt':<9} {_short(sample['prompt'])}"),
            Text(f"  {expected:<9} {_short(sample['expected'])}", style="dim"),
            Text(f"  {'model':<9} {_short(sample['said'])}", style="green" if right else ""),
        ]
    return Group(*lines)


def _speed(name: str, speeds: dict[str, float]) -> str:
    text = f"{speeds[name]:,.0f}"
    if name == "barq" and "stock" in speeds:
        text += f" ({speeds['barq'] / speeds['stock']:.2f}×)"
    return text


def _memory(peak_bytes: int | None) -> str:
    if peak_bytes is None:
        return "not measured here"
    return (
        f"{peak_bytes / 2**30:.2f} GiB" if peak_bytes >= 2**30 else f"{peak_bytes / 2**20:.0f} MiB"
    )


def _short(text: str) -> str:
    """On one line, the middle left out where it is long."""
    line = text.replace("\n", "⏎")
    if len(line) <= _SHOWN:
        return line
    return f"{line[: _SHOWN // 2]} … {line[-_SHOWN // 2 :]}"
