"""The options of ``barqtrain sft``: those of ``trl sft``, and ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from barqtrain_hf.errors import ArgumentError, BarqError, UnsupportedError
from barqtrain_hf.sft import BarqSFTConfig

CLASSES: tuple[Any, ...] = (ScriptArguments, BarqSFTConfig, ModelConfig, DatasetMixtureConfig)
# What TRL's own command adds to those of `accelerate launch`.
_ACCELERATE_CONFIG = "--accelerate_config"


class Options(NamedTuple):
    """What the user chose.

    Attributes:
        script: which data set, a `ScriptArguments`.
        training: a `BarqSFTConfig`.
        model: which model, LoRA and quantisation, a `ModelConfig`.
        mixture: several data sets, a `DatasetMixtureConfig`.
    """

    script: Any
    training: Any
    model: Any
    mixture: Any


class Left(NamedTuple):
    """What `parse` leaves for ``accelerate launch``: words of the ``--config`` file and of the line."""

    of_file: list[str]
    of_line: list[str]


class _Parser(TrlParser):  # type: ignore[misc]
    """TRL's parser, whose mistakes are one sentence instead of a usage of two hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message.rstrip('.')}.")


def parse(argv: Sequence[str]) -> tuple[Options, Left]:
    """Reads the command line and the file of ``--config``.

    Returns:
        The options, and what is left for ``accelerate launch``.

    Raises:
        ArgumentError: an unknown option, a value that cannot be right, or values that contradict another.
        UnsupportedError: an option needs a package that is not installed.
    """
    arguments = _with_config_apart(argv)
    parser = _Parser(CLASSES, prog="barqtrain sft")
    try:
        *parts, of_file, of_line = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except BarqError:
        raise
    except yaml.YAMLError as error:
        where = arguments[arguments.index("--config") + 1]
        raise ArgumentError(f"--config {where}: it is not YAML: {one_line(error)}") from None
    except ValueError as error:  # the checks of TrainingArguments, SFTConfig and ModelConfig
        raise ArgumentError(one_line(error) + _hint(str(error))) from None
    except TypeError as error:
        # TRL makes each entry of `datasets` with the keys that the file gives.
        if not str(error).startswith("DatasetConfig."):
            raise
        raise ArgumentError(f"datasets: {one_line(error)}") from None
    except ImportError as error:
        if not explains(error):
            raise
        raise UnsupportedError(one_line(error)) from None
    _check_known([*of_file, *of_line])
    return Options(*parts), Left(of_file, of_line)


def one_line(error: BaseException) -> str:
    """The message of an error, its lines joined."""
    return " ".join(str(error).split()) or type(error).__name__


def explains(error: ImportError) -> bool:
    """Whether it was raised to say what to install, and is not of an import that failed."""
    return error.name is None or isinstance(error, PackageNotFoundError)


def option_names() -> list[str]:
    """The names of all options, without dashes."""
    return [field.name for cls in CLASSES for field in fields(cls) if field.init]


def _with_config_apart(argv: Sequence[str]) -> list[str]:
    """``--config=FILE`` as two words, as TrlParser wants it; the file must be there."""
    arguments: list[str] = []
    for argument in argv:
        is_config = argument.startswith("--config=")
        arguments += argument.split("=", 1) if is_config else [argument]
    if "--config" in arguments:
        index = arguments.index("--config") + 1
        if index == len(arguments):
            raise ArgumentError("--config: name a YAML file.")
        if not Path(arguments[index]).is_file():
            raise ArgumentError(f"--config {arguments[index]}: there is no such file.")
    return arguments


def _hint(message: str) -> str:
    if "doesn't support bf16" in message:
        return " Pass --bf16 false or, on a GPU, --fp16."
    return ""


def _check_known(left: Sequence[str]) -> None:
    """Refuses what neither we nor ``accelerate launch`` know.

    Raises:
        ArgumentError: the first of them, with the nearest name.
    """
    if not left:
        return
    known = [*(f"--{name}" for name in option_names()), *accelerate_options()]
    spellings = {_with_underscores(name) for name in known}
    for argument in left:
        name = argument.partition("=")[0]
        spelling = _with_underscores(name)
        if name.startswith("-") and spelling not in spellings:
            near = difflib.get_close_matches(spelling, sorted(spellings), 1)
            raise ArgumentError(
                f"unknown option {name}; "
                + (f"did you mean {near[0]}?" if near else "see barqtrain sft --help_all.")
            )
    if not left[0].startswith("-"):
        raise ArgumentError(
            f"{left[0]!r} belongs to no option: the one before it takes a single value. Put words that "
            "are one value in quotes, and several values into the file of --config."
        )


def accelerate_options() -> list[str]:
    """The options of ``accelerate launch``, and TRL's beside them."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    return [_ACCELERATE_CONFIG, *(name for action in actions for name in action.option_strings)]


def _with_underscores(option: str) -> str:
    name = option.lstrip("-")
    return option[: len(option) - len(name)] + name.replace("-", "_")
