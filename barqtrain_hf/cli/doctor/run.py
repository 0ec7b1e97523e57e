"""A whole examination, from the options to the exit code."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from barqtrain_hf.cli.doctor import checks, environment, kernels, model, report
from barqtrain_hf.cli.doctor.arguments import HERE, DoctorArguments
from barqtrain_hf.cli.doctor.cases import cases
from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.runtime.compiler import shipped_sources
from barqtrain_hf.runtime.device import compiler_unavailable_reason

T = TypeVar("T")
_WIDTH = 100  # where there is no terminal


def run(arguments: DoctorArguments, argv: Sequence[str]) -> int:
    """Examines this machine and prints what it finds; 1 if something that should run does not."""
    # What a message quotes may hold brackets: nothing in it is markup.
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    skeleton = model.load(arguments.model) if arguments.model else None  # mistakes first
    machine = environment.describe()
    record: dict[str, Any] = {
        "command": shlex.join(["barqtrain", "doctor", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": machine,
    }
    problems = environment.problems(machine)
    console.print(report.environment(machine))

    setting = choose_setting(machine, arguments.quick)
    console.print(report.setting(setting, machine))
    pairs = [(case, dtype) for case in cases() for dtype in setting.dtypes]
    results = [
        checks.examine(case, dtype, setting) for case, dtype in _tracked(pairs, "examining ops")
    ]
    record["device"] = str(setting.device)
    record["backend"] = setting.backend
    record["ops"] = [result.to_json() for result in results]
    problems += [f"{r.op}, {r.dtype}: {r.problem}" for r in results if r.problem]
    console.print(report.ops(results, setting))

    console.print(_compile(arguments, record, problems, has_kernels=setting.backend == "cuda"))
    if skeleton is not None:
        found, problem = model.examine(skeleton, setting.device)
        record["model"] = found
        problems += [problem] if problem else []
        console.print(report.model(found, setting))
    record["problems"] = problems
    console.print(report.conclusion(problems))
    if arguments.json:
        _write(record, arguments.json)
    return 1 if problems else 0


def choose_setting(machine: dict[str, Any], quick: bool) -> checks.Setting:
    """The first GPU with the kernels or, without them, PyTorch; bf16 where it is native."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    if not machine["gpus"]:
        return checks.Setting(torch.device("cpu"), "torch", tuple(dtypes), timed=False)
    index = torch.cuda.current_device()
    if not environment.is_bf16_native(index):
        dtypes.remove(torch.bfloat16)
    runs = machine["kernels_unavailable"] is None
    return checks.Setting(
        torch.device("cuda", index), "cuda" if runs else "torch", tuple(dtypes), runs and not quick
    )


def _compile(
    arguments: DoctorArguments, record: dict[str, Any], problems: list[str], has_kernels: bool
) -> Any:
    """Compiles all kernels if asked to; what there is to print."""
    reason = compiler_unavailable_reason(torch.version.cuda)
    if arguments.compile is None:
        return report.not_compiled(reason, has_kernels)
    if reason is not None:
        problems.append(f"--compile: {reason}")
        return report.not_compiled(reason, has_kernels)
    arch = kernels.default_architecture() if arguments.compile == HERE else arguments.compile
    total = len(shipped_sources())
    rows = list(_tracked(kernels.compile_all(arch), f"compiling for sm_{arch}", total))
    record["kernels"] = rows
    problems += kernels.problems(rows)
    return report.kernels(rows, arch)


def _tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """A progress bar on a terminal's standard error, and nothing in a log."""
    console = Console(stderr=True)
    return track(
        items, what, total=total, console=console, transient=True, disable=not console.is_terminal
    )


def _write(record: dict[str, Any], path: str) -> None:
    try:
        text = json.dumps(_finite(record), indent=1, allow_nan=False, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--json {path}: it cannot be written: {error}") from None


def _finite(value: Any) -> Any:
    """With numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
