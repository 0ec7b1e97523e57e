"""PackedDataset: no token is lost unsaid, whatever the source looks like."""

import logging
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import small_tokenizer

from barqtrain_hf.data import BarqDataCollator, PackedDataset, PackedStream, tokenize
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError


def document(length, first=0):
    """Tokens that tell where they come from, and labels that differ from them."""
    tokens = list(range(first, first + length))
    return {"input_ids": tokens, "labels": [token + 1_000_000 for token in tokens]}


def documents(lengths):
    return [document(length, 1000 * index) for index, length in enumerate(lengths)]


def unpack(packed):
    """The documents of all rows, as (input_ids, labels) tuples."""
    found = []
    for index in range(len(packed)):
        row = packed[index]
        sizes = row["seq_lengths"].tolist()
        for ids, labels, positions in zip(
            row["input_ids"].split(sizes),
            row["labels"].split(sizes),
            row["position_ids"].split(sizes),
            strict=True,
        ):
            assert positions.tolist() == list(range(len(ids)))
            found.append((tuple(ids.tolist()), tuple(labels.tolist())))
    return found


def expected(docs):
    """What `unpack` finds when nothing was lost: only first labels are masked."""
    return [(tuple(d["input_ids"]), (-100, *d["labels"][1:])) for d in docs]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.integers(64, 200))
def test_every_document_comes_out_once_and_whole(lengths, max_length):
    docs = documents(lengths)
    packed = PackedDataset(docs, max_length)
    assert Counter(unpack(packed)) == Counter(expected(docs))
    assert packed.lengths.tolist() == [len(packed[i]["input_ids"]) for i in range(len(packed))]
    assert packed.lengths.max() <= max_length
    assert packed.num_documents == len(lengths)
    assert packed.num_tokens == sum(lengths)
    assert packed.fill == pytest.approx(sum(lengths) / (len(packed) * max_length))


def test_a_row_is_int64_tensors():
    row = PackedDataset(documents([3, 2]), 5)[0]
    assert list(row) == ["input_ids", "labels", "position_ids", "seq_lengths"]
    assert row["input_ids"].tolist() == [0, 1, 2, 1000, 1001]
    assert row["labels"].tolist() == [-100, 1000001, 1000002, -100, 1001001]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert row["seq_lengths"].tolist() == [3, 2]
    assert {tensor.dtype for tensor in row.values()} == {torch.int64}


def test_indices_behave_like_those_of_a_list():
    packed = PackedDataset(documents([5, 5, 5]), 5)
    assert len(packed) == 3
    assert packed[-1]["input_ids"].equal(packed[2]["input_ids"])
    assert packed[np.int64(1)]["input_ids"].equal(packed[1]["input_ids"])
    for index in (3, -4):
        with pytest.raises(IndexError, match="with 3 rows"):
            packed[index]
    assert len(list(packed)) == 3  # the old iteration protocol ends at IndexError


def test_writing_to_an_item_leaves_the_data_alone():
    packed = PackedDataset(documents([3, 2]), 5)
    packed[0]["input_ids"].zero_()
    packed[0]["seq_lengths"].zero_()
    assert packed[0]["input_ids"].tolist() == [0, 1, 2, 1000, 1001]
    assert packed[0]["seq_lengths"].tolist() == [3, 2]


def test_rows_are_shuffled_by_seed_alone():
    docs = documents(range(1, 100))

    def order(seed):
        return [tuple(row["seq_lengths"].tolist()) for row in PackedDataset(docs, 100, seed=seed)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))
    # Packing emits rows of few, long documents first; shuffled, the count must not be sorted.
    counts = [len(row) for row in order(0)]
    assert counts != sorted(counts)


