"""JSON Lines, text and Parquet: rows of one file from any place in it, in bounded memory.

Each function gives rows, each with the place after it, from which another call goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from barqtrain_hf.data.rows import FileRow
from barqtrain_hf.errors import DataError, StorageError, UnsupportedError


class Place(NamedTuple):
    """Where the next row begins.

    Attributes:
        at: the byte; in Parquet the row group.
        row: lines before it; in Parquet the rows of that group before it.
    """

    at: int = 0
    row: int = 0


Rows = Iterator[tuple[FileRow, Place]]

_BOM = b"\xef\xbb\xbf"
# Large rows are not to add up, and the cost of a batch is small.
_ROWS_PER_BATCH = 128
_BUFFER = 1 << 20


def read_json_lines(path: str, place: Place) -> Rows:
    """An object per line; blank lines are left out.

    Raises:
        DataError: a line is not UTF-8, not JSON, or not an object.
        StorageError: the file cannot be read.
    """
    with reading(path), open(path, "rb") as file:
        for line, begin, after in _lines(file, place, by_newline=True):
            if not line.isspace():
                row = _parse(_decode(line, path, begin), path, begin)
                yield FileRow(row, path, "line", after.row), after


def read_text(path: str, place: Place, sample_by: str) -> Rows:
    """Texts as ``datasets.load_dataset("text", sample_by=...)`` gives them, without blank ones.

    Args:
        path: the file.
        place: where to begin.
        sample_by: ``"line"``; ``"paragraph"``, which ends at a blank line; or ``"document"``, the whole
            file.

    Raises:
        DataError: the file is not UTF-8.
        StorageError: it cannot be read.
    """
    with reading(path), open(path, "rb") as file:
        if sample_by == "line":
            texts = _each_line(file, path, place)
        elif sample_by == "paragraph":
            texts = _paragraphs(file, path, place)
        else:
            texts = _whole(file, path, place)
        for text, number, after in texts:
            if text and not text.isspace():
                yield FileRow({"text": text}, path, "line", number), after


def read_parquet(path: str, place: Place, columns: Sequence[str] | None) -> Rows:
    """Rows with those of their columns that are named; with None, all.

    Raises:
        DataError: it is no Parquet file, is damaged, or has none of the columns.
        StorageError: it cannot be read.
        UnsupportedError: there is no pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UnsupportedError(
            f"{path} is a Parquet file, and pyarrow is not installed.",
            "pip install 'barqtrain_hf[parquet]'.",
        ) from None
    with reading(path), open(path, "rb") as opened:
        try:
            # Without a buffer size whole column chunks are read at once.
            file = parquet.ParquetFile(opened, buffer_size=_BUFFER, pre_buffer=False)
            names = file.schema_arrow.names
            wanted = [name for name in names if columns is None or name in columns]
            if not wanted:
                raise DataError(
                    f"{path} has the columns {', '.join(names)} and none of {', '.join(columns or ())}: pass "
                    "other files, or text_column for a text of another name."
                )
            sizes = [
                file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)
            ]
            for group in range(place.at, len(sizes)):
                skipped = place.row if group == place.at else 0
                before, at = sum(sizes[:group]), 0
                for batch in file.iter_batches(_ROWS_PER_BATCH, [group], wanted, use_threads=False):
                    rest = batch.slice(min(max(skipped - at, 0), batch.num_rows))
                    at += batch.num_rows - rest.num_rows
                    columns_of_rows = [
                        _values(column, path, before + at) for column in rest.columns
                    ]
                    for row in zip(*columns_of_rows, strict=True):
                        at += 1
                        after = Place(group, at) if at < sizes[group] else Place(group + 1)
                        pairs = zip(wanted, row, strict=True)
                        yield FileRow(pairs, path, "row", before + at, names), after
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk, not of what is on it
            raise DataError(
                f"{path} cannot be read as Parquet: {error}. Write it again, or pass its format."
            ) from None


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Names the file in errors of the disk.

    Raises:
        StorageError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"reading {path} failed: {error.strerror or error}. Pass files that you may read."
        ) from None


def _lines(
    file: BinaryIO, place: Place, by_newline: bool = False
) -> Iterator[tuple[bytes, Place, Place]]:
    """Lines with their ends, where each begins, and the place after it.

    Lines end as Python reads text, at ``\\n``, ``\\r\\n`` and a lone ``\\r``; not there with ``by_newline``.
    """
    at, row = place
    file.seek(at)
    for ended in file:
        # Of bytes, splitlines knows those three and no other ends.
        split = not by_newline and b"\r" in ended
        for line in ended.splitlines(keepends=True) if split else (ended,):
            begin = Place(at, row)
            at, row = at + len(line), row + 1
            yield line, begin, Place(at, row)


def _decode(data: bytes, path: str, begin: Place) -> str:
    """The text of what begins there, without a byte order mark."""
    offset = len(_BOM) if begin.at == 0 and data.startswith(_BOM) else 0
    try:
        return data[offset:].decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        line = begin.row + len((data[:at] + b"x").splitlines())
        raise DataError(
            f"{path} is not UTF-8: {error.reason} at byte {begin.at + at} (line {line}). Convert it, as "
            "iconv does, or read it by datasets.load_dataset with its encoding."
        ) from None


def _each_line(file: BinaryIO, path: str, place: Place) -> Iterator[tuple[str, int, Place]]:
    for line, begin, after in _lines(file, place):
        yield _decode(line, path, begin).rstrip("\r\n"), after.row, after


def _paragraphs(file: BinaryIO, path: str, place: Place) -> Iterator[tuple[str, int, Place]]:
    """What ``split("\\n\\n")`` gives: of three line ends the last begins the next paragraph."""
    lines: list[str] = []
    first, after = place.row + 1, place
    for line, begin, after in _lines(file, place):
        text = _decode(line, path, begin)
        if text.endswith(("\n", "\r")):
            text = text.rstrip("\r\n") + "\n"
        if text == "\n" and lines and lines[-1].endswith("\n"):
            yield "".join(lines)[:-1], first, after
            lines, first = [], after.row + 1
        else:
            lines.append(text)
    yield "".join(lines), first, after


def _whole(file: BinaryIO, path: str, place: Place) -> Iterator[tuple[str, int, Place]]:
    file.seek(place.at)
    data = file.read()
    text = _decode(data, path, place)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield text, 1, Place(place.at + len(data), 0)


def _parse(text: str, path: str, begin: Place) -> dict[str, Any]:
    name = f"{path}, line {begin.row + 1}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at character {error.pos + 1} of it"
        raise DataError(
            f"{name} (byte {begin.at}) is not JSON: {reason}. Each line has to be one object: correct that "
            "line, or remove it."
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{name} is a {type(value).__name__}: each line has to be one object. Of a JSON array, pass what "
            "json.load returns."
        )
    return value


def _values(column: Any, path: str, before: int) -> Iterable[Any]:
    """The values of a column; lists of integers as arrays, since tokens are not to become objects."""
    if hasattr(column, "value_lengths") and not column.null_count:
        items = column.flatten()
        values = None if items.null_count else items.to_numpy(zero_copy_only=False)
        if values is not None and values.dtype.kind in "iu":
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            return np.split(values, np.cumsum(lengths[:-1]))
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {number} has a string that is not UTF-8: {error.reason} at byte "
                    f"{error.start} of it. Write the file again."
                ) from None
        raise
