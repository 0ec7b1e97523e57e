"""The token store: built once, found again, never trained on when it is not what was asked for."""

import logging
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import TEXTS, small_tokenizer

from barqtrain_hf import _rust
from barqtrain_hf.data import (
    BarqDataCollator,
    FastTokenizer,
    PackedDataset,
    PackedStream,
    TokenStore,
    tokenize,
)
from barqtrain_hf.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    StorageError,
    UnsupportedError,
)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def documents(store):
    return [part.tolist() for part in np.split(store.input_ids, np.cumsum(store.lengths)[:-1])]


def expected(tokenizer, texts):
    eos = tokenizer.eos_token_id
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    return [found if found[-1] == eos else [*found, eos] for found in ids]


@pytest.mark.parametrize("make", [list, lambda texts: [{"text": t, "id": 1} for t in texts]])
def test_store_holds_the_tokens(tmp_path, tokenizer, make):
    store = tokenize(make(TEXTS), tokenizer, tmp_path / "new" / "tokens")
    assert documents(store) == expected(tokenizer, TEXTS)
    assert store.input_ids.dtype == np.int32 and store.lengths.dtype == np.int64
    assert len(store) == len(TEXTS)
    assert os.listdir(tmp_path / "new") == ["tokens"]
    assert documents(TokenStore(store.path)) == documents(store)
    with pytest.raises(ValueError, match="read-only"):
        store.input_ids[0] = 1


def test_huggingface_columns(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"body": list(TEXTS), "n": list(range(len(TEXTS)))})
    store = tokenize(dataset, tokenizer, tmp_path / "a", text_column="body")
    assert documents(store) == expected(tokenizer, TEXTS)
    picked = dataset.select([4, 0, 2])
    store = tokenize(picked, tokenizer, tmp_path / "a", text_column="body")
    assert documents(store) == expected(tokenizer, [TEXTS[i] for i in (4, 0, 2)])
    with pytest.raises(DataError, match="dataset has no column 'text', no messages and no prompt"):
        tokenize(dataset, tokenizer, tmp_path / "b")


def test_a_second_run_reads_what_the_first_wrote(tmp_path, tokenizer, caplog, monkeypatch):
    path = tmp_path / "tokens"
    first = documents(tokenize(TEXTS, tokenizer, path))
    written = path.stat().st_mtime_ns
    encode = FastTokenizer.encode
    monkeypatch.setattr(FastTokenizer, "encode", None)  # called, it would fail
    assert documents(tokenize(TEXTS, tokenizer, path)) == first
    assert path.stat().st_mtime_ns == written
    monkeypatch.setattr(FastTokenizer, "encode", encode)

    # Anything else than the same texts, tokenizer and settings is another store.
    for texts, options in (
        ([*TEXTS[:-1], "y"], {}),
        (TEXTS, {"append_eos": False}),
        (TEXTS, {"add_special_tokens": False}),
    ):
        with caplog.at_level(logging.WARNING, logger="barqtrain_hf.data.store"):
            caplog.clear()
            store = tokenize(texts, tokenizer, path, **options)
        (message,) = caplog.messages
        assert "was made from other data, by another tokenizer" in message
        assert message.endswith("it is being replaced.") and "delete" not in message
        assert documents(store) != first


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_store_is_built_again(tmp_path, tokenizer, caplog, damage):
    path = tmp_path / "tokens"
    first = documents(tokenize(TEXTS, tokenizer, path))
    good = path.read_bytes()
    flipped = bytes([*good[:100], good[100] ^ 1, *good[101:]])
    path.unlink()  # a mapped file must not change under its readers
    path.write_bytes({"flip": flipped, "cut": good[:-8], "empty": b""}[damage])
    with pytest.raises(DataError, match=r"is damaged: .* Delete it and build it again"):
        TokenStore(path)
    with caplog.at_level(logging.WARNING, logger="barqtrain_hf.data.store"):
        assert documents(tokenize(TEXTS, tokenizer, path)) == first
    assert "is damaged" in caplog.text
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "content", [b'{"text": "precious"}\n' * 99, b"x", bytes(64)], ids=["lines", "byte", "zeros"]
)
def test_a_file_that_is_no_store_is_never_replaced(tmp_path, tokenizer, content):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    for read in (lambda: tokenize(TEXTS, tokenizer, path), lambda: TokenStore(path)):
        with pytest.raises(
            DataError, match=r"train.jsonl is no token store, it begins with b.*another path"
        ):
            read()
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["train.jsonl"]


def test_nor_is_a_file_by_the_name_of_the_unfinished_one(tmp_path, tokenizer):
    partial = tmp_path / "tokens.partial"
    partial.write_text("precious")
    with pytest.raises(
        DataError, match=r"tokens.partial is in the way of .*begins with b'preciou'"
    ):
        tokenize(TEXTS, tokenizer, tmp_path / "tokens")
    assert partial.read_text() == "precious"
    partial.write_bytes(bytes(99) + b"left by a killed builder")
    tokenize(TEXTS, tokenizer, tmp_path / "tokens")
    assert os.listdir(tmp_path) == ["tokens"]


def test_one_kind_of_value_is_not_taken_for_another(tmp_path, tokenizer):
    path = tmp_path / "tokens"
    tokenize([{"text": "Nonefoo"}], tokenizer, path)
    rows = [{"prompt": "None", "completion": "foo"}]
    store = tokenize(rows, tokenizer, path)
    assert (store.input_ids < 0).any(), "the prompt bears no loss"
    tokenize(["[3]", "3"], tokenizer, path)
    for bad in (["[3]", 3], [[3], "3"]):
        with pytest.raises(DataError, match=r"instead of text"):
            tokenize(bad, tokenizer, path)


def test_a_template_that_writes_other_special_tokens_is_another_store(tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ pad_token }}{% endfor %}"
    rows = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "a b"}]}])
    FastTokenizer(tokenizer)  # whatever using it changes is changed now
    ends = []
    for pad in ("<s>", "</s>"):
        tokenizer.pad_token = pad
        ends.append(tokenizer.decode(tokenize(rows, tokenizer, tmp_path / "tokens").input_ids[-1:]))
    assert ends == ["<s>", "</s>"]


def test_a_store_replaced_while_it_is_opened_is_read_again(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "tokens"
    tokenize(TEXTS, tokenizer, path)
    other = tokenize(["something else"] * 80, tokenizer, tmp_path / "other")
    expected, verify = documents(other), _rust.verify_store

    def slow(*arguments):
        found = verify(*arguments)
        if other.path.exists():
            other.path.rename(path)
        return found

    monkeypatch.setattr(_rust, "verify_store", slow)
    assert documents(TokenStore(path)) == expected

    def always(*arguments):
        found = verify(*arguments)
        path.with_suffix(".new").write_bytes(path.read_bytes())
        path.with_suffix(".new").rename(path)
        return found

    monkeypatch.setattr(_rust, "verify_store", always)
    with pytest.raises(DataError, match="was another file each of 20 times that it was read"):
        TokenStore(path)


def test_waiting_for_another_builder_is_quiet(tmp_path, tokenizer, caplog, monkeypatch):
    path = tmp_path / "tokens"
    tokenize(TEXTS, tokenizer, path)
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes([*good[:100], good[100] ^ 1, *good[101:]]))
    reads, verify = [], _rust.verify_store
    monkeypatch.setattr(_rust, "verify_store", lambda *a: (reads.append(a), verify(*a))[1])
    other = _rust.StoreWriter.claim(path, bytes(32))
    timer = threading.Timer(0.5, other.abandon)
    timer.start()
    with caplog.at_level(logging.WARNING, logger="barqtrain_hf.data.store"):
        store = tokenize(TEXTS, tokenizer, path)
    timer.join()
    assert documents(store) == expected(tokenizer, TEXTS)
    assert len(caplog.messages) == 1 and "is damaged" in caplog.text
    assert len(reads) == 2, "the damaged file and the new one"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, tokenizer):
    path = tmp_path / "tokens"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"writing .*tokens failed: File too large.*free some"
        ):
            tokenize(["a b c d e f " * 20_000], tokenizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []
    assert len(tokenize(["a b c d e f " * 20_000], tokenizer, path)) == 1


def test_paths_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        tokenize(TEXTS, tokenizer, tmp_path / "file" / "tokens")
    with pytest.raises(StorageError, match=r"reading .* failed"):
        tokenize(TEXTS, tokenizer, tmp_path)


# The tokenizer comes from the parent: training one starts the threads of `tokenizers`, which does not work
# in the child of a process that had them before.
def _build(path, tokenizer, barrier, results):
    barrier.wait()
    store = tokenize(list(TEXTS) * 50, tokenizer, path)
    results.put((os.stat(path).st_ino, int(store.input_ids.astype(np.int64).sum())))


def test_of_several_processes_one_builds(tmp_path, tokenizer):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    path = tmp_path / "tokens"
    given = (path, tokenizer, barrier, results)
    processes = [context.Process(target=_build, args=given) for _ in range(4)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1, "one file, mapped by all"
    assert os.listdir(tmp_path) == ["tokens"]


def _build_slowly(path, tokenizer, started):
    from barqtrain_hf.data import store

    store._BYTES_PER_CALL = 2000
    started.set()
    tokenize(list(TEXTS) * 100, tokenizer, path)


def test_killed_at_any_moment_the_next_run_has_the_right_tokens(tmp_path, tokenizer):
    """``BARQ_KILLS=50`` kills so often."""
    context = multiprocessing.get_context("fork")
    path = tmp_path / "tokens"
    rng = np.random.default_rng(0)
    in_the_middle = 0
    for _ in range(int(os.environ.get("BARQ_KILLS", "12"))):
        path.unlink(missing_ok=True)
        started = context.Event()
        builder = context.Process(target=_build_slowly, args=(path, tokenizer, started))
        builder.start()
        assert started.wait(60)
        time.sleep(rng.uniform(0, 0.05))  # building takes some 40 ms, more on a busy machine
        builder.kill()
        builder.join()
        in_the_middle += os.path.exists(f"{path}.partial")
        if path.exists():
            TokenStore(path)  # what has the final name is whole
        store = tokenize(list(TEXTS) * 100, tokenizer, path)
        assert documents(store) == expected(tokenizer, TEXTS) * 100
        assert os.listdir(tmp_path) == ["tokens"]
    assert in_the_middle, "no builder was killed while it wrote"


def test_packed_rows_come_from_the_file(tmp_path, tokenizer):
    store = tokenize(TEXTS, tokenizer, tmp_path / "tokens")
    rows = [{"input_ids": ids, "labels": ids} for ids in documents(store)]
    packed = PackedDataset(store, 64, overflow="split", seed=5)
    in_memory = PackedDataset(rows, 64, overflow="split", seed=5)
    assert len(packed) == len(in_memory)
    for ours, theirs in zip(packed, in_memory, strict=True):
        assert all(ours[key].equal(theirs[key]) for key in theirs)
    dumped = pickle.dumps(store)
    assert len(dumped) < 500, "workers map the file instead of getting a copy"
    assert documents(pickle.loads(dumped)) == documents(store)


@pytest.mark.parametrize("key", ["other", "same"])
def test_a_pickled_store_is_not_another_file_of_its_name(tmp_path, tokenizer, key):
    path = tmp_path / "tokens"
    first = tokenize(TEXTS, tokenizer, path)
    dumped = pickle.dumps(first)
    if key == "other":
        tokenize(TEXTS[:2], tokenizer, path)
    else:  # as after an update of the tokenizers package
        writer = _rust.StoreWriter.claim(path, path.read_bytes()[8:40])
        writer.push(np.zeros(3, np.int32), np.array([3]))
        writer.finish()
    message = {"other": "was made from other data", "same": "has other tokens than when"}[key]
    with pytest.raises(DataError, match=message):
        pickle.loads(dumped)


def test_a_token_may_bear_no_loss(tmp_path):
    ids = np.array([7, 8 | -(2**31), 9, 5, 6], np.int32)
    writer = _rust.StoreWriter.claim(tmp_path / "tokens", bytes(32))
    writer.push(ids, np.array([3, 2]))
    writer.finish()
    with pytest.raises(ValueError, match="finished or given up"):
        writer.push(ids, np.array([3, 2]))
    batch = BarqDataCollator()([PackedDataset(TokenStore(tmp_path / "tokens"), 5)[0]])
    documents = {
        tuple(zip(ids.tolist(), labels.tolist(), strict=True))
        for ids, labels in zip(
            batch["input_ids"][0].split([3, 2]), batch["labels"][0].split([3, 2]), strict=True
        )
    }
    assert documents == {((7, -100), (8, -100), (9, 9)), ((5, -100), (6, 6))}


class _Stops(list):
    def __getitem__(self, index):
        if index == 30:
            raise StopIteration
        return super().__getitem__(index)


class _Short:
    """Columns that end before the length says."""

    column_names = ("text",)

    def __len__(self):
        return 100

    def __getitem__(self, part):
        return {"text": ["a"] * len(range(part.start, min(part.stop, 90)))}


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            "corpus.txt",
            ArgumentError,
            r"paths has 'corpus.txt', and there is no such file: .* a list",
        ),
        (b"corpus", ArgumentTypeError, r"dataset is b'corpus' \(bytes\): pass a path, or a list"),
        (Path("corpus.txt"), ArgumentError, r"paths has 'corpus.txt', and there is no such file"),
        (
            {"train": ["a"], "test": ["b"]},
            ArgumentTypeError,
            r"dataset is a dict with 'train', 'test': choose a split, such as dataset\[\"train\"\]",
        ),
        (_Stops(["a"] * 100), DataError, r"dataset\[30\] raises StopIteration: raise another"),
        (_Short(), DataError, "dataset gave 90 rows and its length is 100"),
        ([], DataError, "dataset is empty: pass at least one text"),
        (
            (text for text in TEXTS),
            ArgumentTypeError,
            "dataset is a generator, which has no length",
        ),
        (["a", None], DataError, r"dataset\[1\] is None"),
        (
            [{"text": "a"}, {"body": "b"}],
            DataError,
            r"dataset\[1\] has no 'text', no messages.* only body",
        ),
        (["a"] * 100 + [3], DataError, r"dataset\[100\] is 3 \(int\) instead of text"),
    ],
)
def test_bad_data_is_refused_and_leaves_nothing(tmp_path, tokenizer, dataset, error, message):
    with pytest.raises(error, match=message):
        tokenize(dataset, tokenizer, tmp_path / "tokens")
    assert os.listdir(tmp_path) == []


def test_a_slow_tokenizer_is_refused(tmp_path):
    class Slow:
        is_fast = False

    for use in (
        lambda: tokenize(TEXTS, Slow(), tmp_path / "tokens"),
        lambda: PackedStream(TEXTS, 64, tokenizer=Slow()),
    ):
        with pytest.raises(
            UnsupportedError, match=r"Slow has no fast version.*use_fast=True.*pass the input_ids"
        ):
            use()


def test_a_text_column_that_is_not_there_is_named(tmp_path, tokenizer):
    rows = [{"body": "a"}, {"body": "b", "id": 2}]
    datasets = pytest.importorskip("datasets")
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        for use in (
            lambda dataset: tokenize(dataset, tokenizer, tmp_path / "tokens", text_column="txt"),
            lambda dataset: list(PackedStream(dataset, 64, tokenizer=tokenizer, text_column="txt")),
        ):
            with pytest.raises(DataError, match=r"has no (column )?'txt', only body.*text_column"):
                use(dataset)
    assert os.listdir(tmp_path) == []


def test_texts_without_tokens_are_no_documents(tmp_path, tokenizer):
    """Only where nothing is added to them; one EOS is a document, of which no token bears a loss."""
    texts = ["", "a b c", ""]
    options = {"add_special_tokens": False, "append_eos": False}
    store = tokenize(texts, tokenizer, tmp_path / "tokens", **options)
    assert store.lengths.tolist()[::2] == [0, 0]
    packed = PackedDataset(store, 64)
    assert (packed.num_documents, packed.dropped_documents) == (1, 2)
    stream = PackedStream(texts, 64, tokenizer=FastTokenizer(tokenizer, **options))
    (batch,) = stream
    assert batch["cu_seq_lens_q"].tolist() == [0, store.lengths[1]]
    assert stream.losses["dropped_documents"] == 2
    with pytest.raises(DataError, match=r"dataset has 2 documents and none is left .*2 dropped"):
        PackedDataset(tokenize(["", ""], tokenizer, tmp_path / "tokens", **options), 64)


_BUILDER = """
import atexit, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: print("left at", time.monotonic(), file=sys.stderr))
sys.path[:0] = sys.argv[2:]
from small_tokenizers import small_tokenizer
from barqtrain_hf.data import tokenize

class Texts:
    def __len__(self):
        return 20_000
    def __getitem__(self, index):
        if index == 3000:
            print("in the middle", flush=True)
        return text

text = "Some text to be made tokens of, and then some more. " * 40
tokenize(Texts(), small_tokenizer(), sys.argv[1])
"""


def test_an_interrupt_ends_tokenising_and_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILDER, str(tmp_path / "tokens"), *filter(None, sys.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "in the middle\n"  # of the digest
    assert process.stdout.readline() == "in the middle\n"  # of the tokens
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    left = re.search(r"left at (\S+)", errors)
    # A call takes a third of a second; a busy machine makes it longer.
    assert left is not None and float(left[1]) - started < 3, errors
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
    assert os.listdir(tmp_path) == []
