"""PackedStream: every document once, resumable at any batch, and no thread outlives its reader."""

import itertools
import logging
import multiprocessing
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXTS, small_tokenizer
from streams import document, documents, expected, parts, random_documents, same, small_windows

from barqtrain_hf.data import BarqDataCollator, FastTokenizer, PackedStream
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError, UnsupportedError


def threads():
    return [t for t in threading.enumerate() if t.name == "barqtrain-prefetch"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=700),
    st.integers(64, 200),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_every_document_comes_out_once_and_whole(lengths, max_length, batch_size, seed):
    docs = documents(lengths)
    batches = list(PackedStream(docs, max_length, batch_size=batch_size, seed=seed))
    assert Counter(itertools.chain(*map(parts, batches))) == Counter(expected(docs))
    for batch in batches:
        assert batch["input_ids"].shape[1] <= max_length * batch_size
    assert not threads()


def test_a_batch_is_what_the_collator_makes():
    docs = random_documents(50, 30)
    by_first = {doc["input_ids"][0]: doc for doc in docs}
    for batch in PackedStream(docs, 64, batch_size=3):
        again = BarqDataCollator()([by_first[ids[0]] for ids, _, _ in parts(batch)])
        assert same(batch, again)
        assert all(
            value.dtype == again[key].dtype
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        )


