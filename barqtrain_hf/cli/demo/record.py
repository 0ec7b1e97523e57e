"""demo.json: everything about a run, written as it goes, so that it can be resumed."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers

import barqtrain_hf
from barqtrain_hf.cli.demo.arguments import DemoArguments
from barqtrain_hf.cli.demo.scale import Scale, device_name, uses_gpu
from barqtrain_hf.errors import ArgumentError, DataError

NAME = "demo.json"
# What says where a run is and how to go on, not what the run is.
_NOT_OF_THE_RUN = ("output_dir", "resume")


def new(arguments: DemoArguments, argv: Sequence[str], scale: Scale) -> dict[str, Any]:
    """The record of a run that begins."""
    return {
        "status": "running",
        "command": shlex.join(["barqtrain", "demo", *argv]),
        "versions": {
            "barqtrain_hf": barqtrain_hf.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "device": device_name(arguments.device),
        "seed": arguments.seed,
        "arguments": {
            name: value for name, value in asdict(arguments).items() if name not in _NOT_OF_THE_RUN
        },
        "settings": {"scale": _scale_name(arguments), **asdict(scale)},
        "runs": {},
    }


def write(record: dict[str, Any], folder: Path) -> None:
    """Writes demo.json; a reader sees the old one or the new one, never half of one."""
    temporary = folder / f".{NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=2), encoding="utf-8")
    temporary.replace(folder / NAME)


def read(folder: Path) -> dict[str, Any]:
    """Reads demo.json.

    Raises:
        DataError: it is not one.
    """
    try:
        record = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{folder / NAME} cannot be read: {error}.") from None
    if not isinstance(record, dict) or "status" not in record:
        raise DataError(f"{folder / NAME} is not the record of a demo run.")
    return record


def resumed(arguments: DemoArguments) -> tuple[DemoArguments, dict[str, Any]]:
    """The record of the run to continue, and the options it was started with.

    Raises:
        ArgumentError: there is nothing to resume, or an option differs from the run's.
    """
    folder = Path(arguments.output_dir)
    if not (folder / NAME).is_file():
        raise ArgumentError(
            f"--resume: {folder} holds no run ({NAME} is missing); pass the --output_dir of the run to "
            "continue, or leave --resume out to start one."
        )
    record = read(folder)
    if record["status"] == "done":
        raise ArgumentError(
            f"--resume: the run in {folder} is complete; leave --resume out to start over."
        )
    for option in fields(DemoArguments):
        if option.name in _NOT_OF_THE_RUN:
            continue
        given, stored = getattr(arguments, option.name), record["arguments"][option.name]
        if given not in (option.default, stored):
            raise ArgumentError(
                f"--resume: --{option.name} is {given!r} and the run in {folder} has {stored!r}; leave "
                "it out, or start over without --resume."
            )
    stored_arguments = DemoArguments(
        output_dir=arguments.output_dir, resume=True, **record["arguments"]
    )
    if _scale_name(stored_arguments) != record["settings"]["scale"]:
        raise ArgumentError(
            f"--resume: the run in {folder} was started on a {record['settings']['scale'].upper()} "
            f"({record['device']}), and this is {device_name(stored_arguments.device)}; the model "
            "would differ."
        )
    return stored_arguments, record


def resume_command(arguments: DemoArguments) -> str:
    """What to type to continue."""
    program = "python -m barqtrain_hf.cli"
    if Path(sys.argv[0]).name == "barqtrain":
        # make demo calls it in an environment that the user's shell does not know.
        program = "barqtrain" if shutil.which("barqtrain") else shlex.quote(sys.argv[0])
    return f"{program} demo --resume --output_dir {shlex.quote(arguments.output_dir)}"


def _scale_name(arguments: DemoArguments) -> str:
    return "gpu" if uses_gpu(arguments.device) else "cpu"