def test_the_shuffle_is_the_same_on_every_machine():
    packed = PackedDataset(documents([5] * 8), 5, seed=3)
    assert [int(row["input_ids"][0]) // 1000 for row in packed] == [4, 0, 2, 3, 1, 7, 5, 6]


def test_an_epoch_is_packed_anew_into_as_many_rows():
    docs = documents([3 + index % 40 for index in range(300)])
    packed = PackedDataset(docs, 100, seed=1)
    first, fill = unpack(packed), packed.fill
    rows = {0: {tuple(row["input_ids"].tolist()) for row in packed}}
    for epoch in (1, 2):
        packed.repack(epoch)
        assert Counter(unpack(packed)) == Counter(expected(docs))
        assert packed.lengths.tolist() == [len(row["input_ids"]) for row in packed]
        assert packed.fill == fill
        rows[epoch] = {tuple(row["input_ids"].tolist()) for row in packed}
        assert len(rows[epoch]) == len(rows[0])
        assert len(rows[epoch] & rows[epoch - 1]) < len(rows[0]) // 2
    packed.repack(0)
    assert unpack(packed) == first
    with pytest.raises(ArgumentError, match="epoch is -1"):
        packed.repack(-1)


def test_split_keeps_every_token():
    docs = documents([10, 3, 25])
    packed = PackedDataset(docs, 10, overflow="split")
    pieces = [document(10, 2000), document(10, 2010), document(5, 2020)]
    assert Counter(unpack(packed)) == Counter(expected([*docs[:2], *pieces]))
    assert (packed.num_documents, packed.num_tokens) == (3, 38)
    assert (packed.split_documents, packed.truncated_tokens) == (1, 0)
    assert (packed.dropped_documents, packed.dropped_tokens) == (0, 0)


def test_truncate_keeps_the_start():
    docs = documents([10, 3, 25])
    packed = PackedDataset(docs, 10, overflow="truncate")
    assert Counter(unpack(packed)) == Counter(expected([*docs[:2], document(10, 2000)]))
    assert (packed.num_documents, packed.num_tokens) == (3, 23)
    assert (packed.split_documents, packed.truncated_tokens) == (0, 15)
    assert (packed.dropped_documents, packed.dropped_tokens) == (0, 0)


def test_drop_leaves_out_the_whole_document():
    docs = documents([10, 25, 3])
    packed = PackedDataset(docs, 10, overflow="drop")
    assert Counter(unpack(packed)) == Counter(expected([docs[0], docs[2]]))
    assert (packed.num_documents, packed.num_tokens) == (2, 13)
    assert (packed.split_documents, packed.truncated_tokens) == (0, 0)
    assert (packed.dropped_documents, packed.dropped_tokens) == (1, 25)


def test_documents_without_tokens_are_counted():
    docs = documents([0, 4, 0, 6])
    packed = PackedDataset(docs, 10)
    assert Counter(unpack(packed)) == Counter(expected([docs[1], docs[3]]))
    assert (packed.num_documents, packed.dropped_documents, packed.dropped_tokens) == (2, 2, 0)


def test_losses_are_logged_once_as_a_warning(caplog):
    with caplog.at_level(logging.INFO, logger="barqtrain_hf.data.dataset"):
        PackedDataset(documents([4, 6]), 10)
        PackedDataset(documents([4, 16]), 10, overflow="truncate")
    assert [
        (record.levelname, re.sub(r"It took \d+\.\d s\.$", "Seconds.", record.getMessage()))
        for record in caplog.records
    ] == [
        ("INFO", "Packed 2 documents (10 tokens) into 1 rows of 10, 100.00% full. Seconds."),
        (
            "WARNING",
            "Packed 2 documents (14 tokens) into 2 rows of 10, 70.00% full; 6 tokens truncated. Seconds.",
        ),
    ]


def test_summary_names_every_kind_of_loss():
    assert (
        PackedDataset(documents([0, 4, 16]), 10, overflow="drop")
        .summary()
        .endswith("; 2 documents (16 tokens) dropped.")
    )
    assert (
        PackedDataset(documents([4, 16]), 10, overflow="split")
        .summary()
        .endswith("; 1 documents split.")
    )


def as_tensors(docs):
    return [{key: torch.tensor(values) for key, values in doc.items()} for doc in docs]


def as_arrays(docs):
    return [{key: np.array(values, np.int32) for key, values in doc.items()} for doc in docs]


class MapStyle(torch.utils.data.Dataset):
    def __init__(self, docs):
        self.docs = docs

    def __len__(self):
        return len(self.docs)

    def __getitem__(self, index):
        return self.docs[index]


@pytest.mark.parametrize("source", [as_tensors, as_arrays, MapStyle])
def test_sources_other_than_lists(source):
    docs = documents([7, 1, 30, 0, 12])
    packed = PackedDataset(source(docs), 32)
    assert Counter(unpack(packed)) == Counter(expected([doc for doc in docs if doc["labels"]]))


class TestHuggingFace:
    """`datasets.Dataset` in the forms people hold it in."""

    @pytest.fixture(scope="class")
    def datasets(self):
        return pytest.importorskip("datasets")

    DOCS = documents([7, 1, 30, 0, 12, 9])

    def check(self, dataset, docs):
        assert dataset[0].keys() >= {"input_ids", "labels"}
        docs = [doc for doc in docs if doc["labels"]]
        assert Counter(unpack(PackedDataset(dataset, 32))) == Counter(expected(docs))

    @pytest.mark.parametrize("format", [None, "torch", "numpy", "arrow"])
    def test_formats(self, datasets, format):
        dataset = datasets.Dataset.from_list(self.DOCS)
        packed = PackedDataset(dataset.with_format(format), 32)
        docs = [doc for doc in self.DOCS if doc["labels"]]
        assert Counter(unpack(packed)) == Counter(expected(docs))

    def test_shuffled_and_selected(self, datasets):
        dataset = datasets.Dataset.from_list(self.DOCS).select([4, 2, 0])
        self.check(dataset, [self.DOCS[0], self.DOCS[2], self.DOCS[4]])

    def test_list_types(self, datasets):
        integer = datasets.Value("int64")
        docs = documents([5, 5, 5])
        for feature in (datasets.LargeList(integer), datasets.Sequence(integer, length=5)):
            features = datasets.Features({"input_ids": feature, "labels": feature})
            self.check(datasets.Dataset.from_list(docs, features=features), docs)

    def test_more_rows_than_one_read(self, datasets, monkeypatch):
        monkeypatch.setattr("barqtrain_hf.data.dataset._ROWS_PER_READ", 4)
        self.check(datasets.Dataset.from_list(self.DOCS), self.DOCS)

    def test_columns_made_on_the_fly(self, datasets):
        text = datasets.Dataset.from_dict({"row": [0, 1, 2]})
        made = text.with_transform(
            lambda batch: {
                key: [self.DOCS[row][key] for row in batch["row"]] for key in self.DOCS[0]
            }
        )
        self.check(made, self.DOCS[:3])

    def test_padding_is_cut_off(self, datasets):
        padded = [
            {
                "input_ids": [0] * left + doc["input_ids"] + [0] * right,
                "labels": [-100] * left + doc["labels"] + [-100] * right,
                "attention_mask": [0] * left + [1] * len(doc["labels"]) + [0] * right,
            }
            for doc, left, right in zip(self.DOCS[:3], [0, 5, 2], [3, 0, 1], strict=True)
        ]
        self.check(datasets.Dataset.from_list(padded), self.DOCS[:3])
        unpadded = [{**doc, "attention_mask": [1] * len(doc["labels"])} for doc in self.DOCS]
        self.check(datasets.Dataset.from_list(unpadded), self.DOCS)

    def test_packed_rows_stay_apart(self, datasets):
        first, second = self.DOCS[0], self.DOCS[2]
        row = {key: first[key] + second[key] for key in first}
        by_length = datasets.Dataset.from_list([{**row, "seq_lengths": [7, 30]}])
        assert Counter(unpack(PackedDataset(by_length, 40))) == Counter(expected([first, second]))
        by_position = datasets.Dataset.from_list([{**row, "position_ids": [*range(7), *range(30)]}])
        assert Counter(unpack(PackedDataset(by_position, 40))) == Counter(expected([first, second]))

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({"input_ids": [[1]]}, r"dataset\[0\] has no labels: add labels, equal to input_ids"),
            ({"labels": [[1]]}, r"dataset\[0\] has no input_ids: tokenize"),
            ({"text": ["a"]}, r"dataset\[0\] has no input_ids: tokenize"),
            (
                {"input_ids": [[1], [2]], "labels": [[1], None]},
                r"dataset\[1\] has no labels",
            ),
            (
                {"input_ids": [[1], [2]], "labels": [[1], [None]]},
                r"dataset\[1\] has labels of shape \(1,\) and dtype object",
            ),
            ({"input_ids": ["a"], "labels": [[1]]}, r"dataset\[0\] has input_ids of shape \(\)"),
            (
                {"input_ids": [[1, 2], [3]], "labels": [[1], [2, 3]]},
                r"dataset\[0\] has 1 labels for 2 input_ids",
            ),
            (
                {"input_ids": [[1], [2]], "labels": [[1], [2]], "attention_mask": [[1, 1], [1]]},
                r"dataset\[0\] has 2 attention_mask for 1 input_ids",
            ),
        ],
    )
    def test_refusals_name_the_row(self, datasets, rows, message):
        with pytest.raises(DataError, match=message):
            PackedDataset(datasets.Dataset.from_dict(rows), 8)


