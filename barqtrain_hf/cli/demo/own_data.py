"""Reads the user's own text: a file, a JSON Lines file, or a folder of both."""

from __future__ import annotations

import codecs
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from barqtrain_hf.cli.demo.tokenizer import ROLES
from barqtrain_hf.errors import DataError

HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 64
# A single text file is cut at blank lines into documents of about this many characters.
SECTION = 2_000
_SNIFFED = 8_192
# Besides hidden folders: what somebody else wrote, or a program.
_LEFT_OUT = {"__pycache__", "node_modules", "site-packages"}


@dataclass(frozen=True)
class Document:
    """One text, or one chat.

    Attributes:
        origin: the file, and the line within it.
        text: the text, or None for a chat.
        messages: the chat, or None for a text.
    """

    origin: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        return [{"role": role, "content": content} for role, content in self.messages or ()]

    @property
    def size(self) -> int:
        """How many bytes of text there are."""
        parts = [self.text or "", *(content for _, content in self.messages or ())]
        return sum(len(part.encode()) for part in parts)


@dataclass
class OwnData:
    """What was read, split by document.

    Attributes:
        train: documents to train on.
        held_out: documents kept from training; none equals a training document.
        notes: what was read and what was left out, in sentences.
    """

    train: list[Document]
    held_out: list[Document]
    notes: list[str] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        """Whether the documents are chats rather than texts."""
        return self.train[0].messages is not None


def load(path: str, seed: int, max_bytes: int) -> OwnData:
    """Reads documents in an order drawn from the seed until there are enough bytes.

    Args:
        path: a text file, a ``.jsonl`` file or a folder.
        seed: of the order, and so of which documents are used and which are held out.
        max_bytes: where to stop.

    Raises:
        DataError: there is no such path, a JSON line is malformed, or too little text was found.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"--data {path}: there is no such file or folder.")
    rng = random.Random(seed)
    files = sorted(_files(root)) if root.is_dir() else [root]
    rng.shuffle(files)
    skipped: Counter[str] = Counter()
    documents: dict[Document, None] = {}  # ordered, and without duplicates
    contents: set[Any] = set()
    read = size = 0
    for file in files:
        if size >= max_bytes:
            break
        read += 1
        found = list(_documents(file, root, skipped))
        if len(files) == 1:
            rng.shuffle(found)
        for document in found:
            content = document.text or document.messages
            if content in contents:
                skipped["duplicate"] += 1
            elif size < max_bytes:
                kept = _cut(document, max_bytes - size)
                contents.add(content)
                documents[kept] = None
                size += kept.size
    kinds = {document.messages is not None for document in documents}
    if len(kinds) == 2:
        raise DataError(
            f"--data {path}: some documents are texts and some are chats; pass one kind at a time."
        )
    notes = _notes(len(files), read, len(documents), size, max_bytes, skipped)
    if len(documents) < 2:
        raise DataError(
            f"--data {path}: {len(documents)} usable documents, and at least two are needed to hold "
            f"one out. {' '.join(notes)}"
        )
    shuffled = list(documents)
    rng.shuffle(shuffled)
    held_out = max(1, min(MAX_HELD_OUT, round(HELD_OUT_SHARE * len(shuffled))))
    return OwnData(shuffled[held_out:], shuffled[:held_out], notes)


def _files(root: Path) -> Iterator[Path]:
    """All files under a folder, except hidden ones and those in folders that are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and n not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _documents(file: Path, root: Path, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of one file; what is unusable is counted in ``skipped``."""
    text = _read_text(file)
    if isinstance(text, _Unusable):
        skipped[text.why] += 1
    elif file.suffix == ".jsonl":
        yield from _json_lines(file, text, skipped)
    elif not text.strip():
        skipped["empty"] += 1
    elif file == root:
        for number, section in enumerate(_sections(text), 1):
            yield Document(f"{file}, part {number}", section)
    else:
        yield Document(str(file.relative_to(root)), text)


@dataclass(frozen=True)
class _Unusable:
    why: str


def _read_text(file: Path) -> str | _Unusable:
    try:
        with file.open("rb") as stream:
            start = stream.read(_SNIFFED)
            if b"\0" in start:
                return _Unusable("binary")
            return codecs.decode(start + stream.read(), "utf-8-sig")
    except UnicodeDecodeError:
        return _Unusable("not UTF-8")
    except OSError:
        return _Unusable("unreadable")


def _sections(text: str) -> Iterator[str]:
    """Cuts a text at blank lines into parts of about ``SECTION`` characters."""
    part: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        size += len(line)
        if size >= SECTION and not line.strip():
            yield "".join(part)
            part, size = [], 0
    if "".join(part).strip():
        yield "".join(part)


def _json_lines(file: Path, text: str, skipped: Counter[str]) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON: {error.msg}, column {error.colno}."
            ) from None
        document = _from_record(record, where)
        if document.size:
            yield document
        else:
            skipped["empty"] += 1


def _from_record(record: Any, where: str) -> Document:
    """One JSON object as a document."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object is needed, this is a {type(record).__name__}.")
    if "messages" in record:
        return Document(where, messages=_messages(record["messages"], where))
    if "prompt" in record and "completion" in record:
        prompt = _string(record["prompt"], f"{where}: prompt")
        completion = _string(record["completion"], f"{where}: completion")
        return Document(where, messages=(("user", prompt), ("assistant", completion)))
    if "text" in record:
        return Document(where, text=_string(record["text"], f"{where}: text"))
    raise DataError(
        f"{where}: has the keys {sorted(record)}; needed are `text`, `messages`, or `prompt` and "
        "`completion`."
    )


def _messages(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{where}: messages must be a list of objects with `role` and `content`.")
    pairs = []
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{where}: the role {role!r} is none of {', '.join(ROLES)}.")
        pairs.append((role, _string(message.get("content"), f"{where}: content")))
    if "assistant" not in (role for role, _ in pairs):
        raise DataError(f"{where}: no message of the assistant, so there is nothing to learn.")
    return tuple(pairs)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, this is {value!r:.40}.")
    return value


def _cut(document: Document, max_bytes: int) -> Document:
    """The start of a text that is longer than what is still wanted; a chat stays whole."""
    if document.text is None or document.size <= max_bytes:
        return document
    start = document.text.encode()[:max_bytes].decode(errors="ignore")
    return Document(document.origin, start)


def _notes(
    files: int, read: int, documents: int, size: int, max_bytes: int, skipped: Counter[str]
) -> list[str]:
    notes = [
        f"Read {documents:,} documents ({size / 1e6:.2f} MB) from {read:,} of {files:,} files."
    ]
    if size >= max_bytes:
        notes.append(f"{max_bytes / 1e6:.1f} MB is the limit; the seed decides which documents.")
    if skipped:
        notes.append(f"Skipped: {', '.join(f'{n:,} {why}' for why, n in skipped.most_common())}.")
    return notes
