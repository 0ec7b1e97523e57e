"""What the user sees: tables of at most 100 columns, in a terminal or a log."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from barqtrain_hf.cli.doctor.checks import GATE, Error, Result, Setting, worst

_NAME_WIDTH = 54
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def environment(machine: dict[str, Any]) -> RenderableType:
    """Device, versions, cache and variables."""
    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("system", f"{machine['os']}, Python {machine['python']}")
    versions = machine["versions"]
    rows.add_row("packages", ", ".join(f"{n} {v}" for n, v in versions.items() if v))
    absent = [name for name in ("peft", "trl", "triton") if not versions[name]]
    absent += [] if any(v for n, v in versions.items() if n.startswith("cupy") and v) else ["cupy"]
    if absent:
        rows.add_row("not installed", ", ".join(absent))
    built = machine["torch_cuda"]
    rows.add_row("torch built for", f"CUDA {built}" if built else "CPU")
    for index, gpu in enumerate(machine["gpus"]):
        rows.add_row(f"GPU {index}", _gpu(gpu))
    if not machine["gpus"]:
        rows.add_row("GPU", f"none; CPU with {machine['cpu_threads']} threads")
    if machine["driver"]:
        rows.add_row("driver", machine["driver"])
    rust = machine["rust_extension_error"]
    rows.add_row("Rust extension", f"cannot be used: {rust}" if rust else "works")
    rows.add_row("kernel cache", _cache(machine["cache"]))
    for name, value in machine["variables"].items():
        rows.add_row(name, value)
    return Group(_title("Environment"), rows)


def _gpu(gpu: dict[str, Any]) -> str:
    tested = "" if gpu["tested_architecture"] else " (kernels are not tested for it)"
    peak = gpu["peak_flops"]
    return ", ".join(
        [
            gpu["name"],
            f"compute capability {gpu['capability']}{tested}",
            f"{gpu['memory_bytes'] / 2**30:.1f} GiB",
            "bf16" if gpu["bf16"] else "no native bf16: train in fp16",
            f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "peak not known, so no mfu in logs",
        ]
    )


def _cache(cache: dict[str, Any]) -> str:
    if not cache["writable"]:
        return (
            f"{cache['folder']} cannot be written: every process compiles again; set "
            "BARQ_KERNEL_CACHE to a folder that can"
        )
    return f"{cache['folder']}, {cache['kernels']} kernels"


def setting(chosen: Setting, machine: dict[str, Any]) -> RenderableType:
    """What the table of ops is about."""
    reason = machine["kernels_unavailable"]
    if reason is None:
        more = len(machine["gpus"]) - 1
        others = f" CUDA_VISIBLE_DEVICES chooses another of the {more + 1}." if more else ""
        text = f"The kernels, on {machine['gpus'][chosen.device.index or 0]['name']}.{others}"
    else:
        text = f"{reason[0].upper()}{reason[1:]} That path is what is examined here."
    return Group(_title("Ops"), Text(text))


def ops(results: list[Result], chosen: Setting) -> RenderableType:
    """One row for each op and dtype."""
    kernels = chosen.backend != "torch"
    # Ten columns in 100: what does not fit, rich would leave out without a word.
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("op", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for header in (
        *(("first\ncall",) if kernels else ()),
        *("forward\nerror  ratio", "gradient\nerror  ratio"),
        *(("ms", "stock\nms", "times\nfaster") if chosen.timed else ()),
    ):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("same\nbits", no_wrap=True)
    table.add_column("", no_wrap=True)
    previous = ""
    for result in results:
        cells = [result.op if result.op != previous else "", _DTYPES[result.dtype]]
        cells += [_first_call(result)] if kernels else []
        cells += [_error(worst(result.outputs)), _error(worst(result.gradients))]
        if chosen.timed:
            cells += [_number(result.ours_ms, 3), _number(result.stock_ms, 3)]
            cells += [_number(result.speedup, 2)]
        repeats = "" if result.repeatable is None else "yes" if result.repeatable else "no"
        verdict = Text("fails", style="red") if result.problem else Text("ok", style="green")
        table.add_row(*cells, repeats, verdict)
        previous = result.op
    return Group(table, Text(_legend(results, chosen), style="dim"))


def _legend(results: list[Result], chosen: Setting) -> str:
    text = (
        "Error: relative, against fp64, of the worst output and gradient. Ratio: to the error of stock "
        f"PyTorch in the same dtype; at most {GATE} is ok. A loss is one number, whose error is luck: it "
        "is shown, not judged."
    )
    if chosen.backend != "torch":
        text += " First call: seconds, forward and backward; + how many kernels it compiled."
    if chosen.timed:
        text += " ms: forward and backward together, on large inputs."
    missing = sorted({result.not_timed for result in results if result.not_timed})
    return f"{text} Not timed: {'; '.join(missing)}." if missing else text


def _first_call(result: Result) -> str:
    if result.first_call_seconds is None:
        return ""
    built = f" +{result.kernels_built}" if result.kernels_built else ""
    return f"{result.first_call_seconds:.1f}{built}"


def _error(error: Error | None) -> str:
    if error is None:
        return ""
    ratio = f"{error.ratio:.2f}" if not error.ratio >= 100 else "> 99"
    return f"{error.ours:.1e} {ratio if error.judged else '':>5}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{0 if value >= 100 else digits}f}"


def not_compiled(reason: str | None, has_kernels: bool) -> RenderableType:
    """Said where nothing was compiled."""
    if reason is not None:
        return Text(f"\nKernels cannot be compiled here: {reason}")
    what = "every kernel" if has_kernels else "every kernel, for a GPU that is not here"
    return Text(f"\nNVRTC is installed: --compile compiles {what} (a minute or more).")


def kernels(rows: list[dict[str, Any]], arch: str) -> RenderableType:
    """One row for each source."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("source")
    for header in ("kernels", "seconds", "most registers", "that spill"):
        table.add_column(header, justify="right")
    for row in rows:
        if row["error"]:
            table.add_row(row["source"], str(row["kernels"]), "does not compile")
            continue
        counts = (row["most_registers"], len(row["spilling"]))
        table.add_row(
            row["source"], str(row["kernels"]), f"{row['seconds']:.1f}", *map(str, counts)
        )
    return Group(_title(f"Kernels, compiled for sm_{arch}"), table)


def model(found: dict[str, Any], chosen: Setting) -> RenderableType:
    """What would be installed in a model and what not."""
    facts = [f"{found['class']} ({found['model_type']})"]
    facts += [f"{found['layers']} layers"] if found["layers"] else []
    facts += [found["dtype"], f"on {'the GPU' if chosen.device.type == 'cuda' else 'the CPU'}"]
    parts: list[RenderableType] = [
        _title(f"Model {found['path']}"),
        Text(
            f"{', '.join(facts)}. Built from its config with every layer in its own size, without its "
            "weights."
        ),
        *(Text(note) for note in (*found["notes"], *found.get("patch_notes", []))),
    ]
    installed = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("installed", "modules", "where"):
        installed.add_column(header, justify="right" if header == "modules" else "left")
    for row in found["installed"]:
        installed.add_row(row["op"], str(row["modules"]), "\n".join(row["where"]))
    if found["installed"]:
        parts.append(installed)
    else:
        parts.append(Text("\nNothing would be installed."))
    if found["skipped"]:
        skipped = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        skipped.add_column("not installed")
        names = [len(name) for row in found["skipped"] for name in row["where"]]
        # Reasons break between words, names would in the middle of one.
        skipped.add_column("where", overflow="fold", min_width=min(max(names), _NAME_WIDTH))
        skipped.add_column("because")
        for row in found["skipped"]:
            skipped.add_row(row["op"], "\n".join(row["where"]), row["reason"])
        parts.append(skipped)
    return Group(*parts)


def conclusion(problems: list[str]) -> RenderableType:
    """The last word."""
    if not problems:
        return Text("\nAll is well: everything that should run here does.", style="green")
    lines = [Text(f"\n{len(problems)} {'problem' if len(problems) == 1 else 'problems'}:")]
    lines += [Text(f"  {i}. {problem}") for i, problem in enumerate(problems, 1)]
    return Group(*lines)


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")