GOOD = document(3)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "dataset is empty"),
        ([GOOD, {"input_ids": [1]}], r"dataset\[1\] has no labels: add labels, equal to input_ids"),
        ([{"labels": [1]}], r"dataset\[0\] has no input_ids: tokenize"),
        ([[1, 2, 3]], r"dataset\[0\] is a list: pass dicts"),
        (
            [GOOD, {"input_ids": [1, 2], "labels": [1]}],
            r"dataset\[1\] has 1 labels for 2 input_ids",
        ),
        ([{"input_ids": [0.5], "labels": [1]}], r"dataset\[0\] has input_ids .* dtype float64"),
        ([{"input_ids": torch.ones(1, 3).long(), "labels": [1]}], r"input_ids of shape \(1, 3\)"),
        ([{"input_ids": [-1], "labels": [1]}], "dataset has -1 among its input_ids"),
        ([{"input_ids": [2**31], "labels": [1]}], "dataset has 2147483648 among its input_ids"),
        ([{"input_ids": [1], "labels": [-1]}], "dataset has -1 among its labels"),
        ([document(0)], r"dataset has 1 documents and none is left .* \(1 dropped\)"),
        (
            [GOOD, document(9), document(12)],
            "2 documents longer than max_length=8; the longest, document 2, has 12 tokens: "
            "pass overflow='split'",
        ),
    ],
)
def test_bad_data_is_refused(dataset, message):
    with pytest.raises(DataError, match=message):
        PackedDataset(dataset, 8)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="max_length is 0"):
        PackedDataset([GOOD], 0)
    with pytest.raises(ArgumentError, match="overflow is 'wrap': choose one of error, split"):
        PackedDataset([GOOD], 8, overflow="wrap")
    for seed, error, message in (
        (-1, ArgumentError, "seed is -1: pass zero or"),
        (2**64, ArgumentError, r"seed is 18446744073709551616: .* below 2\*\*64"),
        ("a", ArgumentTypeError, r"seed is 'a' \(str\): pass zero"),
    ):
        with pytest.raises(error, match=message):
            PackedDataset([GOOD], 8, seed=seed)
    packed = PackedDataset([GOOD], 8)
    with pytest.raises(ArgumentTypeError, match=r"epoch is 1\.5 \(float\): pass zero"):
        packed.repack(1.5)
    with pytest.raises(ArgumentError, match=r"pad_token_id is \d+: .* below 2\*\*31"):
        packed.batch([0], 8, 2**70)
    with pytest.raises(ArgumentError, match=r"pad_token_id is \d+: .* below 2\*\*31"):
        BarqDataCollator(8, 2**70)
    with pytest.raises(ArgumentTypeError, match="dataset is a generator, which has no length"):
        PackedDataset((row for row in [GOOD]), 8)


