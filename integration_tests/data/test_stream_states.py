"""States of a PackedStream, what it counts, and which rank it is."""

import itertools
import logging
import re
import types
from collections import Counter

import pytest
import torch
from small_tokenizers import small_tokenizer
from streams import document, documents, expected, parts, random_documents, same, small_windows

from barqtrain_hf.data import PackedDataset, PackedStream, tokenize
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError


def test_a_state_of_something_else_is_refused():
    state = PackedStream(documents([3]), 8).state_dict()
    for options in ({"max_length": 16}, {"seed": 1}, {"overflow": "drop"}):
        (key,) = options
        with pytest.raises(ArgumentError, match=f"{key} is .* here and .* in the state: resume"):
            PackedStream(documents([3]), **{"max_length": 8, **options}).load_state_dict(state)
    with pytest.raises(ArgumentError, match="tokens is"):
        PackedStream(["a"], 8, tokenizer=small_tokenizer()).load_state_dict(state)
    del state["row"], state["window"]
    with pytest.raises(
        DataError, match=r"state lacks row, window: pass what state_dict\(\) return"
    ):
        PackedStream(documents([3]), 8).load_state_dict(state)


def middle(docs, batches=5):
    stream = PackedStream(docs, 64)
    iterator = iter(stream)
    for _ in range(batches):
        next(iterator)
    iterator.close()
    return stream.state_dict()


def test_a_state_of_other_documents_is_refused():
    docs = random_documents(100, 30)
    with pytest.raises(ArgumentError, match="documents is 90 here and 100 in the state"):
        PackedStream(docs[:90], 64).load_state_dict(middle(docs))
    rows = [{"a": "x", "b": "y"}]
    by_a, by_b = (
        PackedStream(rows, 16, tokenizer=small_tokenizer(), text_column=key) for key in "ab"
    )
    with pytest.raises(ArgumentError, match="text_column is 'b' here and 'a' in the state"):
        by_b.load_state_dict(by_a.state_dict())


def test_another_fingerprint_is_warned_of(caplog):
    datasets = pytest.importorskip("datasets")
    docs = random_documents(100, 30)
    rows, others = (datasets.Dataset.from_list(part) for part in (docs, docs[::-1]))
    state = middle(rows)
    PackedStream(datasets.Dataset.from_list(docs), 64).load_state_dict(state)
    assert "fingerprint" not in caplog.text
    PackedStream(others, 64).load_state_dict(state)
    assert f"the fingerprint {others._fingerprint} here and {rows._fingerprint} in" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: None, r"state is a NoneType: pass what state_dict\(\) returned"),
        (lambda state: {**state, "row": "x"}, "row is 'x'"),
        (lambda state: {**state, "row": 10**6}, "row is 1000000 in the state of a window with"),
        (lambda state: {**state, "row": 3, "window": None}, "row is 3 .* window with 0 rows"),
        (lambda state: {**state, "epoch": -1}, "epoch is -1"),
        (lambda state: {**state, "window": 5}, "window in state is not what state_dict"),
        (lambda state: {**state, "window": {}}, r"not what state_dict\(\) returned \(KeyError"),
        (lambda state: _in_window(state, labels=torch.ones(3)), "that do not go together"),
        (lambda state: _in_window(state, lengths=None), "AttributeError"),
        (lambda state: _in_window(state, begins=torch.ones(3)), "that do not go together"),
        (lambda state: _in_window(state, losses=[1]), "ValueError"),
        (lambda state: _in_window(state, before=[1]), "TypeError"),
        (
            lambda state: _in_window(state, place={"rows": 101, "state": None}),
            "ends at row 101 of 100",
        ),
        (lambda state: _in_window(state, place=None), "TypeError"),
    ],
)
def test_damaged_states_are_refused(change, message):
    docs = random_documents(100, 30)
    stream = PackedStream(docs, 64)
    with pytest.raises(DataError, match=message):
        stream.load_state_dict(change(middle(docs)))
    assert Counter(itertools.chain(*map(parts, stream))) == Counter(expected(docs)), "as before"


