"""Several processes: ``accelerate launch`` starts this command in each of them, as ``trl sft`` does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import torch

from barqtrain_hf.cli.sft.arguments import Left, one_line
from barqtrain_hf.errors import ArgumentError

# Set in the processes that were launched, which train.
_LAUNCHED = "BARQTRAIN_LAUNCHED"
_MODULE = "barqtrain_hf.cli"


def is_wanted(left: Left, use_cpu: bool) -> bool:
    """Whether to launch: options of ``accelerate launch`` were given, or several GPUs are to be used."""
    if _LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return False
    return any(left) or (not use_cpu and torch.cuda.device_count() > 1)


def launch(argv: Sequence[str], left: Left) -> int:
    """Launches and waits; returns the exit code.

    Args:
        argv: the whole command line after ``sft``.
        left: what of it, and of its ``--config``, is for ``accelerate launch``.

    Raises:
        ArgumentError: there is no such ``--accelerate_config``, or a word is no option's.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        options = resolve_accelerate_config_argument([*left.of_file, *left.of_line])
    except ValueError as error:
        raise ArgumentError(one_line(error)) from None
    ours = without(argv, left.of_line)
    arguments = launch_command_parser().parse_args([*options, "--module", _MODULE, "sft", *ours])
    if arguments.training_script != _MODULE:
        raise ArgumentError(f"{arguments.training_script!r} belongs to no option.")
    os.environ[_LAUNCHED] = "1"  # inherited
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    finally:
        del os.environ[_LAUNCHED]
    return 0


def without(argv: Sequence[str], taken: Sequence[str]) -> list[str]:
    """``argv`` without the words of ``taken``, which are in it in this order.

    Each run of them begins with the name of an option, so that equal values of others stay.
    """
    rest, todo = [], list(taken)
    for word in argv:
        if todo and word == todo[0]:
            todo.pop(0)
        else:
            rest.append(word)
    return rest
