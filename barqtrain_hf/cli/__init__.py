"""The command line: ``barqtrain COMMAND [OPTIONS]``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from barqtrain_hf import __version__
from barqtrain_hf.errors import BarqError

# Command -> (module with `main(argv) -> int`, what it does). Modules are imported when asked for.
COMMANDS = {
    "demo": (
        "barqtrain_hf.cli.demo",
        "train a small model with BarqTrainer and with Trainer, and compare the two",
    ),
    "sft": (
        "barqtrain_hf.cli.sft",
        "fine-tune a model as `trl sft` does, with the same options",
    ),
    "doctor": (
        "barqtrain_hf.cli.doctor",
        "say what runs on this machine, how well, and what would be put into a model",
    ),
    "bench": (
        "barqtrain_hf.cli.bench",
        "measure ops, the data pipeline or training steps beside other libraries",
    ),
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after ``barqtrain``; those of this process by default.

    Returns:
        The exit code: 0, 1 if doctor finds a problem, 2 for a mistake in the arguments or the data, 130
        after Ctrl-C. What is nobody's mistake is raised: Python prints the traceback and ends with 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else ""
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"barqtrain_hf {__version__}")
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}" if name else "no command given"
        print(f"barqtrain: {problem}.\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[name][0]).main(arguments))
    except BarqError as error:
        print(f"barqtrain {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nbarqtrain {name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # argparse: --help, or a mistake it has printed already
        return stop.code if isinstance(stop.code, int) else 2


def _usage() -> str:
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: barqtrain COMMAND [OPTIONS]",
            "",
            "commands:",
            *lines,
            "",
            "`barqtrain COMMAND --help` describes the options of a command. Exit codes: 0 done; 1 a",
            "failure with its traceback, or problems that doctor found; 2 a mistake in the options or",
            "the data, in one sentence; 130 after Ctrl-C.",
        ]
    )
