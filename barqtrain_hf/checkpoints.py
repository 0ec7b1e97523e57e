"""Checkpoints that were written to their end, and what we add to them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from barqtrain_hf.errors import DataError, StorageError, UnsupportedError

logger = logging.getLogger(__name__)

# Trainer writes it last, so a checkpoint that has it is whole.
_LAST_FILE = "trainer_state.json"
_STREAM_FILE = "packed_stream.bin"
_MAGIC = b"BARQSTR\x01"
_DIGEST_BYTES = 32


def checkpoint_folder(run_folder: str | os.PathLike[str], step: int) -> Path:
    """Where Trainer saves after ``step``."""
    return Path(run_folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def begin_checkpoint(folder: Path) -> None:
    """Makes the folder, and makes sure that an older checkpoint there does not look whole from now on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LAST_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from None


def last_whole_checkpoint(
    run_folder: str | os.PathLike[str], check: Callable[[Path], object] = lambda folder: None
) -> str:
    """The last checkpoint of a run that was not killed while it wrote it.

    Those after it are warned of. Of several processes all take the one that each of them has.

    Args:
        run_folder: the ``output_dir`` of the run.
        check: raises `DataError` if something else is wrong with a checkpoint.

    Raises:
        DataError: there is none.
    """
    refused: list[str] = []
    whole: str | None = None
    steps = _steps(Path(run_folder))
    for step in steps:
        folder = checkpoint_folder(run_folder, step)
        try:
            _check_whole(folder, step)
            check(folder)
        except DataError as error:
            refused.append(str(error))
            continue
        whole = str(folder)
        break
    whole = _of_all_ranks(whole, run_folder)
    if whole is None:
        raise DataError(
            f"No valid checkpoint found in output directory ({run_folder}): train without "
            f"resume_from_checkpoint to begin anew. {' '.join(refused)}".rstrip()
        )
    for reason in refused:
        logger.warning("%s Training is resumed from %s.", reason, whole)
    return whole


def _steps(run_folder: Path) -> list[int]:
    try:
        names = os.listdir(run_folder)
    except FileNotFoundError:
        return []
    numbers = [name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for name in names]
    return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)


def _check_whole(folder: Path, step: int) -> None:
    try:
        state = json.loads((folder / _LAST_FILE).read_bytes())
        found = state["global_step"]
    except FileNotFoundError:
        raise DataError(f"{folder} is not whole, it has no {_LAST_FILE}.") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder} is not whole, its {_LAST_FILE} ends too early.") from None
    if found != step:
        raise DataError(f"{folder} is of step {found}, as its {_LAST_FILE} says.")


def _of_all_ranks(mine: str | None, run_folder: str | os.PathLike[str]) -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine
    step = -1 if mine is None else int(mine.rpartition("-")[2])
    steps: list[int] = [step] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(steps, step)
    return None if min(steps) < 0 else str(checkpoint_folder(run_folder, min(steps)))


def write_stream_state(folder: Path, state: dict[str, Any]) -> None:
    """Puts the state of a `PackedStream` into a checkpoint; the file is there whole or not at all.

    Raises:
        UnsupportedError: the data set's own state holds something that is not loaded without running code.
        StorageError: the file cannot be written.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        # Tried now, and not when the run is to be resumed.
        torch.load(io.BytesIO(buffer.getbuffer()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"The state_dict() of the data set holds more than numbers, strings, lists, dicts and tensors: "
            f"{str(error).splitlines()[0]}",
            "Return nothing else there, or save with save_only_model=True.",
        ) from None
    content, partial = buffer.getbuffer(), folder / f"{_STREAM_FILE}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(_MAGIC + _digest(content))
            file.write(content)
        os.replace(partial, folder / _STREAM_FILE)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise _not_written(folder / _STREAM_FILE, error) from None


def read_stream_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_stream_state` wrote.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    path = Path(folder) / _STREAM_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no {_STREAM_FILE}, so it does not say where the stream was: pass a checkpoint "
            "that BarqTrainer saved while it trained on a PackedStream, or ignore_data_skip=True to begin "
            "the stream anew."
        ) from None
    except OSError as error:
        raise StorageError(
            f"reading {path} failed: {error.strerror}. Pass a checkpoint that you may read."
        ) from None
    header = len(_MAGIC) + _DIGEST_BYTES
    if data[:header] != _MAGIC + _digest(data[header:]):
        raise DataError(f"{path} is damaged: resume from an older checkpoint.")
    state: dict[str, Any] = torch.load(
        io.BytesIO(data[header:]), map_location="cpu", weights_only=True
    )
    return state


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _not_written(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"writing {path} failed: {error.strerror}: free some space, or choose an output_dir that you may "
        "write to."
    )
