"""The options of ``barqtrain demo``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser

from barqtrain_hf.errors import ArgumentError


@dataclass
class DemoArguments:
    """What the user chose; every field is an option of the same name."""

    output_dir: str = field(
        default="demo-output",
        metadata={"help": "Folder for the model, the plot, demo.json and the checkpoints."},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Train on your own text instead of the built-in tasks: a text file, a .jsonl file "
            "(one object per line with `text`, `messages`, or `prompt` and `completion`), or a folder "
            "of such files."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the data, the split, the weights and the order."}
    )
    device: Literal["auto", "cpu"] = field(
        default="auto", metadata={"help": "auto takes the first GPU if there is one."}
    )
    max_steps: int = field(
        default=-1,
        metadata={"help": "Stop each training run after this many steps, for a quick look."},
    )
    no_baseline: bool = field(
        default=False, metadata={"help": "Skip the comparison run with the stock Trainer."}
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "Continue the interrupted run in --output_dir. Its other options are read back from "
            "its demo.json."
        },
    )

    def __post_init__(self) -> None:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ArgumentError(f"--max_steps {self.max_steps}: pass a positive number of steps.")
        if self.seed < 0:
            raise ArgumentError(f"--seed {self.seed}: pass zero or a positive number.")


def parse(argv: Sequence[str]) -> DemoArguments:
    """Reads the command line; ``--help`` and mistakes end in SystemExit, as in argparse."""
    parser = HfArgumentParser(
        DemoArguments,
        prog="barqtrain demo",
        description="Trains a small Llama from scratch with BarqTrainer on packed data, then with the "
        "stock Trainer on the same data, padded, and prints one table: speed, memory, padding, "
        "held-out loss and exact match. About two minutes on two CPU cores. Ctrl-C leaves a "
        "checkpoint that --resume continues.",
    )
    arguments, unknown = parser.parse_args_into_dataclasses(
        args=list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments
