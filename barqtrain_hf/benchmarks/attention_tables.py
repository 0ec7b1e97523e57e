"""Tables of attention: dense and packed, memory, accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from barqtrain_hf.benchmarks.table_rows import Json, bold, rows_of, unavailable


def attention_table(reports: Sequence[Json]) -> list[str]:
    """Dense attention: time and TFLOP/s of both directions, and speed beside FA2."""
    lines = [
        "| causal, bf16 | | forward ms | TFLOP/s | beside FA2 | backward ms | TFLOP/s | beside FA2 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = (rows_of(reports, part, lambda row: str(row["shape"])) for part in ("dense", "short"))
    for row, case in itertools.chain.from_iterable(rows):
        cells = [unavailable(row), *[""] * 5]
        if "unavailable" not in row:
            cells = []
            for direction in ("forward", "backward"):
                share = row.get(f"{direction}_of_rival")
                cells += [_device_ms(row, direction), f"{row[f'{direction}_tflops']:.0f}"]
                cells.append("" if share is None else f"{1 / share:.2f}×")
        lines.append(f"| {' | '.join([case, *bold([row['implementation'], *cells], row)])} |")
    return lines


def packed_attention_table(reports: Sequence[Json]) -> list[str]:
    """Packed documents: time of a forward call and of both directions, beside flex_attention's."""
    lines = [
        "| packed, bf16 | | forward ms | of flex | forward + backward ms | of flex | TFLOP/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row, case in rows_of(reports, "packed", lambda row: str(row["shape"])):
        cells = [unavailable(row), *[""] * 4]
        if "unavailable" not in row:
            cells = []
            for direction in ("forward", "forward_backward"):
                share = row.get(f"{direction}_of_rival")
                cells.append(_device_ms(row, direction))
                cells.append("" if share is None else f"{share:.2f}×")
            cells.append(f"{row['forward_backward_tflops']:.0f}")
        lines.append(f"| {' | '.join([case, *bold([row['implementation'], *cells], row)])} |")
    return lines


def attention_memory_table(reports: Sequence[Json]) -> list[str]:
    """MiB that a call takes beyond result and gradients."""
    lines = [
        "| bf16 | | LSE, MiB | forward keeps beside the result | peak beside it "
        "| backward's peak beside the gradients |",
        "|---|---|---:|---:|---:|---:|",
    ]
    keys = ("lse_bytes", "forward_kept_bytes", "forward_peak_bytes", "backward_workspace_bytes")
    for row, case in rows_of(reports, "memory", lambda row: str(row["shape"])):
        cells = [unavailable(row), *[""] * 3]
        if "unavailable" not in row:
            cells = [f"{row[key] / 2**20:.2f}" for key in keys]
        lines.append(f"| {' | '.join([case, *bold([row['implementation'], *cells], row)])} |")
    return lines


def attention_accuracy_table(reports: Sequence[Json]) -> list[str]:
    """Relative errors against fp64 of ours and of FA2."""
    lines = ["| causal | | ours | FA2 | ours / FA2 |", "|---|---|---:|---:|---:|"]
    for row, case in rows_of(reports, "accuracy", lambda row: f"{row['shape']}, {row['dtype']}"):
        cells = [unavailable(row), *[""] * 3]
        if "unavailable" not in row:
            errors = (f"{row[name]:.2e}" for name in ("ours", "flash"))
            cells = [row["tensor"], *errors, f"{row['ratio']:.2f}"]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _device_ms(row: Json, direction: str) -> str:
    """A time and half the width of the middle half of its rounds."""
    time = row[f"{direction}_ms"]
    spread = (time["quartile_3"] - time["quartile_1"]) / 2 / time["median"]
    host = " (with host)" if f"{direction}_rounds_with_host" in row else ""
    return f"{time['median']:.3f} ± {spread:.1%}{host}"
