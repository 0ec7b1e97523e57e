"""Tables of README and docs from committed JSON: `python -m barqtrain_hf.benchmarks.render [--check]`.

A table stands between `<!-- NAME: FILE... -->` and `<!-- /NAME -->`; NAME chooses how the files are shown.
No number in the docs is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from barqtrain_hf.benchmarks.attention_tables import (
    attention_accuracy_table,
    attention_memory_table,
    attention_table,
    packed_attention_table,
)
from barqtrain_hf.benchmarks.roofline_tables import (
    attention_roofline_table,
    bandwidth_roofline_table,
    head_roofline_table,
    lora_roofline_table,
)
from barqtrain_hf.benchmarks.table_rows import Json, bold, rows_of, unavailable
from barqtrain_hf.benchmarks.training_tables import (
    lora_accuracy_table,
    lora_table,
    sft_table,
    steps_table,
)

_BLOCK = re.compile(r"(<!-- (\w+): ([^>]+?) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


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


def bandwidth_table(reports: Sequence[Json]) -> list[str]:
    """TB/s of the floor's bytes per case and implementation, and the time of one call."""
    lines = [
        "| bf16 | | forward TB/s | of copy | backward TB/s | of copy | through autograd: forward ms "
        "| backward ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row, case in rows_of(reports, "bandwidth", _op_case):
        cells = [unavailable(row), *[""] * 5]
        if "unavailable" not in row:
            cells = []
            for direction in ("forward", "backward"):
                host = " (with host)" if f"{direction}_not_captured" in row else ""
                cells.append(f"{row[f'{direction}_tb_s']:.2f}{host}")
                cells.append(f"{row[f'{direction}_share_of_copy']:.0%}")
            for direction in ("forward", "backward"):
                cells.append(f"{row[f'autograd_{direction}_ms']['median']:.3f}")
        lines.append(f"| {' | '.join([case, *bold([row['implementation'], *cells], row)])} |")
    return lines


def verdict_table(reports: Sequence[Json]) -> list[str]:
    """Ours beside copy and the fastest rival, per case and direction."""
    lines = [
        "| bf16 | | of copy | fastest rival on the device | speed beside it | fastest through autograd "
        "| speed beside it | not compared |",
        "|---|---|---:|---|---:|---|---:|---|",
    ]
    for row, case in rows_of(reports, "verdict", _op_case):
        cells = [unavailable(row), *[""] * 5]
        if "unavailable" not in row:
            mark = "" if row["met"] or not row["in_bars"] else " ✗"
            cells = [
                f"{row['share_of_copy']:.0%}{mark}",
                row["best_rival"],
                f"{row['times_faster']:.2f}×",
                row["autograd_rival"],
                f"{row['autograd_times_faster']:.2f}×",
                ", ".join(row["not_compared"]),
            ]
        lines.append(f"| {case} | {row['direction']} | {' | '.join(cells)} |")
    return lines


def bars_table(reports: Sequence[Json]) -> list[str]:
    """How many of the cases meet each bar."""
    lines = ["| | bar | met in |", "|---|---|---:|"]
    for report in reports:
        for row, _ in rows_of([report], "bars", lambda row: str(row["bar"])):
            lines.append(f"| {report['benchmark']} | {row['bar']} | {row['met']} of {row['of']} |")
    return lines


def host_table(reports: Sequence[Json]) -> list[str]:
    """Microseconds of an iteration that waits for the host."""
    lines = [
        "| bf16 | | forward, no gradients: µs | forward, `autograd.grad` | forward, `backward()` |",
        "|---|---|---:|---:|---:|",
    ]
    for row, case in rows_of(reports, "host", _op_case):
        cells = [unavailable(row), "", ""]
        if "unavailable" not in row:
            times = (row.get(f"{name}_us") for name in ("forward", "grad", "step"))
            cells = ["" if time is None else f"{time['median']:.1f}" for time in times]
        lines.append(f"| {' | '.join([case, *bold([row['implementation'], *cells], row)])} |")
    return lines


def op_accuracy_table(reports: Sequence[Json]) -> list[str]:
    """Relative errors against fp64 of ours and stock, a column pair for each dtype."""
    lines = [
        "| | | bf16: ours | stock | fp16: ours | stock | fp32: ours | stock |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    errors: dict[tuple[str, str], list[float]] = {}
    for row, _ in rows_of(reports, "accuracy", lambda row: ""):
        name = f"{row['op']}, {row['shape']}, stock is {row['stock_is']}"
        errors.setdefault((name, row["tensor"]), []).extend((row["ours"], row["stock"]))
    last = None
    for (name, tensor), values in errors.items():
        cells = " | ".join(f"{value:.2e}" for value in values)
        lines.append(f"| {name if name != last else ''} | {tensor} | {cells} |")
        last = name
    return lines


def _op_case(row: Json) -> str:
    return f"{row['op']}, {row['shape']}"


def launch_table(reports: Sequence[Json]) -> list[str]:
    """Host microseconds per launch."""
    lines = ["| one launch | host µs, median | middle half |", "|---|---:|---:|"]
    for report in reports:
        for row in report["rows"]:
            time = row["host_us"]
            spread = f"{time['quartile_1']:.1f} to {time['quartile_3']:.1f}"
            lines.append(f"| {row['launch']} | {time['median']:.1f} | {spread} |")
    return lines


def linear_cross_entropy_table(reports: Sequence[Json]) -> list[str]:
    """Time and memory per case and implementation."""
    lines = [
        "| rows × H × V, bf16 | | ms | extra GiB | TFLOP/s | × pure GEMM |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row, case, name in _head_rows(reports, "case"):
        cells = [unavailable(row), "", "", ""]
        if "ms" in row:
            extra = row.get("extra_bytes")
            cells = [
                f"{row['ms']['median']:.2f}",
                "" if extra is None else f"{extra / 2**30:.3f}",
                f"{row['tflops']:.0f}",
                f"{row['times_gemm']:.2f}",
            ]
        lines.append(f"| {case} | {name} | {' | '.join(bold(cells, row))} |")
    return lines


def head_summary_table(reports: Sequence[Json]) -> list[str]:
    """The main case alone: time and memory with a trained and with a frozen head, one line each."""
    lines = [
        "| {case}, bf16 | trained: ms | extra GiB | frozen: ms | extra GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    cases = list(_head_rows(reports, "case"))
    main = next(case for _, case, _ in cases if case).split(",")[0]
    shape = dict(zip(("rows", "hidden", "vocab"), map(int, main.split("×")), strict=True))
    found: dict[str, dict[str, Json]] = {}
    for row, _, name in cases:
        if shape.items() <= row.items() and not row["ignored"] and "ms" in row:
            found.setdefault(name, {})[row["weight"]] = row
    for name, weights in found.items():
        cells = []
        for weight in ("trained", "frozen"):
            row = weights.get(weight, {})
            extra = f"{row['extra_bytes'] / 2**30:.2f}" if "extra_bytes" in row else ""
            cells += [f"{row['ms']['median']:.1f}" if row else "", extra]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [line.replace("{case}", main) for line in lines]


def head_sweep_table(reports: Sequence[Json]) -> list[str]:
    """What ours takes for how much memory, in the cases where that was varied."""
    lines = ["| rows × H × V, bf16 | extra GiB | ms | × pure GEMM |", "|---|---:|---:|---:|"]
    for row, case, _ in _head_rows(reports, "sweep"):
        cells = (row["extra_bytes"] / 2**30, row["ms"]["median"], row["times_gemm"])
        lines.append(f"| {case} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return lines


def row_kernel_table(reports: Sequence[Json]) -> list[str]:
    """The kernels between the products: their bandwidth beside a copy's."""
    lines = ["| rows × V, bf16 | kernel | ms | TB/s | of copy |", "|---|---|---:|---:|---:|"]
    for row, shape in rows_of(reports, "row kernel", lambda row: f"{row['rows']}×{row['vocab']}"):
        numbers = f"{row['ms']['median']:.3f} | {row['tb_s']:.2f} | {row['share_of_copy']:.0%}"
        lines.append(f"| {shape} | {row['implementation']} | {numbers} |")
    return lines


def head_accuracy_table(reports: Sequence[Json]) -> list[str]:
    """Relative errors against fp64 per case and implementation."""
    lines = [
        "| rows × H × V, bf16 | | loss | gradient of hidden | gradient of weight |",
        "|---|---|---:|---:|---:|",
    ]
    for row, case, name in _head_rows(reports, "accuracy"):
        cells = [unavailable(row), "", ""]
        if "loss_error" in row:
            errors = (row[f"{part}_error"] for part in ("loss", "hidden_grad", "weight_grad"))
            cells = [f"{error:.2e}" for error in errors]
        lines.append(f"| {case} | {name} | {' | '.join(bold(cells, row))} |")
    return lines


def _head_rows(reports: Sequence[Json], part: str) -> Iterator[tuple[Json, str, str]]:
    """Rows of one part with their first two cells."""

    def case_of(row: Json) -> str:
        case = f"{row['rows']}×{row['hidden']}×{row['vocab']}, {row['weight']}"
        return case + (f", {row['ignored']:.0%} of labels −100" if row["ignored"] else "")

    for row, case in rows_of(reports, part, case_of):
        (name,) = bold([row["implementation"]], row)
        yield row, case, name


def loss_curves_table(reports: Sequence[Json]) -> list[str]:
    """One line per setting and curve: BarqTrainer against the stock Trainer's seeds."""
    lines = [
        "| | | difference of means, rms | spread of stock's seeds, rms | ratio | same seed, mean \\|Δ\\| "
        "| mean Δ | steps within stock's range |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row, setting in rows_of(reports, "summary", lambda row: str(row["setting"])):
        share = row["share_within"]
        cells = [
            setting,
            row["curve"].replace("_", " "),
            f"{row['rms_difference_of_means']:.1e}",
            f"{row['rms_seed_std_of_stock']:.1e}",
            f"{row['ratio']:.3f}",
            f"{row['same_seed_difference']:.1e}",
            f"{row['mean_difference']:+.1e}",
            "" if share is None else f"{share:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


_DATA_PARTS = {
    "plan": "plan",
    "move": "ready tokens to rows",
    "lost": "tokens lost",
    "text to rows": "text to rows",
    "first batch": "text to the first batch",
    "batch": "a batch of rows",
    "resume": "resume a stream",
    "start": "a fresh process to its first step",
}


def data_table(reports: Sequence[Json]) -> list[str]:
    """Time, fill and losses of the data pipeline, each part with its cases."""
    lines = ["| | | | fill of the rows |", "|---|---|---:|---:|"]
    for part, title in _DATA_PARTS.items():

        def case_of(row: Json, title: str = title) -> str:
            return f"{title}: {row['case']}"

        for row, case in rows_of(reports, part, case_of):
            ours = row["implementation"].startswith("ours")
            cells = [row["implementation"], _amount(row)]
            cells.append(f"{row['fill']:.2%}" if "fill" in row else "")
            cells = [f"**{cell}**" if ours and cell else cell for cell in cells]
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _amount(row: Json) -> str:
    if "share_lost" in row:
        return f"{row['share_lost']:.1%}"
    seconds = row["s"] if "s" in row else row["ms"] / 1e3
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


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
    "bandwidth": bandwidth_table,
    "verdict": verdict_table,
    "bars": bars_table,
    "host": host_table,
    "op_accuracy": op_accuracy_table,
    "attention": attention_table,
    "packed_attention": packed_attention_table,
    "attention_memory": attention_memory_table,
    "attention_accuracy": attention_accuracy_table,
    "launch": launch_table,
    "linear_cross_entropy": linear_cross_entropy_table,
    "head_accuracy": head_accuracy_table,
    "head_summary": head_summary_table,
    "head_sweep": head_sweep_table,
    "row_kernel": row_kernel_table,
    "loss_curves": loss_curves_table,
    "lora": lora_table,
    "lora_accuracy": lora_accuracy_table,
    "sft": sft_table,
    "steps": steps_table,
    "data": data_table,
    "bandwidth_roofline": bandwidth_roofline_table,
    "attention_roofline": attention_roofline_table,
    "head_roofline": head_roofline_table,
    "lora_roofline": lora_roofline_table,
    "source": source_table,
}


def render(text: str, root: Path) -> str:
    """``text`` with every marked table made anew from the files it names, relative to ``root``.

    A file that is not there yet is named below the table, which is made of the others.
    """

    def table(match: re.Match[str]) -> str:
        opening, name, names, closing = match.groups()
        files = [root / file for file in names.split()]
        there = [file for file in files if file.exists()]
        records = [json.loads(file.read_text(encoding="utf-8")) for file in there]
        lines = TABLES[name](records) if records else []
        missing = ", ".join(f"`{file.name}`" for file in files if file not in there)
        if missing:
            lines += [*([""] if lines else []), f"Not measured yet: {missing}."]
        return opening + "\n".join(lines) + "\n" + closing

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