def test_pickles():
    packed = PackedDataset(documents([3, 9, 4, 4]), 10)
    assert unpack(pickle.loads(pickle.dumps(packed))) == unpack(packed)


def test_workers_deliver_what_one_process_does():
    packed = PackedDataset(documents([3, 9, 4, 4, 8, 2]), 10)

    def batches(workers):
        loader = torch.utils.data.DataLoader(
            packed, batch_size=2, collate_fn=BarqDataCollator(), num_workers=workers
        )
        return [(b["input_ids"].tolist(), b["cu_seq_lens_q"].tolist()) for b in loader]

    assert batches(1) == batches(0)


def test_short_documents_of_all_lengths_share_a_row():
    # Four tasks of one length each, as instruction data has them.
    documents = [
        {"input_ids": [task] * length, "labels": [task] * length}
        for task, length in enumerate((8, 11, 14, 17))
        for _ in range(500)
    ]
    packed = PackedDataset(documents, 512)
    assert len(packed) <= -(-packed.num_tokens // 512) + 1
    for row in filter(lambda row: len(row["input_ids"]) > 400, packed):
        counts = torch.bincount(row["input_ids"], minlength=4)
        assert (counts > 0).all(), "a row without one of the tasks"


def test_mixing_costs_almost_no_fill():
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(396) - 0.5, 1.0, 20_000).clip(1, 4096).astype(np.int64)
    flat = np.zeros(lengths.max(), dtype=np.int64)
    documents = [{"input_ids": flat[:n], "labels": flat[:n]} for n in lengths]
    assert PackedDataset(documents, 4096).fill > 0.999


def test_each_says_in_a_line_what_it_is(tmp_path):
    texts = ["one text", "and another one"] * 3
    store = tokenize(texts, small_tokenizer(), tmp_path / "texts.barq")
    packed = PackedDataset(store, 64)
    size = f"6 documents, {packed.num_tokens} tokens"
    assert repr(store) == f"<TokenStore texts.barq: {size}>"
    assert repr(packed) == f"<PackedDataset {size} in 1 rows of 64, {packed.fill:.1%} full>"
    stream = PackedStream(texts, 16, tokenizer=small_tokenizer(), batch_size=2)
    begin = "<PackedStream 6 documents in batches of 2 rows of 16; rank 0 of 1, epoch 0 after"
    assert repr(stream) == f"{begin} 0 rows>"
    next(iter(stream))
    assert repr(stream) == f"{begin} 2 rows>"
    assert "PackedStream documents in batches" in repr(PackedStream(iter(texts), 16))
