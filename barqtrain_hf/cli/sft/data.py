"""Data sets from files, folders and the hub, by ``datasets.load_dataset``."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.exceptions import DatasetsError
from trl import get_dataset

from barqtrain_hf.cli.sft.arguments import Options, one_line
from barqtrain_hf.cli.sft.checks import HUB_NAME
from barqtrain_hf.errors import DataError

T = TypeVar("T")
# Which of load_dataset's readers takes a file.
BUILDERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSED = (".bz2", ".gz", ".xz", ".zst")


def load(options: Options) -> tuple[Any, Any]:
    """The data sets to train on and, if asked for, to evaluate on; the latter is None otherwise.

    ``--dataset_name`` is a file (or a glob of such) whose name tells its format, a folder, or a name on the
    hub. Entries of ``datasets`` are the same. Of files ``--test_split_size`` holds out a share.

    Raises:
        DataError: it cannot be found or read, or lacks a split.
    """
    script, mixture = options.script, options.mixture
    if mixture.datasets:
        entries = [_local(entry) for entry in mixture.datasets]
        parts = _read("datasets", lambda: get_dataset(replace(mixture, datasets=entries)))
    else:
        parts = _by_name(script)
        size = mixture.test_split_size
        if size is not None and set(parts) == {script.dataset_train_split}:
            whole = parts[script.dataset_train_split]
            seed = options.training.seed
            parts = _read("--test_split_size", lambda: whole.train_test_split(size, seed=seed))
            parts = {script.dataset_train_split: parts["train"]} | {
                script.dataset_test_split: parts["test"]
            }
    train = _split(parts, "train", script.dataset_train_split)
    if options.training.eval_strategy == "no":
        return train, None
    return train, _split(parts, "test", script.dataset_test_split)


def builder(name: str) -> str | None:
    """Which reader takes a file of this name; None if it does not tell."""
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    return BUILDERS.get(suffix.lower())


def _by_name(script: Any) -> Any:
    name: str = script.dataset_name
    option = f"--dataset_name {name}"
    options = {"name": script.dataset_config, "streaming": script.dataset_streaming}
    reader = builder(name)
    if os.path.isfile(name) and reader is None:
        raise DataError(f"{option}: a file is one of {', '.join(f'*{s}' for s in BUILDERS)}.")
    if reader is not None and "://" not in name:
        _check_there(name, option)
    if reader is not None:
        files = os.path.expanduser(name)
        return _read(option, lambda: datasets.load_dataset(reader, data_files=files, **options))
    if not os.path.isdir(name) and not HUB_NAME.fullmatch(name) and "://" not in name:
        raise DataError(f"{option}: there is no such file or folder.")
    return _read(option, lambda: datasets.load_dataset(name, **options))


def _local(entry: Any) -> Any:
    """An entry of ``datasets`` whose path is a file, as load_dataset takes it."""
    reader = builder(entry.path)
    if reader is None or entry.data_files is not None:
        return entry
    _check_there(entry.path, f"datasets: {entry.path}")
    return replace(entry, path=reader, data_files=os.path.expanduser(entry.path))


def _check_there(name: str, option: str) -> None:
    files = glob.glob(os.path.expanduser(name), recursive=True)
    if not files:
        raise DataError(f"{option}: there is no such file.")
    if not any(map(os.path.getsize, files)):
        raise DataError(f"{option}: the file is empty.")


def _read(option: str, read: Callable[[], T]) -> T:
    """What ``read`` gives; of what can be wrong with data and their names, one sentence."""
    try:
        return read()
    except (
        FileNotFoundError,
        PermissionError,
        ConnectionError,
        ValueError,
        DatasetsError,
    ) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # "An error occurred while generating the dataset"
            cause = cause.__cause__
        raise DataError(f"{option} cannot be loaded: {one_line(cause)}") from None


def _split(parts: Any, which: str, name: str) -> Any:
    if name in parts:
        return parts[name]
    there = ", ".join(repr(str(part)) for part in parts)
    fix = f"pass --dataset_{which}_split"
    if which == "test":
        fix += ", --test_split_size to hold out a share, or --eval_strategy no"
    raise DataError(f"the data set has no split {name!r}, only {there}: {fix}.")
