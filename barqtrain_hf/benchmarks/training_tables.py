"""Tables of whole training steps, of the commands for fine-tuning, and of LoRA's layers."""

from __future__ import annotations

from collections.abc import Sequence

from barqtrain_hf.benchmarks.table_rows import Json, bold, rows_of, unavailable


def steps_table(reports: Sequence[Json]) -> list[str]:
    """Tokens per second, peak memory and loss of every trainer, beside stock's."""
    lines = [
        "| trained | | tokens/s | beside HF | peak memory | mean loss |",
        "|---|---|---:|---:|---:|---:|",
    ]
    stock = None
    for row, case in rows_of(reports, "steps", lambda row: str(row["case"])):
        cells = [unavailable(row), *[""] * 3]
        if case:  # the first of a case
            stock = row.get("tokens_per_second")
        if "unavailable" not in row:
            speed = row["tokens_per_second"]
            peak, loss = f"{row['peak_gib']:.1f} GiB", f"{row['loss']:.4f}"
            cells = [f"{speed:,.0f}", f"{speed / stock:.2f}×" if stock else "", peak, loss]
        lines.append(f"| {' | '.join([case, *bold([row['implementation'], *cells], row)])} |")
    return lines


def sft_table(reports: Sequence[Json]) -> list[str]:
    """Tokens per second, peak memory and loss of both commands, and how much faster ours is."""
    lines = [
        "| trained | | tokens/s | middle half | barqtrain beside it | peak memory | mean loss |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row, case in rows_of(reports, "sft", lambda row: str(row["case"])):
        cells = [unavailable(row), *[""] * 4]
        if "unavailable" not in row:
            speed, ours = row["tokens_per_second"], _our_speed(reports, row["case"])
            quartiles = [row[f"tokens_per_second_quartile_{number}"] for number in (1, 3)]
            beside = f"{ours / speed:.2f}×" if ours and not _is_ours(row) else ""
            cells = [f"{speed:,.0f}", " to ".join(f"{each:,.0f}" for each in quartiles), beside]
            cells += [f"{row['peak_gib']:.1f} GiB", f"{row['loss']:.4f}"]
        cells = [row["implementation"], *cells]
        cells = [f"**{cell}**" if cell and _is_ours(row) else cell for cell in cells]
        lines.append(f"| {' | '.join([case, *cells])} |")
    return lines


def _is_ours(row: Json) -> bool:
    return str(row["implementation"]).startswith("barqtrain")


def _our_speed(reports: Sequence[Json], case: str) -> float | None:
    rows = [row for report in reports for row in report["rows"] if row.get("case") == case]
    return next((row.get("tokens_per_second") for row in rows if _is_ours(row)), None)


def lora_table(reports: Sequence[Json]) -> list[str]:
    """Forward and backward of layers with adapters, beside the same weights without."""
    lines = ["| bf16 | | ms | of frozen | kept, GiB |", "|---|---|---:|---:|---:|"]
    for which in ("linear", "dropout", "quantized", "layer"):
        for row, case in rows_of(reports, which, lambda row: str(row["shape"])):
            cells = [unavailable(row), "", ""]
            if "unavailable" not in row:
                host = " (with host)" if row.get("rounds_with_host") else ""
                cells = [f"{row['ms']['median']:.3f}{host}"]
                cells += [f"{row['of_frozen']:.2f}×", f"{row['kept_gib']:.3f}"]
            lines.append(f"| {' | '.join([case, *bold([row['implementation'], *cells], row)])} |")
    return lines


def lora_accuracy_table(reports: Sequence[Json]) -> list[str]:
    """Relative errors against fp64 of ours and of PEFT's layer."""
    lines = ["| bf16 | | ours | PEFT | ours / PEFT |", "|---|---|---:|---:|---:|"]
    for row, case in rows_of(reports, "errors", lambda row: str(row["shape"])):
        errors = (f"{row['ours']:.2e}", f"{row['peft']:.2e}", f"{row['ours'] / row['peft']:.3f}")
        lines.append(f"| {' | '.join([case, row['tensor'], *errors])} |")
    return lines
