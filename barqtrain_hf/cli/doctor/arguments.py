"""The options of ``barqtrain doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.runtime.device import SHIPPED_ARCHITECTURES

HERE = "here"


@dataclass
class DoctorArguments:
    """What the user chose; every field is an option of the same name."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Say which ops would be put into this model: a folder or a config.json, or a name on "
            "the hub. Only the config is read; weights are neither loaded nor downloaded."
        },
    )
    quick: bool = field(default=False, metadata={"help": "Skip the timing beside stock PyTorch."})
    compile: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": HERE,
            "metavar": "SM",
            "help": "Compile every kernel, which takes a minute and needs no GPU, for one of "
            f"{', '.join(SHIPPED_ARCHITECTURES)}; alone, for this GPU or, without one, for 80.",
        },
    )
    json: str | None = field(
        default=None, metadata={"metavar": "FILE", "help": "Write everything found to this file."}
    )

    def __post_init__(self) -> None:
        if self.compile not in (None, HERE, *SHIPPED_ARCHITECTURES):
            raise ArgumentError(
                f"--compile {self.compile}: pass one of {', '.join(SHIPPED_ARCHITECTURES)}, or nothing."
            )
        if self.json is not None:
            path = Path(self.json)
            if path.is_dir():
                raise ArgumentError(f"--json {self.json}: it is a folder; name a file in it.")
            if not path.absolute().parent.is_dir():
                raise ArgumentError(f"--json {self.json}: there is no folder {path.parent}.")


def parse(argv: Sequence[str]) -> DoctorArguments:
    """Reads the command line; ``--help`` and mistakes end in SystemExit, as in argparse."""
    parser = HfArgumentParser(
        DoctorArguments,
        prog="barqtrain doctor",
        description="Prints the device and the versions, which kernels compile and run here, the error of "
        "each against fp64 and its speed beside stock PyTorch, and, for a model, which ops would be "
        "installed and why the others not. Exit code: 0 if all is well, 1 if something that should run "
        "here does not, 2 for a mistake in the arguments.",
    )
    arguments, unknown = parser.parse_args_into_dataclasses(
        args=list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments
