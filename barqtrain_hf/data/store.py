"""Tokenised documents in a memory-mapped file, so that a second run starts at once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barqtrain_hf import _rust
from barqtrain_hf.data.examples import CHAT_KEYS, Example, Schema, encode_examples
from barqtrain_hf.data.tokenizer import FastTokenizer
from barqtrain_hf.errors import ArgumentTypeError, DataError, StorageError

logger = logging.getLogger(__name__)

# Goes into every key: another one where the meaning of a store's tokens changes.
_VERSION = 1
# Enough texts at once that threads rarely wait for the last chunk, few enough to hold in memory.
_BYTES_PER_CALL = 16 << 20
_ROWS_PER_READ = 64
_SECONDS_BETWEEN_LOOKS = 0.05


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
        DataError: it is damaged, or was made from something else.
    """

    labels: None = None

    def __init__(self, path: str | os.PathLike[str], key: bytes | None = None) -> None:
        self.path = Path(path).absolute()
        try:
            documents, tokens, tokens_at, offsets_at = _rust.verify_store(self.path, key)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(str(error)) from None
        except ValueError as error:
            raise DataError(str(error)) from None
        self.input_ids = self._map("<i4", tokens_at, tokens)
        self.lengths: npt.NDArray[np.int64] = np.diff(
            self._map("<u8", offsets_at, documents + 1)
        ).astype(np.int64)

    def _map(self, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        if not count:
            return np.empty(0, dtype)  # nothing cannot be mapped
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return type(self), (self.path,)  # a worker maps the file itself


def tokenize(
    dataset: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    add_special_tokens: bool = True,
    append_eos: bool = True,
) -> TokenStore:
    """Tokenises texts into a file, or takes the file from an earlier run on the same texts.

    Every row is a document: a text or a chat, all of whose tokens bear a loss but the first, or a
    prompt with its completion, which alone bears a loss. The file appears under its name when it is
    whole. Of several processes one builds it and the others wait; after a crash the next
    run builds it again.

    Args:
        dataset: a sequence of strings or of dicts; a ``datasets.Dataset``. Dicts have ``messages``, or
            ``prompt`` and ``completion`` (both text or both messages), or else ``text_column``. Chats are
            rendered by the tokenizer's chat template, and nothing is added to them.
        tokenizer: a fast tokenizer; truncation and padding are off.
        path: the file. Its folder is made if there is none.
        text_column: where rows are dicts, the key of the text.
        add_special_tokens: as in ``tokenizer(text, add_special_tokens=...)``.
        append_eos: whether ``eos_token`` goes after every text that does not end with it, as in TRL.

    Raises:
        UnsupportedError: the tokenizer has no fast version.
        DataError: there is no text, some row has none, or rows are of different kinds.
        ArgumentError: there are chats and no chat template, or no ``eos_token`` to append.
        ArgumentTypeError: ``dataset`` has no length.
        StorageError: the file cannot be written, such as on a full disk; nothing is left behind.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ArgumentTypeError(
            f"dataset is a {type(dataset).__name__}, which has no length: pass a list or a map-style "
            "data set."
        )
    if not len(dataset):
        raise DataError("dataset is empty: pass at least one text.")
    fast = FastTokenizer(tokenizer, add_special_tokens=add_special_tokens, append_eos=append_eos)
    path = Path(path).absolute()
    key = _key(dataset, text_column, fast)
    store = _find(path, key)
    while store is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = _rust.StoreWriter.claim(path, key)
        except OSError as error:
            raise StorageError(str(error)) from None
        if writer is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            store = _find(path, key)
            continue
        try:
            store = _find(path, key)  # its last writer may have finished since
            if store is None:
                _write(writer, dataset, text_column, fast)
                store = TokenStore(path, key)
        finally:
            writer.abandon()
    return store


def _find(path: Path, key: bytes) -> TokenStore | None:
    try:
        return TokenStore(path, key)
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("%s Building it again.", error)
        return None


def _write(
    writer: _rust.StoreWriter, dataset: Any, text_column: str, tokenizer: FastTokenizer
) -> None:
    started, tokens, done = time.perf_counter(), 0, 0
    try:
        for examples in _batches(dataset, text_column, tokenizer):
            ids, lengths = encode_examples(tokenizer, examples, done)
            writer.push(ids, lengths)
            tokens, done = tokens + len(ids), done + len(examples)
        writer.finish()
    except OSError as error:
        raise StorageError(str(error)) from None
    seconds = time.perf_counter() - started
    logger.info(
        "Tokenised %s documents (%s tokens) in %.1f s.", f"{done:,}", f"{tokens:,}", seconds
    )


def _batches(dataset: Any, text_column: str, tokenizer: FastTokenizer) -> Iterator[list[Example]]:
    """All examples, about `_BYTES_PER_CALL` at a time."""
    schema = Schema(tokenizer.tokenizer, text_column)
    examples: list[Example] = []
    size = 0
    for first in range(0, len(dataset), _ROWS_PER_READ):
        for index, row in enumerate(_rows(dataset, text_column, first), first):
            example = schema.read(row, index)
            examples.append(example)
            size += example.size
        if size >= _BYTES_PER_CALL:
            yield examples
            examples, size = [], 0
    if examples:
        yield examples


def _rows(dataset: Any, text_column: str, first: int) -> Iterable[Any]:
    last = min(first + _ROWS_PER_READ, len(dataset))
    if not hasattr(dataset, "column_names"):
        return map(dataset.__getitem__, range(first, last))
    names = [name for name in (text_column, *CHAT_KEYS) if name in dataset.column_names]
    if not names:
        raise DataError(
            f"dataset has no column {text_column!r}, no messages and no prompt with completion, only "
            f"{', '.join(dataset.column_names)}: pass text_column."
        )
    columns = dataset[first:last]  # one read, however many columns
    values = zip(*(columns[name] for name in names), strict=True)
    return (dict(zip(names, row, strict=True)) for row in values)


def _key(dataset: Any, text_column: str, tokenizer: FastTokenizer) -> bytes:
    """Digest of everything that the tokens depend on."""
    digest = hashlib.blake2b(f"{_VERSION} {tokenizer.identity}".encode(), digest_size=32)
    # A datasets.Dataset knows a digest of its own contents; that of other data is made here.
    fingerprint = getattr(dataset, "_fingerprint", None)
    if fingerprint is not None:
        digest.update(f"{fingerprint} {text_column}".encode())
        return digest.digest()
    for examples in _batches(dataset, text_column, tokenizer):
        for text, prompt, rendered in examples:
            for part in (text, prompt, rendered):
                encoded = f"{part!r}" if not isinstance(part, str) else part
                data = encoded.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
    return digest.digest()
