"""DataFiles: every document of JSON Lines, text and Parquet files once, in order, from any place on."""

import itertools
import json
import logging
import os
import pathlib
import random
import re
from collections import Counter

import numpy as np
import pytest
from small_tokenizers import TEXTS, small_tokenizer
from streams import expected, parts, random_documents, same, small_windows

from barqtrain_hf.data import DataFiles, FastTokenizer, PackedDataset, PackedStream, tokenize
from barqtrain_hf.data import formats as formats_module
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError, StorageError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"text": f"{text} {n}", "id": n, "more": {"a": [n, None]}} for n, text in enumerate(TEXTS)]


def write_jsonl(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=bool(n % 2)) + "\n" for n, row in enumerate(rows))
    )
    return path


def write_parquet(path, rows, **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def write_text(path, rows):
    path.write_text("".join(row["text"] + "\n" for row in rows))
    return path


WRITE = {"jsonl": write_jsonl, "parquet": write_parquet, "txt": write_text}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def plain(rows):
    """Without what cannot be compared."""
    return [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_those_of_the_files_in_their_order(kind, tmp_path):
    for number, rows in enumerate((ROWS[:3], ROWS[3:4], ROWS[4:])):
        WRITE[kind](tmp_path / f"{number}.{kind}", rows)
    assert plain(DataFiles(tmp_path / f"*.{kind}")) == ROWS
    both = [str(tmp_path / f"2.{kind}"), tmp_path / f"[01].{kind}"]
    assert plain(DataFiles(both)) == ROWS[4:] + ROWS[:4]
    other = (tmp_path / f"0.{kind}").rename(tmp_path / "other.bin")
    assert plain(DataFiles(other, format=kind)) == ROWS[:3]


def test_json_lines_may_have_blank_lines_a_mark_and_windows_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "\\u00e9\xc3\xa9"}',
        b"",
        b"  ",
        b'{"text": "b\xe2\x80\xa8"}\r',
        b'{"n": 1}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert list(DataFiles(path)) == [{"text": "éé"}, {"text": "b\u2028"}, {"n": 1}]


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_texts_are_those_of_load_dataset(sample_by, tmp_path):
    """All but blank ones, which load_dataset gives too."""
    datasets = pytest.importorskip("datasets")
    choose = random.Random(0)
    pieces = [
        "a",
        "word ",
        "é日🙂",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\n\n\n",
        "\u2028",
        "\x0c",
        "\x85",
        " ",
        "\t",
    ]
    for number in range(40):
        text = "".join(choose.choices(pieces, k=choose.randrange(40)))
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    paths = sorted(map(str, tmp_path.iterdir()))
    theirs = datasets.load_dataset(
        "text", data_files=paths, sample_by=sample_by, split="train", streaming=True
    )
    texts = [row["text"] for row in theirs]
    found = [row["text"] for row in DataFiles(paths, sample_by=sample_by)]
    assert found == [text for text in texts if text.strip()]
    assert len(found) > (30 if sample_by == "document" else 80)


def test_only_the_columns_that_are_needed_are_read(tmp_path, tokenizer, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a b", "huge": [1, 2]}] * 3)
    read = []
    values = formats_module._values
    monkeypatch.setattr(formats_module, "_values", lambda *a: (read.append(a), values(*a))[1])
    assert len(tokenize(path, tokenizer, tmp_path / "tokens")) == 3
    list(PackedStream(path, 64, tokenizer=tokenizer))
    assert len(read) == 2, "one column each time"


def files_of(kind, folder, documents):
    """Three files, and Parquet with several row groups in each."""
    folder.mkdir()
    options = {"row_group_size": 7} if kind == "parquet" else {}
    third = len(documents) // 3
    for number in range(3):
        rows = documents[number * third :][: third if number < 2 else None]
        WRITE[kind](folder / f"{number}.{kind}", rows, **options)
    return str(folder / f"*.{kind}")


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@pytest.mark.parametrize("kind", WRITE)
def test_any_place_is_gone_on_from_without_reading_what_was_before(
    kind, sample_by, tmp_path, monkeypatch
):
    rows = [{"text": f"row {n}" + "\r\n\n\n\nmore" * (n % 3)} for n in range(60)]
    paths = files_of(kind, tmp_path / "files", rows)
    files = DataFiles(paths, sample_by=sample_by)
    found, states = [], [files.state_dict()]
    for row in files:
        found.append(dict(row))
        states.append(json.loads(json.dumps(files.state_dict())))
    assert len(found) == {"line": 120, "paragraph": 63, "document": 3}[sample_by] or kind != "txt"

    read = []
    decode, values = formats_module._decode, formats_module._values
    monkeypatch.setattr(formats_module, "_decode", lambda *a: (read.append(1), decode(*a))[1])
    monkeypatch.setattr(
        formats_module, "_values", lambda *a: (read.extend([1] * len(a[0])), values(*a))[1]
    )
    list(DataFiles(paths, sample_by=sample_by))
    all_read = len(read)
    for at, state in enumerate(states):
        again = DataFiles(paths, sample_by=sample_by)
        again.load_state_dict(state)
        read.clear()
        assert [dict(row) for row in again] == found[at:]
        assert len(read) <= all_read - at * (kind != "txt" or sample_by == "line")
        assert [dict(row) for row in again] == found, "the next time all"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_streams_of_files_are_those_of_lists_and_resume(kind, tmp_path, monkeypatch):
    small_windows(monkeypatch)
    docs = random_documents(200, 30)
    paths = files_of(kind, tmp_path / "files", docs)
    batches, states = [], []
    stream = PackedStream(paths, 64)
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    assert all(map(same, batches, PackedStream(docs, 64)))
    assert Counter(itertools.chain(*map(parts, batches))) == Counter(expected(docs))
    for at in (0, 5, len(batches) // 2, len(batches) - 2):
        again = PackedStream(DataFiles(paths), 64)
        again.load_state_dict(states[at])
        rest = list(again)
        assert len(rest) == len(batches) - at - 1 and all(map(same, rest, batches[at + 1 :]))
    assert Counter(itertools.chain(*map(parts, again))) == Counter(expected(docs)), "the next epoch"
    packed = PackedDataset(paths, 64, seed=3)
    ours = [tuple(row["input_ids"].tolist()) for row in packed]
    assert ours == [tuple(row["input_ids"].tolist()) for row in PackedDataset(docs, 64, seed=3)]


def test_files_that_changed_are_not_resumed(tmp_path, monkeypatch, caplog):
    small_windows(monkeypatch)
    docs = random_documents(150, 30)
    paths = files_of("jsonl", tmp_path / "files", docs)
    stream = PackedStream(paths, 64)
    list(itertools.islice(stream, 3))
    state = stream.state_dict()
    reading = pathlib.Path(DataFiles(paths).paths[state["window"]["place"]["state"]["file"]])
    content = reading.read_bytes()

    def resume():
        again = PackedStream(paths, 64)
        again.load_state_dict(state)
        return list(again)

    whole = len(resume())
    assert not caplog.messages
    reading.write_bytes(content[:20] + b"9" + content[21:])  # as long as it was
    with pytest.raises(DataError, match="is not the file that it was when the state was taken"):
        resume()
    reading.write_bytes(content + b"\n")
    with pytest.raises(DataError, match="has other files than when the state was taken"):
        resume()
    assert "has the fingerprint" in caplog.text
    reading.write_bytes(content)
    assert len(resume()) == whole
    state["window"]["place"]["state"] = {"shard_idx": 0}
    with pytest.raises(
        DataError, match=r"The state of <DataFiles '.*0.jsonl' and 2 more> lacks at, file"
    ):
        resume()


@pytest.mark.parametrize("kind", WRITE)
def test_stores_of_files_are_those_of_lists_and_found_again(kind, tmp_path, tokenizer, monkeypatch):
    texts = [text for text in TEXTS if text.strip() and "\n" not in text]
    path = WRITE[kind](tmp_path / f"a.{kind}", [{"text": text} for text in texts])
    store = tokenize(str(path), tokenizer, tmp_path / "tokens")
    in_memory = tokenize(texts, tokenizer, tmp_path / "other")
    assert np.array_equal(store.input_ids, in_memory.input_ids)
    assert np.array_equal(store.lengths, in_memory.lengths)

    encode = FastTokenizer.encode
    monkeypatch.setattr(FastTokenizer, "encode", None)  # called, it would fail
    moved = path.rename(tmp_path / f"moved.{kind}")
    os.utime(moved, (1, 1))
    assert len(tokenize(moved, tokenizer, tmp_path / "tokens")) == len(texts)
    monkeypatch.setattr(FastTokenizer, "encode", encode)

    # One byte, at the same size and time.
    before = moved.stat()
    content = moved.read_bytes()
    at = content.index(b"quick")
    moved.write_bytes(content[:at] + b"Q" + content[at + 1 :])
    os.utime(moved, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = moved.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = tokenize(moved, tokenizer, tmp_path / "tokens")
    assert "Quick" in tokenizer.decode(changed.input_ids)


def test_what_files_are_split_into_is_part_of_the_key(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n\nc\n")
    for sample_by, documents in (("line", 3), ("paragraph", 2), ("document", 1), ("line", 3)):
        files = DataFiles(path, sample_by=sample_by)
        assert len(tokenize(files, tokenizer, tmp_path / "tokens")) == documents


def test_a_file_written_to_while_it_is_read_makes_no_store(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    encode = FastTokenizer.encode

    def writing(self, *arguments, **options):
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
        return encode(self, *arguments, **options)

    monkeypatch.setattr(FastTokenizer, "encode", writing)
    with pytest.raises(DataError, match=r"a.jsonl was changed while it was read"):
        tokenize(path, tokenizer, tmp_path / "tokens")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def bad(tmp_path, name, content):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_parquet(path, content)
    return path


NOT_UTF_8 = b'{"text": "a"}\n{"text": "b\xff"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", NOT_UTF_8, r"a.jsonl is not UTF-8: invalid start byte at byte 25 \(line 2\)"),
        ("a.txt", b"one\ntwo\n\xe9", r"a.txt is not UTF-8: .*at byte 8 \(line 3\)"),
        ("a.txt", b"\xef\xbb\xbf\xe9", r"a.txt is not UTF-8: .*at byte 3 \(line 1\)"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "b"\n',
            r"a.jsonl, line 3 \(byte 15\) is not JSON: Expecting ',' delimiter at character",
        ),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1 \(byte 0\) is not JSON: maximum recursion"),
        ("a.json", b'[{"text": "a"}]', r"a.json, line 1 is a list: .*pass what json.load returns"),
        ("a.jsonl", b'"text"', r"a.jsonl, line 1 is a str: each line has to be one object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": 1, "id": 2}',
            r"a.jsonl, line 2 has no 'text', no messages and .*, only body, id: pass text_column",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}',
            r"a.jsonl, line 2 has messages and the rows before it text: all rows must be alike",
        ),
        ("a.jsonl", b'\n{"text": null}', r"a.jsonl, line 2 is None \(NoneType\) instead of text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl, line 1 has no UTF-8: surrogates not"),
        ("a.jsonl", b"\n \n", "DataFiles .*a.jsonl'> has no documents|dataset has no documents"),
        ("a.txt", b"", "DataFiles .*a.txt'> has no documents|dataset has no documents"),
        ("a.parquet", b"PAR1 or so", r"a.parquet cannot be read as Parquet: Parquet magic"),
        ("a.parquet", [{"body": 1, "id": 2}], r"a.parquet has the columns body, id and none of te"),
        ("a.parquet", [{"prompt": "a", "id": 2}], r"a.parquet, row 1 has no 'text'.*only prompt, id"),
        ("a.parquet", [{"text": "a"}, {"text": None}], r"a.parquet, row 2 is None \(NoneType\)"),
    ],
)  # fmt: skip
def test_bad_content_is_named_by_file_and_place(name, content, message, tmp_path, tokenizer):
    path = bad(tmp_path, name, content)
    for read in (
        lambda: tokenize(path, tokenizer, tmp_path / "tokens"),
        lambda: list(PackedStream(path, 64, tokenizer=tokenizer)),
    ):
        with pytest.raises(DataError, match=message):
            read()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_bytes_that_are_not_utf_8_are_placed_however_texts_are_cut(sample_by, tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\nthree\nfo\xe9ur\nfive\n")
    files = DataFiles(path, sample_by=sample_by)
    for read in (
        lambda: tokenize(files, tokenizer, tmp_path / "tokens"),
        lambda: list(PackedStream(files, 64, tokenizer=tokenizer)),
    ):
        with pytest.raises(
            DataError, match=r"a.txt is not UTF-8: .* at byte 18 \(line 5\)\. Convert it"
        ):
            read()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_tokens_of_files_are_named_too(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1], "labels": [1]}, {"labels": [1]}])
    for make in (PackedDataset, lambda *arguments: list(PackedStream(*arguments))):
        with pytest.raises(DataError, match=r"a.jsonl, line 2 has no input_ids: tokenize"):
            make(path, 64)


def test_a_string_in_parquet_that_is_not_utf_8(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"a", b"b\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 2 has a string that is not UTF-8.*byte 1"):
        tokenize(tmp_path / "a.parquet", tokenizer, tmp_path / "tokens")


@pytest.mark.parametrize(
    ("paths", "options", "error", "message"),
    [
        ("no.txt", {}, ArgumentError, "paths has 'no.txt', and there is no such file"),
        (["a.txt", "no.txt"], {}, ArgumentError, "paths has 'no.txt', and there is no such file"),
        ("*.parquet", {}, ArgumentError, r"paths has '\*.parquet', which no file matches"),
        (".", {}, ArgumentError, r"paths has '.', which is a folder: pass a glob, such as"),
        (
            "a.txt.gz",
            {},
            ArgumentError,
            r"a.txt.gz has the suffix '.gz', and known are .jsonl.*unpack",
        ),
        ([], {}, ArgumentError, "paths is empty"),
        ("pipe.txt", {}, ArgumentError, "paths has 'pipe.txt', which can be read only once"),
        (3, {}, ArgumentTypeError, r"paths is 3 \(int\): pass a path"),
        (b"a.txt", {}, ArgumentTypeError, r"paths is b'a.txt' \(bytes\)"),
        (["a.txt", 3], {}, ArgumentTypeError, r"paths has 3 \(int\)"),
        ("a.txt", {"format": "csv"}, ArgumentError, "format is 'csv': choose one of jsonl, text"),
        ("a.txt", {"sample_by": "page"}, ArgumentError, "sample_by is 'page': choose one of line"),
    ],
)
def test_paths_that_cannot_be_right(paths, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.txt.gz"):
        pathlib.Path(name).touch()
    os.mkfifo("pipe.txt")
    with pytest.raises(error, match=message):
        DataFiles(paths, **options)


def test_names_of_files_are_not_taken_for_texts(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(
        ArgumentTypeError,
        match=r"dataset\[0\] is '.*a.txt', the name of a file.*DataFiles\(dataset\)",
    ):
        tokenize([str(path)], tokenizer, tmp_path / "tokens")
    assert len(tokenize([path, path], tokenizer, tmp_path / "tokens")) == 4
    assert len(tokenize(["no.txt", "b"], tokenizer, tmp_path / "tokens")) == 2


def test_files_named_twice_are_warned_of(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    assert len(list(DataFiles([path, tmp_path / "*.jsonl"]))) == 2
    assert "a.jsonl more than once" in caplog.text


def test_a_file_that_is_gone_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(3, 9))
    stream = PackedStream(path, 64)
    path.unlink()
    with pytest.raises(StorageError, match=r"reading .*a.jsonl failed: No such file"):
        list(stream)


def test_chats_come_from_files(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    texts = []
    for write, name in ((write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")):
        store = tokenize(write(tmp_path / name, rows), tokenizer, tmp_path / "tokens")
        texts.append(tokenizer.decode(store.input_ids))
    assert texts == ["user: a\nassistant: b\nuser: a\n"] * 2


def test_without_pyarrow_parquet_is_refused(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ROWS[:1])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"a Parquet file, and pyarrow is not.*\[parquet\]"):
        list(DataFiles(path))


def test_what_was_done_is_logged(tmp_path, tokenizer, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": ""}])
    with caplog.at_level(logging.INFO, logger="barqtrain_hf.data.store"):
        store = tokenize(path, tokenizer, tmp_path / "tokens")
        tokenize(path, tokenizer, tmp_path / "tokens")
    tokens = f"{len(store.input_ids):,}"
    assert [re.sub(r"in \d+\.\d s", "in seconds", line) for line in caplog.messages] == [
        f"Tokenised 11 documents ({tokens} tokens) in seconds; 1 of them have no text.",
        f"{tmp_path / 'tokens'} has the tokens of these 11 documents already.",
    ]