def test_text_becomes_the_tokens_of_the_tokenizer():
    tokenizer = small_tokenizer()
    texts = [f"{text} {number}" for number in range(60) for text in TEXTS]
    ids, lengths = FastTokenizer(tokenizer).encode(texts)
    whole = [tuple(part.tolist()) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    rows = [{"body": text} for text in texts]
    for dataset, options in ((texts, {}), (rows, {"text_column": "body"})):
        stream = PackedStream(dataset, 4096, tokenizer=tokenizer, **options)
        found = [part for batch in stream for part in parts(batch)]
        assert Counter(ids for ids, _, _ in found) == Counter(whole)
        assert all(labels == (-100, *ids[1:]) for ids, labels, _ in found)


def test_rows_are_full():
    lengths = np.random.default_rng(0).lognormal(np.log(396) - 0.5, 1.0, 20_000)
    docs = [
        {"input_ids": np.zeros(n, np.int32), "labels": np.zeros(n, np.int32)}
        for n in lengths.clip(1, 4096).astype(int)
    ]
    sizes = [batch["input_ids"].shape[1] for batch in PackedStream(docs, 4096)]
    assert sum(sizes) / (4096 * len(sizes)) > 0.999


class Endless:
    """An iterable data set that counts the rows it gives."""

    def __init__(self, docs):
        self.docs, self.given = docs, 0

    def __iter__(self):
        for doc in self.docs:
            self.given += 1
            yield doc


@pytest.mark.parametrize("make", [list, Endless])
def test_resumes_at_any_batch(tmp_path, monkeypatch, make):
    small_windows(monkeypatch)
    docs = random_documents(150, 40)
    stream = PackedStream(make(docs), 64, batch_size=2, seed=3)
    batches, states = [], [stream.state_dict()]
    for _ in range(2):  # epochs
        for batch in stream:
            batches.append(batch)
            states.append(stream.state_dict())
    found = Counter(itertools.chain(*map(parts, batches)))
    assert found == Counter(expected(docs) * 2)
    for at, state in enumerate(states):
        torch.save(state, tmp_path / "state")
        resumed = PackedStream(make(docs), 64, batch_size=2, seed=3)
        resumed.load_state_dict(torch.load(tmp_path / "state"))
        rest = batches[at : at + 5]
        epochs = itertools.chain.from_iterable(itertools.repeat(resumed))
        found = list(itertools.islice(epochs, len(rest)))
        assert all(map(same, found, rest)) and len(found) == len(rest), f"after batch {at}"


def test_state_is_small_and_resuming_reads_nothing_again():
    docs = random_documents(20_000, 60)

    class Counting(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    stream = PackedStream(Counting(docs), 512, batch_size=2)
    batches = list(itertools.islice(stream, 400))
    state = stream.state_dict()
    assert sum(t.nbytes for t in state["window"].values() if isinstance(t, torch.Tensor)) < 2e6
    counting = Counting(docs)
    iterator = iter(_resumed(counting, state))
    again = next(iterator)
    time.sleep(0.5)  # until the thread waits
    read = counting.read
    assert same(again, next(iter(_resumed(docs, state)))) and not any(
        same(again, b) for b in batches
    )
    # At most the windows that are ready and being made; far fewer than before the place.
    assert 0 < read <= 2 * 4096 < state["window"]["place"]["rows"]
    iterator.close()


def _resumed(dataset, state):
    stream = PackedStream(dataset, 512, batch_size=2)
    stream.load_state_dict(state)
    return stream


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_rows_of_one_process(monkeypatch, world_size):
    small_windows(monkeypatch)
    docs = random_documents(300, 60)
    alone = list(PackedStream(docs, 64, batch_size=2 * world_size))
    ranks = [
        list(PackedStream(docs, 64, batch_size=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for step, whole in enumerate(alone[:-1]):
        together = Counter(itertools.chain(*(parts(batches[step]) for batches in ranks)))
        assert together == Counter(parts(whole))
    everything = Counter(part for batches in ranks for batch in batches for part in parts(batch))
    assert everything <= Counter(expected(docs))


def test_resumes_with_another_number_of_ranks(monkeypatch):
    small_windows(monkeypatch)
    docs = random_documents(300, 60)
    rows = list(PackedStream(docs, 64))
    two = PackedStream(docs, 64, batch_size=2, rank=1, world_size=2)
    iterator = iter(two)
    for _ in range(9):
        next(iterator)
    state = two.state_dict()
    one = PackedStream(docs, 64)
    one.load_state_dict(state)
    rest = list(one)
    assert len(rest) == len(rows) - 9 * 4
    assert all(map(same, rest, rows[36:]))
    del iterator


def test_ranks_take_equally_long():
    rng = np.random.default_rng(1)
    docs = documents([*rng.integers(1, 40, 4000), *rng.integers(200, 256, 200)])
    rng.shuffle(docs)

    def costs(rank):
        stream = PackedStream(docs, 256, batch_size=8, rank=rank, world_size=2)
        return [sum(len(ids) ** 2 for ids, _, _ in parts(batch)) for batch in stream]

    first, second = np.array(costs(0)[:-1]), np.array(costs(1)[:-1])
    # Dealt as they come, they differ by a third.
    assert np.abs(first - second).mean() < 0.15 * first.mean()


def test_epochs_differ_and_can_be_chosen():
    docs = random_documents(100, 40)
    stream = PackedStream(docs, 64)
    epochs = [list(stream) for _ in range(2)]
    assert not same(epochs[0][0], epochs[1][0])
    for batches in epochs:
        assert Counter(itertools.chain(*map(parts, batches))) == Counter(expected(docs))
    stream.set_epoch(1)
    next(iter(stream))  # given up, an epoch begins again
    assert all(map(same, stream, epochs[1]))


def test_reads_no_further_ahead_than_three_windows():
    dataset = Endless(itertools.cycle([document(20)]))
    iterator = iter(PackedStream(dataset, 64))
    next(iterator)
    time.sleep(0.5)
    assert dataset.given <= 256 + 512 + 1024
    iterator.close()
    assert not threads()


def test_long_documents_are_counted(caplog):
    docs = documents([10, 300, 70, 0])
    for overflow, words in (
        ("split", "full; 2 documents split; 1 documents (0 tokens) dropped. It took"),
        ("truncate", "full; 242 tokens truncated; 1 documents (0 tokens) dropped. It took"),
        ("drop", "full; 3 documents (370 tokens) dropped. It took"),
    ):
        with caplog.at_level(logging.WARNING, logger="barqtrain_hf.data.stream"):
            caplog.clear()
            batches = list(PackedStream(docs, 64, overflow=overflow))
        assert words in caplog.text
        kept = sum(batch["input_ids"].shape[1] for batch in batches)
        assert kept == {"split": 380, "truncate": 138, "drop": 10}[overflow]
    with pytest.raises(DataError, match="2 documents longer than max_length=64; the longest, docu"):
        list(PackedStream(docs, 64))


def test_an_error_of_the_data_comes_out_and_stops_the_thread():
    def broken():
        yield from random_documents(600, 40)
        raise KeyError("row 600")

    stream = PackedStream(broken(), 64)
    with pytest.raises(KeyError, match="row 600"):
        for _ in stream:
            pass
    assert not threads()
    bad = [*random_documents(300, 40), {"input_ids": [1]}]
    with pytest.raises(DataError, match=r"dataset\[300\] has no labels"):
        list(PackedStream(bad, 64))


def test_workers_and_forks_are_refused():
    stream = PackedStream(random_documents(2000, 40), 64)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)
    with pytest.raises(UnsupportedError, match=r"num_workers=0 \(dataloader_num_workers=0\)"):
        next(iter(loader))
    iterator = iter(stream)
    first = next(iterator)

    def read(results):
        try:
            list(iterator)
        except UnsupportedError as error:
            results.put(str(error))
        results.put(len(parts(next(iter(stream)))))

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=read, args=(results,))
    child.start()
    assert "made before a fork" in results.get(timeout=30)
    assert results.get(timeout=30) > 0, "a new iterator works in the child"
    child.join(30)
    assert child.exitcode == 0
    assert same(next(iter(torch.utils.data.DataLoader(stream, batch_size=None))), first)
    assert not same(next(iterator), first)


_READER = """
import atexit, signal, sys, time, threading
# Where a shell has put the suite in the background, SIGINT is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Called after all that was registered later: ours, which waits for the thread.
atexit.register(lambda: print("left at", time.monotonic(), file=sys.stderr))
sys.path[:0] = sys.argv[2:]
from barqtrain_hf.data import PackedStream

class Data:
    def __iter__(self):
        for number in range(10**9):
            if sys.argv[1] == "blocked" and number == 1000:
                print("blocked", flush=True)
                threading.Event().wait()
            yield {"input_ids": [number] * 20, "labels": [1] * 20}

iterator = iter(PackedStream(Data(), 64))
next(iterator)
if sys.argv[1] == "interrupted":
    print("ready", flush=True)
    for batch in iterator:
        time.sleep(0.01)
if sys.argv[1] == "blocked":
    time.sleep(0.3)
print("leaving", flush=True)
"""


@pytest.mark.parametrize("how", ["leaving", "blocked", "interrupted"])
def test_the_interpreter_ends_within_seconds(how):
    process = subprocess.Popen(
        [sys.executable, "-c", _READER, how, *filter(None, sys.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    while how == "blocked" and line != "leaving\n":
        line = process.stdout.readline()
    started = time.monotonic()
    if how == "interrupted":
        process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    # A second for the thread, and some for a busy machine; what unloading torch takes comes after.
    left = re.search(r"left at (\S+)", errors)
    assert left is not None and float(left[1]) - started < 3, errors
    assert process.returncode == {"interrupted": -signal.SIGINT}.get(how, 0), errors
    assert "Fatal" not in errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 0}, ArgumentError, "max_length is 0: pass a positive"),
        ({"batch_size": 0}, ArgumentError, "batch_size is 0: pass a positive"),
        ({"rank": 2, "world_size": 2}, ArgumentError, "rank is 2: pass 0 to world_size - 1 = 1"),
        ({"overflow": "wrap"}, ArgumentError, "overflow is 'wrap': choose one of error, split"),
        ({"seed": -1}, ArgumentError, "seed is -1: pass zero or"),
        ({"seed": 2**64}, ArgumentError, r"seed is 18446744073709551616: .* below 2\*\*64"),
        ({"seed": "a"}, ArgumentTypeError, r"seed is 'a' \(str\): pass zero"),
        ({"dataset": 3}, ArgumentTypeError, "dataset is a int, which cannot be iterated over"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        PackedStream(**{"dataset": [], "max_length": 8, **options})


def test_bad_epochs_are_refused():
    stream = PackedStream(documents([3]), 8)
    with pytest.raises(ArgumentError, match="epoch is -1: pass zero"):
        stream.set_epoch(-1)
    with pytest.raises(ArgumentTypeError, match=r"epoch is 1\.5 \(float\)"):
        stream.set_epoch(1.5)


def test_nothing_to_read_is_refused():
    for dataset in ([], [document(0)]):
        with pytest.raises(DataError, match="dataset has no documents with tokens"):
            list(PackedStream(dataset, 8))
    once = PackedStream(iter(documents([3])), 8)
    assert len(list(once)) == 1
    with pytest.raises(DataError, match="is an iterator that was read before"):
        list(once)
