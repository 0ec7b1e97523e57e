"""``barqtrain bench``: the benchmarks behind the numbers of the docs, on this machine."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark; returns the exit code."""
    from barqtrain_hf.benchmarks.__main__ import main as run

    return run(argv, prog="barqtrain bench")