def _in_window(state, **changes):
    return {**state, "window": {**state["window"], **changes}}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_after_the_last_batch_comes_the_next_epoch(monkeypatch, world_size):
    small_windows(monkeypatch)
    # 40 documents end with a window; after 41 to 43 the last one has fewer rows than some ranks; the
    # last window of 20 empty documents has no rows.
    for lengths in [[64] * 40, [64] * 41, [64] * 43, [64] * 40 + [0] * 20]:
        options = {"batch_size": 1, "rank": 0, "world_size": world_size}
        stream = PackedStream(documents(lengths), 64, **options)
        epochs = [[], []]
        for batches in epochs:
            for batch in stream:
                batches.append((batch, stream.state_dict()))
        state = epochs[0][-1][1]
        assert (state["epoch"], state["row"], state["window"]) == (1, 0, None)
        assert epochs[0][-2][1]["epoch"] == 0
        again = PackedStream(documents(lengths), 64, **options)
        again.load_state_dict(state)
        whole = list(again)
        assert len(whole) == len(epochs[1])
        assert all(same(batch, other) for batch, (other, _) in zip(whole, epochs[1], strict=True))


def test_a_state_with_fewer_rows_left_than_ranks_begins_the_next_epoch():
    docs = documents([64] * 10)
    state = middle(docs, 9)
    stream = PackedStream(docs, 64, rank=1, world_size=2)
    stream.load_state_dict(state)
    assert len(list(stream)) == 5 and stream.state_dict()["epoch"] == 2


def test_losses_are_counted_while_they_happen(monkeypatch, caplog):
    small_windows(monkeypatch)
    stream = PackedStream(documents([10, 300] + [64] * 4000), 64, overflow="truncate")
    with caplog.at_level(logging.WARNING, logger="barqtrain_hf.data.stream"):
        iterator = iter(stream)
        assert stream.losses["num_documents"] == 0
        for _ in range(200):
            next(iterator)
    assert stream.losses["truncated_tokens"] == 236
    assert 200 <= stream.losses["num_documents"] < 400
    (record,) = caplog.records
    assert "Of the first 8 documents: 236 tokens truncated." in record.getMessage()
    iterator.close()


def logged(caplog):
    """What a stream logged, without the seconds."""
    return [re.sub(r"\d+\.\d s", "T s", message) for message in caplog.messages]


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_epoch_ends_with_a_line_about_it(monkeypatch, caplog, batch_size):
    """In the words of PackedDataset, and the same after the epoch was resumed in its middle."""
    small_windows(monkeypatch)
    docs = [*random_documents(150, 90), document(0)]
    options = {"overflow": "split", "batch_size": batch_size}
    stream, states, tokens = PackedStream(docs, 64, **options), [], 0
    rows = len(list(PackedStream(docs, 64, overflow="split")))
    with caplog.at_level(logging.INFO, logger="barqtrain_hf.data.stream"):
        caplog.clear()
        for batch in stream:
            states.append(stream.state_dict())
            tokens += batch["input_ids"].shape[1]
        lost, line = logged(caplog)
        assert re.fullmatch(r"Of the first 8 documents: \d+ documents split\. .* counts on\.", lost)
        packed = PackedDataset(docs, 64, overflow="split")
        rows, fill = f"into {rows:,} rows", f"{tokens / (64 * rows):.2%} full"
        words = re.sub(r"into .* rows", rows, re.sub(r"\S+% full", fill, packed.summary()))
        assert line == f"Epoch 0: {words} It took T s, of which T s were spent waiting for rows."
        assert (
            "(7,003 tokens)" in words and "150 documents" in words and packed.num_tokens == tokens
        )
        for state in states[: -1 : len(states) // 4]:
            caplog.clear()
            again = PackedStream(docs, 64, **options)
            again.load_state_dict(state)
            list(again)
            assert logged(caplog)[-1] == line


def test_rows_left_out_are_counted(caplog):
    stream = PackedStream(documents([64] * 10), 64, rank=0, world_size=4, batch_size=1)
    assert len(list(stream)) == 2
    assert stream.losses == {
        "num_documents": 10,
        "split_documents": 0,
        "truncated_tokens": 0,
        "dropped_documents": 0,
        "dropped_tokens": 0,
        "left_out_rows": 2,
    }
    assert "The last 2 rows are fewer than the 4 ranks and are left out" in caplog.text


def test_the_rank_is_found_out(monkeypatch):
    docs = documents([64] * 10)

    def rank(**options):
        stream = PackedStream(docs, 64, **options)
        return stream.rank, stream.world_size

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank() == (1, 4)
    assert rank(rank=0, world_size=1) == (0, 1)
    group = types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_rank=lambda: 5,
        get_world_size=lambda: 8,
    )
    with monkeypatch.context() as context:
        context.setattr(torch, "distributed", group)
        assert rank() == (5, 8)
    with pytest.raises(ArgumentError, match="rank is None and world_size is 2: pass both"):
        rank(world_size=2)
    with pytest.raises(ArgumentTypeError, match=r"rank is '0' \(str\): pass zero or a positive"):
        rank(rank="0", world_size=2)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ArgumentError, match="RANK is 'first' and WORLD_SIZE is '4' in the envir"):
        rank()


CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
LONG = "a b c d e f " * 40


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": LONG, "completion": "yes"},
        {"messages": [{"role": "user", "content": LONG}]},
        {
            "prompt": [{"role": "user", "content": LONG}],
            "completion": [{"role": "assistant", "content": "yes"}],
        },
    ],
)
def test_only_plain_text_is_split_by_default(row):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHAT
    with pytest.raises(DataError, match="1 documents longer than max_length=64"):
        list(PackedStream([row], 64, tokenizer=tokenizer))
    stream = PackedStream([{"text": LONG}], 64, tokenizer=tokenizer)
    assert len(list(stream)) > 1 and stream.losses["split_documents"] == 1


@pytest.mark.parametrize("overflow", ["split", "truncate"])
def test_pieces_without_loss_are_left_out(overflow):
    ids = list(range(1, 301))
    docs = [
        {"input_ids": ids, "labels": [-100] * 280 + ids[280:]},
        {"input_ids": ids, "labels": [-100] * 300},
        {"input_ids": ids, "labels": [-100, 2, *[-100] * 298]},
        {"input_ids": ids[:10], "labels": [-100] * 10},  # not cut: it is what was asked for
        {"input_ids": ids[:129], "labels": ids[:129]},  # the last piece is one token
    ]
    pieces = {
        "split": {
            (tuple(ids[256:]), (*[-100] * 24, *ids[280:])),
            (tuple(ids[:64]), (-100, 2, *[-100] * 62)),
            (tuple(ids[:10]), (-100,) * 10),
            (tuple(ids[:64]), (-100, *ids[1:64])),
            (tuple(ids[64:128]), (-100, *ids[65:128])),
        },
        "truncate": {
            (tuple(ids[:64]), (-100, 2, *[-100] * 62)),
            (tuple(ids[:10]), (-100,) * 10),
            (tuple(ids[:64]), (-100, *ids[1:64])),
        },
    }[overflow]
    stream = PackedStream(docs, 64, overflow=overflow)
    found = [part[:2] for batch in stream for part in parts(batch)]
    assert len(found) == len(pieces) and set(found) == pieces
    packed = PackedDataset(docs, 64, overflow=overflow)
    rows = [part[:2] for at in range(len(packed)) for part in parts(packed.batch([at]))]
    assert len(rows) == len(pieces) and set(rows) == pieces
    losses = stream.losses
    for name in losses.keys() - {"left_out_rows"}:
        assert losses[name] == getattr(packed, name), name
    expected = {
        "split": {"num_documents": 4, "split_documents": 3, "dropped_documents": 1},
        "truncate": {"num_documents": 3, "split_documents": 0, "dropped_documents": 2},
    }[overflow]
    assert expected.items() <= losses.items()
    tokens = sum(len(ids) for ids, _ in found)
    assert tokens + losses["dropped_tokens"] + losses["truncated_tokens"] == 3 * 300 + 10 + 129


def test_long_prompts_of_a_store_make_no_rows_without_loss(tmp_path):
    rows = [{"prompt": f"{LONG}{number}", "completion": "yes"} for number in range(4)]
    store = tokenize(rows, small_tokenizer(), tmp_path / "store")
    packed = PackedDataset(store, 64, overflow="split")
    assert len(packed) == 4 == packed.split_documents
    assert all((row["labels"] != -100).any() for row in packed)
    assert packed.num_tokens + packed.dropped_tokens == len(store.input_ids)
    assert f"0 documents ({packed.dropped_tokens:,} tokens) dropped" in packed.summary()


def test_a_batch_that_an_error_kept_back_is_still_to_come(monkeypatch):
    small_windows(monkeypatch)
    docs = documents([64] * 24)
    stream = PackedStream([*docs, {"input_ids": [1]}], 64)
    batches = []
    with pytest.raises(DataError, match=r"dataset\[24\] has no labels"):
        for batch in stream:
            batches.append(batch)
    # Windows of 8 and 16 rows; the error is in the third, and came before the last row of the second.
    assert (len(batches), stream.state_dict()["row"]) == (8 + 15, 15)
