"""Tokenised documents in a memory-mapped file, so that a second run starts at once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from barqtrain_hf import _rust
from barqtrain_hf.data.examples import Example, Schema, encode_examples
from barqtrain_hf.data.files import DataFiles
from barqtrain_hf.data.packing import num_threads
from barqtrain_hf.data.progress import progress
from barqtrain_hf.data.source import open_dataset
from barqtrain_hf.data.tokenizer import FastTokenizer
from barqtrain_hf.errors import ArgumentTypeError, DataError, StorageError

logger = logging.getLogger(__name__)

# Goes into every key: another one where the meaning of a store's tokens changes.
_VERSION = 2
# Of text, for each thread: enough that they rarely wait for the last chunk, few enough to hold in memory, and
# that Ctrl-C, which waits for the call, comes through within a second.
_BYTES_PER_CALL = 2 << 20
_ROWS_PER_READ = 64
_SECONDS_BETWEEN_LOOKS = 0.05
_TRIES = 20
# The header, as rust/core/src/store.rs describes it.
_HEADER, _MAGIC, _KEY, _CHECKSUM = 64, b"BARQTOK", slice(8, 40), slice(56, 64)


class TokenStore:
    """Documents in a file that was built by `tokenize`; the file is mapped, not read.

    Args:
        path: the file. It is read once and its checksum compared, at the speed of the disk.
        key: 32 bytes that tell what it was made from; None takes any store.

    Attributes:
        path: the file.
        input_ids: int32, shape ``[T]``; the top bit is set where a token bears no loss.
        lengths: tokens of each document, int64, shape ``[documents]``.
        labels: None; a label is the id, or -100 where the top bit is set.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the file cannot be read.
        DataError: it is no token store, is damaged, or was made from something else. Unpickled: it is
            not the file that it was.
    """

    labels: None = None

    def __init__(self, path: str | os.PathLike[str], key: bytes | None = None) -> None:
        self.path = Path(path).absolute()
        try:
            if not any(self._open(key) for _ in range(_TRIES)):
                raise DataError(
                    f"{self.path} was another file each of {_TRIES} times that it was read: pass every "
                    "process that builds a store a path of its own, on a disk with stable inodes."
                )
        except FileNotFoundError:
            raise
        except OSError as error:
            # The message of an error from Rust is complete.
            reason = (
                error.args[0]
                if error.errno is None
                else (
                    f"reading {self.path} failed: {error.strerror}. Pass a file that you may read."
                )
            )
            raise StorageError(str(reason)) from None

    def _open(self, key: bytes | None) -> bool:
        """Checks the file and maps it; False if the name was given to another file meanwhile."""
        with open(self.path, "rb") as file:
            header = file.read(_HEADER)
            if not header.startswith(_MAGIC[: len(header)]):
                raise _NotAStoreError(
                    f"{self.path} is no token store, it begins with {header[:16]!r}: pass another path. "
                    "Delete it only if you do not need it."
                )
            self._key, self._checksum = header[_KEY], header[_CHECKSUM]
            if key is not None and len(header) == _HEADER and self._key != key:
                raise _OtherKeyError(
                    f"{self.path} was made from other data, by another tokenizer or with other "
                    "settings: delete it, or choose another path."
                )
            try:
                documents, tokens, *places = _rust.verify_store(self.path, None)
            except ValueError as error:
                raise DataError(str(error)) from None
            # That was by name. A name is given away by a rename; this file keeps its inode while open.
            if _identity(os.stat(self.path)) != _identity(os.fstat(file.fileno())):
                return False
            self.input_ids = _map(file, "<i4", places[0], tokens)
            offsets = _map(file, "<u8", places[1], documents + 1)
        self.lengths: npt.NDArray[np.int64] = np.diff(offsets).astype(np.int64)
        return True

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        size = f"{len(self):,} documents, {len(self.input_ids):,} tokens"
        return f"<TokenStore {self.path.name}: {size}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the file itself; by then the name may be another file's.
        return _unpickle, (type(self), self.path, self._key, self._checksum)


class _NotAStoreError(DataError):
    """A file of the user's, which is never to be replaced."""


class _OtherKeyError(DataError):
    """A store of something else."""


def _unpickle(cls: type[TokenStore], path: Path, key: bytes, checksum: bytes) -> TokenStore:
    store = cls(path, key)
    if store._checksum != checksum:
        raise DataError(
            f"{path} has other tokens than when this TokenStore was pickled: call tokenize again and "
            "pickle what it returns."
        )
    return store


