"""Documents in local files, read one after the other."""

from __future__ import annotations

import copy
import glob
import hashlib
import logging
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args

from barqtrain_hf.data.formats import Place, Rows, read_json_lines, read_parquet, read_text, reading
from barqtrain_hf.data.packing import num_threads
from barqtrain_hf.data.progress import progress
from barqtrain_hf.data.rows import FileRow
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError

logger = logging.getLogger(__name__)

Format = Literal["jsonl", "text", "parquet"]
SampleBy = Literal["line", "paragraph", "document"]

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}
_CHUNK = 16 << 20
_SAMPLES, _SAMPLE = 16, 4096

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class DataFiles:
    """Rows of JSON Lines, text and Parquet files, for `tokenize`, `PackedStream` and `PackedDataset`.

    They are read in the order given, in bounded memory, and go on at any row without reading those before
    it (in Parquet, none of the row groups before it). By suffix:

    - ``.jsonl``, ``.ndjson``, ``.json``: JSON Lines, an object per line. Blank lines are left out.
    - ``.parquet``: needs pyarrow. Only the columns that are needed are read.
    - ``.txt``, ``.text``, ``.md``: UTF-8 text. What a document is, ``sample_by`` says, as it does in
      ``datasets.load_dataset("text")``; blank ones are left out.

    Args:
        paths: a file, a glob such as ``"data/**/*.jsonl"``, whose files come in the order of their names,
            or a sequence of both.
        format: ``"jsonl"``, ``"text"`` or ``"parquet"`` for files of any suffix.
        sample_by: a text is each ``"line"``, without its end; each ``"paragraph"``, up to a blank line; or
            the whole file, ``"document"``, which is then in memory at once.

    Attributes:
        paths: all files, in the order they are read.
        layout: equal for as many files with the same sizes, formats and division into documents.

    Raises:
        ArgumentError: there is no such file, a suffix is unknown, or an argument has an impossible value.
        ArgumentTypeError: ``paths`` is neither a path nor a sequence of them.
    """

    def __init__(
        self, paths: Paths, *, format: Format | None = None, sample_by: SampleBy = "line"
    ) -> None:
        if format is not None and format not in get_args(Format):
            raise ArgumentError(
                f"format is {format!r}: choose one of {', '.join(get_args(Format))}."
            )
        if sample_by not in get_args(SampleBy):
            raise ArgumentError(
                f"sample_by is {sample_by!r}: choose one of {', '.join(get_args(SampleBy))}."
            )
        self.paths = tuple(_expand(paths))
        self._formats = [format or _format_of(path) for path in self.paths]
        self._sample_by = sample_by
        self._columns: Sequence[str] | None = None
        self.layout = self._layout()
        self._identities: list[tuple[int, ...]] = []
        self._state = _State(0, Place(), "")
        self._resumed: _State | None = None
        twice = [path for path, times in Counter(self.paths).items() if times > 1]
        if twice:
            logger.warning(
                "paths has %s more than once: its documents are read as often.", twice[0]
            )

    def __repr__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"<DataFiles {self.paths[0]!r}{more}>"

    def only(self, columns: Sequence[str]) -> DataFiles:
        """The same rows with no more than these columns where that saves reading."""
        files = copy.copy(self)
        files._columns = tuple(columns)
        return files

    def __iter__(self) -> Iterator[FileRow]:
        """All rows, after `load_state_dict` those that are left.

        Raises:
            DataError: a file is malformed, or another than when the state was taken.
            StorageError: a file cannot be read.
        """
        begin, self._resumed = self._resumed or _State(0, Place(), ""), None
        self._state = begin
        for number in range(begin.file, len(self.paths)):
            path, sample = self.paths[number], _sample(self.paths[number])
            resumed = number == begin.file
            if resumed and begin.sample not in ("", sample):
                raise DataError(
                    f"{path} is not the file that it was when the state was taken: resume with the files as "
                    "they were."
                )
            for row, after in self._rows(number, begin.place if resumed else Place()):
                self._state = _State(number, after, sample)
                yield row
            self._state = _State(number + 1, Place(), "")

    def _rows(self, number: int, place: Place) -> Rows:
        path = self.paths[number]
        if self._formats[number] == "jsonl":
            return read_json_lines(path, place)
        if self._formats[number] == "text":
            return read_text(path, place, self._sample_by)
        return read_parquet(path, place, self._columns)

    def state_dict(self) -> dict[str, Any]:
        """Where the row after the last one is.

        It knows the sizes of all files and a sample of the one that is being read, so that most changes of
        them are noticed when it is loaded, without reading them.
        """
        file, place, sample = self._state
        return {"file": file, **place._asdict(), "layout": self.layout, "sample": sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration begins where `state_dict` was called.

        Raises:
            DataError: there are other files, or some have another size, than when it was.
        """
        lacking = {"file", *Place._fields, "layout", "sample"} - state.keys()
        if lacking:
            raise DataError(
                f"The state of {self!r} lacks {', '.join(sorted(lacking))}: it is of another data set; "
                "resume with that."
            )
        if state["layout"] != self.layout:
            raise DataError(
                f"{self!r} has other files than when the state was taken, or they have other sizes, or "
                "sample_by is another: resume with what the stream was made of."
            )
        place = Place(state["at"], state["row"])
        self._resumed = _State(state["file"], place, state["sample"])

    def _layout(self) -> str:
        digest = hashlib.sha256(self._sample_by.encode())
        for path, format in zip(self.paths, self._formats, strict=True):
            digest.update(f"{format} {_stat(path).st_size}\n".encode())
        return digest.hexdigest()[:32]

    def content(self) -> str:
        """Digest of every byte of the files, and of how rows are made of them.

        Names and times are no part of it: copies have the same, and a file that was written over has
        another even if it kept its size and its time, which cp -p, rsync and tar set.
        """
        self._identities = list(map(_identity, self.paths))
        digest = hashlib.sha256(self._sample_by.encode())
        chunks: list[_Chunk] = []
        for path, format in zip(self.paths, self._formats, strict=True):
            size = _stat(path).st_size
            digest.update(f"{format} {size}\n".encode())
            chunks += [_Chunk(path, at, min(_CHUNK, size - at)) for at in range(0, size, _CHUNK)]
        total = sum(chunk.size for chunk in chunks)
        bytes_ = progress("Hashing files", "B", total, unit_scale=True)
        with bytes_ as bar, ThreadPoolExecutor(num_threads()) as pool:
            for chunk, part in zip(chunks, pool.map(_digest, chunks), strict=True):
                digest.update(part)
                bar.update(chunk.size)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Compares the files with what they were when `content` was called last.

        Raises:
            DataError: one was written to or replaced.
        """
        for path, identity in zip(self.paths, self._identities, strict=True):
            if _identity(path) != identity:
                raise DataError(
                    f"{path} was changed while it was read: wait until it is written, and begin again."
                )


class _State(NamedTuple):
    file: int
    place: Place
    sample: str


def _expand(paths: Any) -> Iterator[str]:
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Sequence):
        raise ArgumentTypeError(
            f"paths is {reprlib.repr(paths)} ({type(paths).__name__}): pass a path, a glob, or a list of "
            "them."
        )
    if not given:
        raise ArgumentError("paths is empty: pass at least one file.")
    for path in given:
        if not isinstance(path, (str, os.PathLike)):
            raise ArgumentTypeError(
                f"paths has {reprlib.repr(path)} ({type(path).__name__}): pass paths as strings."
            )
        name = os.fsdecode(path)
        if glob.has_magic(name) and not os.path.exists(name):
            found = [
                file for file in sorted(glob.glob(name, recursive=True)) if os.path.isfile(file)
            ]
            if not found:
                raise ArgumentError(f"paths has {name!r}, which no file matches: correct it.")
            yield from found
        elif os.path.isdir(name):
            raise ArgumentError(
                f"paths has {name!r}, which is a folder: pass a glob, such as "
                f"{os.path.join(name, '**', '*.jsonl')!r}."
            )
        elif not os.path.exists(name):
            raise ArgumentError(
                f"paths has {reprlib.repr(name)}, and there is no such file: correct it. To train on one "
                "text, pass it in a list."
            )
        elif not os.path.isfile(name):
            raise ArgumentError(
                f"paths has {name!r}, which can be read only once, and from its beginning: write it to a "
                "file."
            )
        else:
            yield name


def _format_of(path: str) -> Format:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _SUFFIXES:
        raise ArgumentError(
            f"{path} has the suffix {suffix!r}, and known are {', '.join(_SUFFIXES)}: pass DataFiles(paths, "
            "format=...), and unpack what is compressed."
        )
    return _SUFFIXES[suffix]


def is_data_file(path: str) -> bool:
    """Whether this is the name of a file that is there and that `DataFiles` would read."""
    return os.path.splitext(path)[1].lower() in _SUFFIXES and os.path.isfile(path)


def _stat(path: str) -> os.stat_result:
    with reading(path):
        return os.stat(path)


def _identity(path: str) -> tuple[int, ...]:
    stat = _stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sample(path: str) -> str:
    """Digest of the size and of sixteen evenly spaced parts."""
    size = _stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with reading(path), open(path, "rb") as file:
        for part in range(_SAMPLES):
            file.seek(max(size - _SAMPLE, 0) * part // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:32]


class _Chunk(NamedTuple):
    path: str
    at: int
    size: int


def _digest(chunk: _Chunk) -> bytes:
    with reading(chunk.path), open(chunk.path, "rb") as file:
        file.seek(chunk.at)
        return hashlib.sha256(file.read(chunk.size)).digest()
