"""BarqDataCollator: the batch layout of ARCHITECTURE.md, from whatever a row looks like."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barqtrain_hf.data import BarqDataCollator, PackedDataset
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, DataError


def document(*tokens):
    return {"input_ids": list(tokens), "labels": [token + 100 for token in tokens]}


def as_lists(batch):
    return {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


# Documents (1, 2, 3) and (4, 5), collated.
EXPECTED = {
    "input_ids": [[1, 2, 3, 4, 5]],
    "labels": [[-100, 102, 103, -100, 105]],
    "position_ids": [[0, 1, 2, 0, 1]],
    "cu_seq_lens_q": [0, 3, 5],
    "cu_seq_lens_k": [0, 3, 5],
    "max_length_q": 3,
    "max_length_k": 3,
    "use_cache": False,
}


def test_layout_and_dtypes():
    batch = BarqDataCollator()([document(1, 2, 3), document(4, 5)])
    assert as_lists(batch) == EXPECTED
    for key in ("input_ids", "labels", "position_ids"):
        assert batch[key].dtype == torch.int64
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[key].dtype == torch.int32
    assert type(batch["max_length_q"]) is int
    assert type(batch["max_length_k"]) is int


@pytest.mark.parametrize(
    "convert",
    [
        torch.tensor,
        np.array,
        tuple,
        lambda values: np.array(values, np.uint16).astype(np.int32),
    ],
)
def test_value_types(convert):
    rows = [document(1, 2, 3), document(4, 5)]
    rows = [{key: convert(values) for key, values in row.items()} for row in rows]
    assert as_lists(BarqDataCollator()(rows)) == EXPECTED


def test_unsigned_and_signed_ids_mix():
    rows = [document(1, 2, 3), document(4, 5)]
    rows[0]["input_ids"] = np.array([1, 2, 3], np.uint64)
    assert as_lists(BarqDataCollator()(rows)) == EXPECTED


BOTH = {"input_ids": [1, 2, 3, 4, 5], "labels": [101, 102, 103, 104, 105]}


@pytest.mark.parametrize(
    "row",
    [
        {**BOTH, "seq_lengths": [3, 2]},
        {**BOTH, "seq_lengths": torch.tensor([3, 2])},
        {**BOTH, "seq_lengths": [3, 0, 2]},
        {**BOTH, "position_ids": [0, 1, 2, 0, 1]},
        {**BOTH, "position_ids": [0, 1, 2, 0, 1], "attention_mask": [1] * 5},
        {**BOTH, "position_ids": [7, 8, 9, 3, 4]},
        {**BOTH, "position_ids": [0, 1, 2, 3, 4], "seq_lengths": [3, 2]},
    ],
)
def test_documents_within_a_row(row):
    assert as_lists(BarqDataCollator()([row])) == EXPECTED


def test_padding_is_cut_off():
    left = {
        "input_ids": [9, 9, 1, 2, 3],
        "labels": [-100, -100, 101, 102, 103],
        "attention_mask": [0, 0, 1, 1, 1],
        "position_ids": [1, 1, 0, 1, 2],
    }
    right = {
        "input_ids": [4, 5, 9],
        "labels": [104, 105, -100],
        "attention_mask": torch.tensor([True, True, False]),
    }
    empty = {"input_ids": [9, 9], "labels": [-100, -100], "attention_mask": [0, 0]}
    assert as_lists(BarqDataCollator()([left, empty, right])) == EXPECTED


def test_the_tail_is_one_document_with_positions_of_its_own():
    collate = BarqDataCollator(pad_to_multiple_of=8, pad_token_id=7)
    batch = as_lists(collate([document(1, 2), document(4, 5)]))
    assert batch["input_ids"] == [[1, 2, 4, 5, 7, 7, 7, 7]]
    assert batch["labels"] == [[-100, 102, -100, 105, -100, -100, -100, -100]]
    assert batch["position_ids"] == [[0, 1, 0, 1, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"] == [0, 2, 4, 8]
    assert batch["max_length_q"] == 4


def test_a_full_row_gets_no_tail():
    batch = BarqDataCollator(pad_to_multiple_of=5)([document(1, 2, 3), document(4, 5)])
    assert as_lists(batch) == EXPECTED


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 4),
    st.none() | st.integers(1, 64),
)
def test_packed_rows_give_consistent_batches(lengths, batch_size, multiple):
    docs = [
        document(*range(50 * index, 50 * index + length)) for index, length in enumerate(lengths)
    ]
    packed = PackedDataset(docs, 40)
    batch = BarqDataCollator(pad_to_multiple_of=multiple)(
        [packed[index] for index in range(min(batch_size, len(packed)))]
    )
    edges = batch["cu_seq_lens_q"].tolist()
    tokens = int(packed.lengths[:batch_size].sum())
    assert edges[0] == 0
    assert (
        edges[-1] == batch["input_ids"].shape[1] == -(-tokens // (multiple or 1)) * (multiple or 1)
    )
    assert batch["max_length_q"] == max(np.diff(edges))
    for begin, end in pairwise(edges):
        ids = batch["input_ids"][0, begin:end].tolist()
        assert batch["position_ids"][0, begin:end].tolist() == list(range(end - begin))
        labels = batch["labels"][0, begin:end].tolist()
        if begin < tokens:
            doc = docs[ids[0] // 50]
            assert (ids, labels) == (doc["input_ids"], [-100, *doc["labels"][1:]])
        else:
            assert (set(ids), set(labels)) == ({0}, {-100})


def test_trainer_removing_columns_does_not_join_documents(tmp_path):
    """A stock Trainer takes seq_lengths out of rows before it collates them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=16,
    )
    trainer = transformers.Trainer(
        transformers.LlamaForCausalLM(config),
        transformers.TrainingArguments(
            tmp_path, report_to=[], use_cpu=True, per_device_train_batch_size=2
        ),
        data_collator=BarqDataCollator(),
        train_dataset=PackedDataset([document(1, 2, 3), document(4, 5), document(6, 7, 8, 9)], 5),
    )
    (batch,) = trainer.get_train_dataloader()
    assert sorted(np.diff(batch["cu_seq_lens_q"]).tolist()) == [2, 3, 4]
    assert batch["use_cache"] is False


def test_rows_are_not_written_to():
    row = {key: torch.tensor(values) for key, values in document(1, 2, 3).items()}
    BarqDataCollator()([row])
    assert row["labels"].tolist() == [101, 102, 103]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "features is empty"),
        ([{"input_ids": [], "labels": []}], "features has 1 rows without tokens"),
        (
            [document(1), {"input_ids": [1]}],
            r"features\[1\] has no labels: add labels, equal to input_ids",
        ),
        ([{"labels": [1]}], r"features\[0\] has no input_ids"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"features\[0\] has 1 labels for 2 input_ids"),
        ([{**BOTH, "seq_lengths": [3, 3]}], r"seq_lengths adding up to 6 for 5 tokens"),
        ([{**BOTH, "seq_lengths": [6, -1]}], r"seq_lengths adding up to 5 for 5 tokens"),
        ([{**BOTH, "position_ids": [0]}], r"features\[0\] has 1 position_ids for 5 input_ids"),
        ([{**BOTH, "attention_mask": [1]}], r"features\[0\] has 1 attention_mask for 5"),
        ([{**BOTH, "attention_mask": [1, 0, 1, 1, 1]}], "not ones with padding at the ends"),
        ([{**BOTH, "attention_mask": [1, 1, 2, 2, 2]}], "not ones with padding at the ends"),
        (["text"], r"features\[0\] is a str: pass dicts"),
    ],
)
def test_bad_rows_are_refused(features, message):
    with pytest.raises(DataError, match=message):
        BarqDataCollator()(features)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="pad_to_multiple_of is 0: pass a positive"):
        BarqDataCollator(pad_to_multiple_of=0)
    with pytest.raises(ArgumentTypeError, match="pad_to_multiple_of is '8'"):
        BarqDataCollator(pad_to_multiple_of="8")
    with pytest.raises(ArgumentError, match="pad_token_id is -1"):
        BarqDataCollator(pad_token_id=-1)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_plain_loader_collates_rows_as_ours_does(size, in_parts):
    documents = [document(n, n + 1) for n in range(1, 33, 2)]
    packed = PackedDataset(documents, 4)  # rows of equal length, which could be stacked
    dataset = torch.utils.data.ConcatDataset([packed]) if in_parts else packed
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=size))
    assert len(batches) == 8 // size
    for at, batch in enumerate(batches):
        rows = [packed[at * size + row] for row in range(size)]
        assert as_lists(batch) == as_lists(BarqDataCollator()(rows))