def _map(file: BinaryIO, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
    if not count:
        return np.empty(0, dtype)  # nothing cannot be mapped
    return np.memmap(file, dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def tokenize(
    dataset: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    add_special_tokens: bool = True,
    append_eos: bool = True,
    assistant_only_loss: bool = False,
) -> TokenStore:
    """Tokenises texts into a file, or takes the file from an earlier run on the same texts.

    Every row is a document: a text or a chat, all of whose tokens bear a loss but the first, or a
    prompt with its completion, which alone bears a loss. The file appears under its name when it is
    whole. Of several processes one builds it and the others wait; after a crash the next
    run builds it again.

    Files that texts are read from are known by their content, every byte of which is read to look for an
    earlier run on it (about 1.5 GB/s on two cores), and never by their name or time.

    Args:
        dataset: a sequence of strings or of dicts; a ``datasets.Dataset``; `DataFiles`, or a path or glob
            as `DataFiles` takes it. Dicts have ``prompt`` and ``completion`` (both text or both messages),
            or else ``messages``, or else a text. Chats are rendered by the tokenizer's chat template, and
            nothing is added to them.
        tokenizer: a fast tokenizer; truncation and padding are off.
        path: the file. Its folder is made if there is none. A store of other texts, another tokenizer
            or other settings is replaced; a file that is no store never is.
        text_column: where rows are dicts, the key of the text. None is ``"text"``, if rows have nothing
            else; what has another name is taken even where rows have ``messages`` or a ``prompt``.
        add_special_tokens: as in ``tokenizer(text, add_special_tokens=...)``.
        append_eos: whether ``eos_token`` goes after every text that does not end with it, as in TRL.
        assistant_only_loss: of chats only what the assistant says bears a loss: what the chat template has
            between ``{% generation %}`` and ``{% endgeneration %}``, as in TRL.

    Raises:
        UnsupportedError: the tokenizer has no fast version.
        DataError: there is no text, some row has none, or rows are of different kinds; a file is malformed
            or was changed meanwhile; a chat has no tokens of the assistant. Or there is a file at ``path``
            that is no token store.
        ArgumentError: there are chats and no chat template, or one without ``{% generation %}`` for
            ``assistant_only_loss``; no chats for it; no ``eos_token`` to append; no file by that name.
        ArgumentTypeError: ``dataset`` has no length, or has several splits.
        StorageError: a file cannot be read, or written, such as on a full disk; nothing is left behind.
    """
    dataset = _checked(dataset)
    fast = FastTokenizer(tokenizer, add_special_tokens=add_special_tokens, append_eos=append_eos)
    reading = _Reading(fast, text_column, assistant_only_loss)
    path = Path(path).absolute()
    key = _key(dataset, reading)
    store, seen = _find(path, key, None)
    while store is None:
        writer = _claim(path, key)
        if writer is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            store, seen = _find(path, key, seen)
            continue
        try:
            store, seen = _find(path, key, seen)  # its last writer may have finished since
            if store is None:
                _write(writer, dataset, reading)
                return TokenStore(path, key)
        finally:
            writer.abandon()
    logger.info("%s has the tokens of these %s documents already.", path, f"{len(store):,}")
    return store


class _Reading(NamedTuple):
    """How rows become examples, and examples tokens."""

    tokenizer: FastTokenizer
    text_column: str | None
    assistant_only_loss: bool

    def schema(self) -> Schema:
        return Schema(self.tokenizer.tokenizer, self.text_column, self.assistant_only_loss)


def _checked(dataset: Any) -> Any:
    dataset = open_dataset(dataset)
    if isinstance(dataset, DataFiles):
        return dataset
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ArgumentTypeError(
            f"dataset is a {type(dataset).__name__}, which has no length: pass a list or a map-style data "
            "set."
        )
    if not len(dataset):
        raise DataError("dataset is empty: pass at least one text.")
    return dataset


def _find(
    path: Path, key: bytes, seen: tuple[int, ...] | None
) -> tuple[TokenStore | None, tuple[int, ...] | None]:
    """The store, if it is there, and which file was looked at; one that was ``seen`` is not read again."""
    try:
        found = _identity(os.stat(path))
        if found == seen:
            return None, seen
        return TokenStore(path, key), found
    except (FileNotFoundError, NotADirectoryError):
        return None, None  # if the folder cannot be made, that is said then
    except OSError as error:
        raise StorageError(
            f"reading {path} failed: {error.strerror}. Choose a folder that you may read and write."
        ) from None
    except _NotAStoreError:
        raise
    except _OtherKeyError:
        logger.warning(
            "%s was made from other data, by another tokenizer or with other settings: it is being "
            "replaced.",
            path,
        )
    except DataError as error:
        logger.warning("It is being replaced: %s", error)
    return None, found


def _claim(path: Path, key: bytes) -> _rust.StoreWriter | None:
    """Begins to write the store; None while another process does."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = _begin(partial)
        # What a killed builder left is emptied. It begins with zeros, for the header comes last.
        if begin.strip(b"\0") and begin != _MAGIC:
            raise _NotAStoreError(
                f"{partial} is in the way of {path}, and it is not ours, it begins with {begin!r}: "
                "pass another path, or move that file."
            )
        return _rust.StoreWriter.claim(path, key)
    except OSError as error:
        raise StorageError(str(error)) from None


def _begin(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC))
    except FileNotFoundError:
        return b""
    except PermissionError:
        if os.name != "nt":
            raise
        return b""  # on Windows nobody else reads what a builder has claimed; claiming tells


def _write(writer: _rust.StoreWriter, dataset: Any, reading: _Reading) -> None:
    started, tokens, done, blank = time.perf_counter(), 0, 0, 0
    try:
        for examples in _batches(dataset, reading, "Tokenising"):
            ids, lengths = encode_examples(reading.tokenizer, examples, done)
            writer.push(ids, lengths)
            tokens, done = tokens + len(ids), done + len(examples)
            blank += sum(not example.text for example in examples)
        if isinstance(dataset, DataFiles):
            dataset.check_unchanged()
        writer.finish()
    except OSError as error:
        raise StorageError(str(error)) from None
    logger.info(
        "Tokenised %s documents (%s tokens) in %.1f s%s.",
        f"{done:,}",
        f"{tokens:,}",
        time.perf_counter() - started,
        f"; {blank:,} of them have no text" if blank else "",
    )


def _batches(dataset: Any, reading: _Reading, doing: str) -> Iterator[list[Example]]:
    """All examples, about `_BYTES_PER_CALL` for each thread at a time."""
    schema = reading.schema()
    examples: list[Example] = []
    size = done = 0
    enough = _BYTES_PER_CALL * num_threads()
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    with progress(doing, "documents", rows) as bar:
        for row in _rows(dataset, schema):
            example = schema.read(row, done)
            examples.append(example)
            size += example.size
            done += 1
            if size >= enough:
                yield examples
                bar.update(len(examples))
                examples, size = [], 0
        # A store that looks whole but is not would be taken from now on.
        if rows is not None and done != rows:
            raise DataError(
                f"dataset gave {done} rows and its length is {rows}: __len__ and __getitem__ must agree, "
                "and nothing may change it meanwhile."
            )
        if not done:
            raise DataError(f"{dataset!r} has no documents: pass files with at least one.")
        if examples:
            yield examples
            bar.update(len(examples))


def _rows(dataset: Any, schema: Schema) -> Iterator[Any]:
    if isinstance(dataset, DataFiles):
        yield from dataset.only(schema.columns)
        return
    for first in range(0, len(dataset), _ROWS_PER_READ):
        yield from _rows_from(dataset, schema, first)


def _rows_from(dataset: Any, schema: Schema, first: int) -> Iterator[Any]:
    last = min(first + _ROWS_PER_READ, len(dataset))
    if not hasattr(dataset, "column_names"):
        for index in range(first, last):
            yield _item(dataset, index)
        return
    names = [name for name in schema.columns if name in dataset.column_names]
    if not names:
        raise DataError(
            f"dataset has no column {schema.wanted}, only {', '.join(dataset.column_names)}: pass "
            "text_column."
        )
    columns = _item(dataset, slice(first, last))  # one read, however many columns
    for values in zip(*(columns[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _item(dataset: Any, at: int | slice) -> Any:
    try:
        return dataset[at]
    except StopIteration as error:
        # Whatever iterates over rows would take it for their end.
        raise DataError(
            f"dataset[{at}] raises StopIteration: raise another error there, or return a row."
        ) from error


def _key(dataset: Any, reading: _Reading) -> bytes:
    """Digest of everything that the tokens depend on."""
    identity = reading.tokenizer.identity
    digest = hashlib.blake2b(f"{_VERSION} {identity}".encode(), digest_size=32)

    def add(part: Any) -> None:
        # None and 3 are not the texts "None" and "3".
        data = (part if isinstance(part, str) else repr(part)).encode("utf-8", "surrogatepass")
        digest.update(b"s" if isinstance(part, str) else b"n" if part is None else b"o")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    if reading.assistant_only_loss:
        add(True)
    # A datasets.Dataset knows a digest of its own contents; that of other data is made here.
    fingerprint = getattr(dataset, "_fingerprint", None)
    if isinstance(dataset, DataFiles):
        fingerprint = f"files {dataset.content()}"
    if fingerprint is not None:
        add(fingerprint)
        add(reading.text_column or "text")
        return digest.digest()
    for examples in _batches(dataset, reading, "Reading"):
        for example in examples:
            for part in (example.text, example.prompt, example.rendered):
                add(part)
            if reading.assistant_only_loss:
                add(example.spans)
    return digest.digest()
