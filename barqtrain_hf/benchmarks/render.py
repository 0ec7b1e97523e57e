"""Tables of README and docs from committed JSON: `python -m barqtrain_hf.benchmarks.render [--check]`.

A table stands between `<!-- NAME: FILE... -->` and `<!-- /NAME -->`; NAME chooses how the files are shown.
No number in the docs is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"(<!-- (\w+): ([^>]+?) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
Json = dict[str, Any]


def demo_table(records: Sequence[Json]) -> list[str]:
    """One line per demo run: BarqTrainer beside the stock Trainer."""
    lines = [
        "| `barqtrain demo` | | tokens/s | peak memory | padding | held-out loss | exact match |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        runs, before = record["runs"], record["before"]
        ratio = runs["barq"]["tokens_per_second"] / runs["stock"]["tokens_per_second"]
        for name in ("stock", "barq"):
            run = runs[name]
            scores = run["scores"]
            match = scores["exact_match"]
            speed = f"{run['tokens_per_second']:,.0f}"
            cells = [
                f"{record['data']['name']}, {record['device']}" if name == "stock" else "",
                run["title"],
                speed if name == "stock" else f"**{speed} ({ratio:.2f}×)**",
                "" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**30:.2f} GiB",
                f"{run['padding']:.1%}",
                f"{before['loss']:.2f} → {scores['loss']:.3f}",
                "" if match is None else f"{before['exact_match']:.1%} → {match:.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def rms_norm_table(reports: Sequence[Json]) -> list[str]:
    """Bandwidth per shape and implementation."""
    lines = [
        "| rows × D, bf16 | | forward TB/s | of copy | backward TB/s | of copy |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for report in reports:
        shape = None
        for row in report["rows"]:
            if "backward_tb_s" not in row:
                continue
            this = f"{row['rows']}×{row['dim']}"
            lines.append(
                f"| {this if this != shape else ''} | {row['implementation']} "
                f"| {row['forward_tb_s']:.2f} | {row['forward_share_of_copy']:.0%} "
                f"| {row['backward_tb_s']:.2f} | {row['backward_share_of_copy']:.0%} |"
            )
            shape = this
    return lines


def launch_table(reports: Sequence[Json]) -> list[str]:
    """Host microseconds per launch."""
    lines = ["| one launch | host µs, median | middle half |", "|---|---:|---:|"]
    for report in reports:
        for row in report["rows"]:
            time = row["host_us"]
            spread = f"{time['quartile_1']:.1f} to {time['quartile_3']:.1f}"
            lines.append(f"| {row['launch']} | {time['median']:.1f} | {spread} |")
    return lines


def source_table(reports: Sequence[Json]) -> list[str]:
    """Where each file comes from: device, versions and command."""
    lines = ["| device | command | versions | date |", "|---|---|---|---|"]
    for report in reports:
        origin = report.get("environment", report)
        versions = ", ".join(f"{k} {v}" for k, v in origin["versions"].items())
        cells = (origin["device"], f"`{origin['command']}`", versions, origin.get("date", ""))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


TABLES: dict[str, Callable[[Sequence[Json]], list[str]]] = {
    "demo": demo_table,
    "rms_norm": rms_norm_table,
    "launch": launch_table,
    "source": source_table,
}


def render(text: str, root: Path) -> str:
    """``text`` with every marked table made anew from the files it names, relative to ``root``."""

    def table(match: re.Match[str]) -> str:
        opening, name, files, closing = match.groups()
        records = [json.loads((root / file).read_text(encoding="utf-8")) for file in files.split()]
        return opening + "\n".join(TABLES[name](records)) + "\n" + closing

    return _BLOCK.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the tables of the repository in the current folder, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    check = parser.parse_args(argv).check
    root = Path.cwd()
    stale = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = render(old, root)
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print("out of date:" if check else "rewritten:", ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
