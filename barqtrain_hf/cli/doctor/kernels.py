"""Compiling every shipped kernel for one architecture, which needs NVRTC but no GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from barqtrain_hf.errors import BarqError
from barqtrain_hf.runtime import architecture
from barqtrain_hf.runtime.compiler import compile_program, instantiations, shipped_sources


def default_architecture() -> str:
    """This GPU's, or that of an A100."""
    return architecture(torch.cuda.current_device()) if torch.cuda.is_available() else "80"


def compile_all(arch: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each source; one that does not compile has an ``error``."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda source: _compile(source, arch), shipped_sources())


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Sources that do not compile, or whose kernels do not fit into registers."""
    found = []
    for row in rows:
        if row["error"]:
            found.append(
                f"cuda/{row['source']} does not compile for sm_{row['arch']}: {row['error']}"
            )
        elif row["spilling"]:
            names = ", ".join(row["spilling"])
            found.append(f"cuda/{row['source']} spills registers for sm_{row['arch']}: {names}")
    return found


def _compile(source: str, arch: str) -> dict[str, Any]:
    names = instantiations(source)
    row: dict[str, Any] = {"source": source, "arch": arch, "kernels": len(names), "error": None}
    start = time.perf_counter()
    try:
        used = compile_program(source, names, arch).resources
    except BarqError as error:
        return {**row, "error": str(error), "spilling": []}
    return {
        **row,
        "seconds": time.perf_counter() - start,
        "most_registers": max(each.registers for each in used.values()),
        "spilling": [name for name, each in used.items() if each.spill_bytes],
    }
