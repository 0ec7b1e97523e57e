"""Reading the user's own text, and what is said where it cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from barqtrain_hf.cli.demo.own_data import Document, load
from barqtrain_hf.errors import DataError

LIMIT = 1_000_000


def _texts(documents: list[Document]) -> set[str]:
    return {document.text or "" for document in documents}


def _lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_folder(tmp_path: Path) -> None:
    wanted = {f"text number {i}, grüße\n" for i in range(20)}
    for i, text in enumerate(sorted(wanted)):
        folder = tmp_path / f"part{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    for name in (".git", "__pycache__", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left_out.txt").write_text("left out")
    (tmp_path / ".hidden").write_text("left out")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("grüße".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "copy.txt").write_text("text number 1, grüße\n", encoding="utf-8")

    data = load(str(tmp_path), 0, LIMIT)
    assert _texts(data.train) | _texts(data.held_out) == wanted
    assert not _texts(data.train) & _texts(data.held_out)
    assert len(data.held_out) == 2
    assert not data.is_chat
    notes = " ".join(data.notes)
    assert "Read 20 documents" in notes
    for skipped in ("1 binary", "1 not UTF-8", "1 empty", "1 duplicate"):
        assert skipped in notes


def test_seed_decides(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    assert load(str(tmp_path), 1, LIMIT) == load(str(tmp_path), 1, LIMIT)
    assert load(str(tmp_path), 1, LIMIT) != load(str(tmp_path), 2, LIMIT)


def test_limit(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"{i:03}" + "ä" * 500)
    data = load(str(tmp_path), 0, 5_000)
    assert sum(d.size for d in data.train + data.held_out) <= 5_000
    assert "is the limit" in " ".join(data.notes)


def test_one_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " + "word " * 150 for i in range(40))
    (tmp_path / "book.txt").write_text(text)
    data = load(str(tmp_path / "book.txt"), 0, LIMIT)
    parts = sorted(data.train + data.held_out, key=lambda d: int(d.origin.split()[-1]))
    assert "".join(d.text or "" for d in parts) == text
    assert len(parts) > 10


def test_json_lines(tmp_path: Path) -> None:
    texts = _lines(tmp_path / "texts.jsonl", *({"text": f"text {i}"} for i in range(5)))
    assert not load(texts, 0, LIMIT).is_chat

    chats = _lines(
        tmp_path / "chats.jsonl",
        {"prompt": "hello", "completion": "hi"},
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi there"},
            ]
        },
    )
    data = load(chats, 0, LIMIT)
    assert data.is_chat
    assert {len(d.chat) for d in data.train + data.held_out} == {2, 3}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"bad\.jsonl, line 3: not valid JSON: .*, column 13"),
        ('["text"]', "line 3: a JSON object is needed, this is a list"),
        ('{"body": "a"}', r"line 3: has the keys \['body'\]; needed are `text`"),
        ('{"text": 7}', "line 3: text must be a string, this is 7"),
        ('{"messages": "hi"}', "line 3: messages must be a list"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "line 3: the role 'tool' is none of"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 3: no message of the assistant"),
        ('{"messages": [{"role": "user"}]}', "line 3: content must be a string, this is None"),
    ],
)
def test_malformed_json_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=message):
        load(str(path), 0, LIMIT)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        load(str(tmp_path / "missing"), 0, LIMIT)
    with pytest.raises(DataError, match="0 usable documents"):
        load(str(tmp_path), 0, LIMIT)
    (tmp_path / "blob").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"0 usable documents.*1 binary"):
        load(str(tmp_path), 0, LIMIT)
    (tmp_path / "only.txt").write_text("one line")
    with pytest.raises(DataError, match="1 usable documents, and at least two"):
        load(str(tmp_path), 0, LIMIT)


def test_texts_and_chats_do_not_mix(tmp_path: Path) -> None:
    path = _lines(tmp_path / "m.jsonl", {"text": "a"}, {"prompt": "b", "completion": "c"})
    with pytest.raises(DataError, match="one kind at a time"):
        load(path, 0, LIMIT)
