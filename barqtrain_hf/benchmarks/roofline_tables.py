"""Tables of what an op cannot do without, and how near ours comes to it: the numbers of docs/ops.md."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from barqtrain_hf.benchmarks.table_rows import Json, rows_of

_OURS = "ours"
_LINEAR = re.compile(r"(\d+) × (\d+) → (\d+), r=(\d+)")


def bandwidth_roofline_table(reports: Sequence[Json]) -> list[str]:
    """Bytes of the floor, the time a device copy takes for as many, and the time of ours."""
    lines = [
        "| bf16 | forward: MB | at copy speed, µs | ours, µs | share | backward: MB "
        "| at copy speed, µs | ours, µs | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, _ in rows_of(reports, "bandwidth", lambda row: ""):
        if row["implementation"] != _OURS:
            continue
        cells = [f"{row['op']}, {row['shape']}"]
        for direction in ("forward", "backward"):
            time, share = row[f"{direction}_ms"]["median"], row[f"{direction}_share_of_copy"]
            # TB/s times ms are GB.
            cells += [f"{1e3 * row[f'{direction}_tb_s'] * time:.0f}", f"{1e3 * time * share:.1f}"]
            cells += [f"{1e3 * time:.1f}", f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def attention_roofline_table(reports: Sequence[Json]) -> list[str]:
    """TFLOP of useful work, and ours as a share of a large matrix product's rate.

    The first report is attention's; the rate is of the first of the others that measured it.
    """
    rate = _product_rate(reports[1:])
    lines = [
        "| bf16 | TFLOP forward | ours, ms | TFLOP/s | share | TFLOP both passes | ours, ms | TFLOP/s "
        "| share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    parts = (rows_of(reports[:1], part, lambda row: "") for part in ("dense", "short", "packed"))
    for row, _ in itertools.chain.from_iterable(parts):
        if row["implementation"] != _OURS:
            continue
        forward = row["forward_ms"]["median"]
        work = row["forward_tflops"] * forward
        if "forward_backward_ms" in row:
            both = row["forward_backward_ms"]["median"]
            all_work = row["forward_backward_tflops"] * both
        else:
            backward = row["backward_ms"]["median"]
            both, all_work = forward + backward, work + row["backward_tflops"] * backward
        cells = [row["shape"], *_rated(work, forward, rate), *_rated(all_work, both, rate)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def head_roofline_table(reports: Sequence[Json]) -> list[str]:
    """TFLOP of the products that cannot be avoided, those products alone, and ours."""
    lines = [
        "| rows × H × V, bf16 | TFLOP | products alone, ms | ours, ms | share |",
        "|---|---:|---:|---:|---:|",
    ]
    for row, _ in rows_of(reports, "case", lambda row: ""):
        if row["implementation"] != _OURS:
            continue
        time, ratio = row["ms"]["median"], row["times_gemm"]
        ignored = f", {row['ignored']:.0%} of labels −100" if row["ignored"] else ""
        case = f"{row['rows']}×{row['hidden']}×{row['vocab']}, {row['weight']}{ignored}"
        numbers = (row["tflops"] * time / 1e3, time / ratio, time)
        cells = [*(f"{number:.2f}" for number in numbers), f"{1 / ratio:.0%}"]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def lora_roofline_table(reports: Sequence[Json]) -> list[str]:
    """TFLOP of the frozen layer and of its adapter, the frozen layer's time and ours."""
    lines = [
        "| rows × in → out, bf16 | TFLOP frozen | TFLOP adapter | frozen alone, ms | ours, ms | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row, _ in rows_of(reports, "linear", lambda row: ""):
        shape = _LINEAR.fullmatch(row["shape"])
        if row["implementation"] != _OURS or shape is None:
            continue
        rows, wide, out, rank = map(int, shape.groups())
        time, ratio = row["ms"]["median"], row["of_frozen"]
        # y and dx; t, u and both gradients, and the two parts that are added to y and dx.
        work = (4 * rows * wide * out / 1e12, 6 * rows * rank * (wide + out) / 1e12)
        numbers = [f"{number:.3f}" for number in (*work, time / ratio, time)]
        lines.append(f"| {' | '.join([row['shape'], *numbers, f'{1 / ratio:.0%}'])} |")
    return lines


def _rated(work: float, ms: float, rate: float) -> list[str]:
    """Cells of so much work, in TFLOP/s times ms, its time and its rate beside the card's."""
    return [f"{work / 1e3:.3f}", f"{ms:.3f}", f"{work / ms:.0f}", f"{work / ms / rate:.0%}"]


def _product_rate(reports: Sequence[Json]) -> float:
    """TFLOP/s of the large product that a report has measured."""
    ceilings = (row for row, _ in rows_of(reports, "ceiling", lambda row: ""))
    return next(float(row["tflops"]) for row in ceilings if "tflops" in row)
