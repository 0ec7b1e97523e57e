"""`python -m barqtrain_hf.benchmarks NAME [--output FILE]`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.runtime import cuda_unavailable_reason

ON_GPU = (
    *("attention", "glu", "launch", "linear_cross_entropy", "lora", "loss_curves", "norms"),
    *("rope", "sft", "steps"),
)
ON_CPU = ("data",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m barqtrain_hf.benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(ON_GPU + ON_CPU), help="what to measure")
    parser.add_argument("--output", type=Path, help="file to write the JSON to")
    arguments = parser.parse_args(argv)
    reason = cuda_unavailable_reason() if arguments.name in ON_GPU else None
    if reason is not None:
        print(f"benchmarks need a GPU: {reason}", file=sys.stderr)
        return 2
    try:
        report = importlib.import_module(f"barqtrain_hf.benchmarks.{arguments.name}").run()
    except UnsupportedError as error:
        print(error, file=sys.stderr)
        return 2
    report.print()
    if arguments.output is not None:
        report.write(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
