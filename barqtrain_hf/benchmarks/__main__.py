"""`python -m barqtrain_hf.benchmarks NAME [--output FILE]`, or `barqtrain bench NAME [--output FILE]`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from barqtrain_hf.errors import ArgumentError, BarqError

ON_GPU = {
    "attention": "flash attention beside FA2, cuDNN and flex_attention",
    "glu": "gated activations beside PyTorch, torch.compile and Liger",
    "launch": "host time of one kernel launch",
    "linear_cross_entropy": "the loss in the LM head beside Liger, CCE and TRL's",
    "lora": "LoRA's layers beside PEFT's",
    "loss_curves": "losses of whole runs beside Trainer's, over seeds",
    "norms": "RMSNorm and LayerNorm beside PyTorch, torch.compile, Liger and QuACK",
    "rope": "rotary embedding beside PyTorch, torch.compile and Liger",
    "sft": "barqtrain sft beside trl sft and its ways of packing",
    "steps": "whole training steps beside Trainer, torch.compile and Liger",
}
ON_CPU = {"data": "text to packed batches beside TRL's pipeline"}


def main(argv: Sequence[str] | None = None, prog: str = "python -m barqtrain_hf.benchmarks") -> int:
    """Runs one benchmark; returns the exit code: 0, or 2 if it cannot be run here or as asked."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} NAME [--output FILE]",
        description="Measures on this machine, prints a table, and writes the JSON that the docs are "
        "made of.\nWhat is measured, and how, is in docs/benchmarks.md.",
        epilog=f"on a GPU:\n{_listed(ON_GPU)}\n\non any machine:\n{_listed(ON_CPU)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sorted((*ON_GPU, *ON_CPU))
    parser.add_argument("name", choices=names, metavar="NAME", help="what to measure, see below")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write the JSON to")
    arguments = parser.parse_args(argv)
    try:
        _check_output(arguments.output)
        from barqtrain_hf.runtime import cuda_unavailable_reason  # torch takes its time

        reason = cuda_unavailable_reason() if arguments.name in ON_GPU else None
        if reason is not None:
            print(f"{prog} {arguments.name} needs a GPU: {reason}", file=sys.stderr)
            return 2
        report = importlib.import_module(f"barqtrain_hf.benchmarks.{arguments.name}").run()
    except BarqError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    report.print()
    if arguments.output is not None:
        report.write(arguments.output)
    return 0


def _listed(names: dict[str, str]) -> str:
    return "\n".join(f"  {name:<22}{about}" for name, about in names.items())


def _check_output(path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise ArgumentError(f"--output {path}: it is a folder; name a file in it.")


if __name__ == "__main__":
    sys.exit(main())
