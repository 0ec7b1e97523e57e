"""`python -m barqtrain_hf.runtime`: compile every shipped kernel for every architecture, without a GPU.

Prints registers, shared memory and spills; exits with 1 if a kernel spills or does not compile.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.table import Table

from barqtrain_hf.errors import BarqError
from barqtrain_hf.runtime.compiler import (
    Program,
    compile_program,
    instantiations,
    shipped_sources,
)
from barqtrain_hf.runtime.device import SHIPPED_ARCHITECTURES


def compile_all(
    sources: Sequence[str], architectures: Sequence[str]
) -> Iterator[tuple[str, str, Program]]:
    """Yields (source, architecture, program) for every combination, compiled in parallel."""
    jobs = [(source, arch) for source in sources for arch in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = pool.map(lambda job: compile_program(job[0], instantiations(*job), job[1]), jobs)
        for (source, arch), program in zip(jobs, programs, strict=True):
            yield source, arch, program


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m barqtrain_hf.runtime", description=__doc__)
    parser.add_argument(
        "--arch",
        nargs="+",
        default=SHIPPED_ARCHITECTURES,
        metavar="SM",
        help=f"architectures to compile for (default: {' '.join(SHIPPED_ARCHITECTURES)})",
    )
    parser.add_argument(
        "--source",
        nargs="+",
        default=shipped_sources(),
        choices=shipped_sources(),
        metavar="FILE",
        help="files of cuda/ to compile (default: all)",
    )
    arguments = parser.parse_args(argv)
    table = Table("kernel", "arch", "registers", "shared bytes", "spill bytes")
    spilling = 0
    try:
        for _, arch, program in compile_all(arguments.source, arguments.arch):
            for name, used in program.resources.items():
                spilling += used.spill_bytes > 0
                counts = map(str, (used.registers, used.shared_bytes, used.spill_bytes))
                table.add_row(name, f"sm_{arch}", *counts)
    except BarqError as error:
        print(error, file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{table.row_count} kernels compiled, {spilling} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
