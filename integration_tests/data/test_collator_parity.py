"""BarqDataCollator gives the tensors of TRL's padding-free collator, byte for byte."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import trl_rows
from small_tokenizers import small_tokenizer

from barqtrain_hf.data import BarqDataCollator, PackedDataset

trainer = pytest.importorskip("trl.trainer.sft_trainer")

OURS = BarqDataCollator(return_seq_idx=True)
KEYS = {
    "input_ids": torch.int64,
    "labels": torch.int64,
    "position_ids": torch.int64,
    "cu_seq_lens_q": torch.int32,
    "cu_seq_lens_k": torch.int32,
    "max_length_q": int,
    "max_length_k": int,
    "seq_idx": torch.int32,
}


def theirs(rows):
    collator = trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return collator([dict(row) for row in rows])


def check_same(ours, expected):
    assert ours.keys() - {"use_cache"} == expected.keys() == KEYS.keys()
    for key, kind in KEYS.items():
        if kind is int:
            assert ours[key] == expected[key] and type(ours[key]) is int
        else:
            assert ours[key].dtype == expected[key].dtype == kind
            assert ours[key].shape == expected[key].shape and ours[key].equal(expected[key])


@st.composite
def rows(draw, packed, masks=()):
    """Rows of one or several documents, some of whose tokens bear no loss."""
    found = []
    for lengths in draw(
        st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=6)
    ):
        total = sum(lengths)
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=total, max_size=total))
        row = {"input_ids": ids, "seq_lengths": lengths}
        bits = st.lists(st.integers(0, 1), min_size=total, max_size=total)
        if masks:
            row |= {key: draw(bits) for key in masks}
        else:
            kept = zip(ids, draw(bits), strict=True)
            row["labels"] = [token if bit else -100 for token, bit in kept]
        if not packed:
            del row["seq_lengths"]
        found.append(row)
    return found


@pytest.mark.parametrize("packed", [True, False])
@settings(deadline=None)
@given(data=st.data())
def test_random_rows(packed, data):
    features = data.draw(rows(packed))
    check_same(OURS(features), theirs(features))


MASKS = [("completion_mask",), ("assistant_masks",), ("completion_mask", "assistant_masks")]


@pytest.mark.parametrize("masks", MASKS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_masks_say_what_trl_makes_labels_of(masks, data):
    """TRL turns masks into labels before it collates: token_id if all(bits) else -100."""
    features = data.draw(rows(True, masks))
    with_labels = []
    for row in features:
        bits = zip(*(row[key] for key in masks), strict=True)
        labels = [
            token if all(b) else -100 for token, b in zip(row["input_ids"], bits, strict=True)
        ]
        with_labels.append(
            {"input_ids": row["input_ids"], "labels": labels, "seq_lengths": row["seq_lengths"]}
        )
    check_same(OURS(features), theirs(with_labels))
    # Labels, where there are any, win, as they do there.
    both = [{**row, **labelled} for row, labelled in zip(features, with_labels, strict=True)]
    check_same(OURS(both), theirs(with_labels))


@settings(deadline=None, max_examples=50)
@given(rows(True), st.integers(1, 40))
def test_padding_is_one_document_behind_what_is_equal(features, multiple):
    expected = theirs(features)
    batch = BarqDataCollator(pad_to_multiple_of=multiple, pad_token_id=7)(features)
    total = expected["input_ids"].shape[1]
    tail = -total % multiple
    assert batch["input_ids"].shape == (1, total + tail)
    for key in ("input_ids", "labels", "position_ids"):
        assert batch[key][:, :total].equal(expected[key])
    assert batch["input_ids"][0, total:].tolist() == [7] * tail
    assert batch["labels"][0, total:].tolist() == [-100] * tail
    assert batch["position_ids"][0, total:].tolist() == list(range(tail))
    edges = [*expected["cu_seq_lens_q"].tolist(), *([total + tail] if tail else [])]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == edges
    assert batch["max_length_q"] == batch["max_length_k"] == max(expected["max_length_q"], tail)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_rows_that_trl_packed(strategy, tmp_path):
    texts = [{"text": f"text {number} " * (number % 17 + 1)} for number in range(60)]
    packed = trl_rows(
        texts, small_tokenizer(), tmp_path, packing=True, packing_strategy=strategy, max_length=64
    )
    assert max(map(len, packed["seq_lengths"])) > 1
    for first in range(0, len(packed), 3):
        features = [packed[index] for index in range(first, min(first + 3, len(packed)))]
        check_same(OURS(features), theirs(features))


@settings(deadline=None, max_examples=30)
@given(rows(False))
def test_our_own_packed_rows(documents):
    packed = PackedDataset(documents, 60)
    batch = OURS(packed.__getitems__(range(len(packed))))
    features = [packed[index] for index in range(len(packed))]
    expected = theirs([{key: row[key].tolist() for key in row} for row in features])
    check_same(batch, expected)
    check_same(OURS(features), expected)


def test_masks_of_another_length_are_refused():
    row = {"input_ids": [1, 2], "completion_mask": [1]}
    with pytest.raises(ValueError, match=r"features\[0\] has 1 completion_mask for 2 input_ids"):
        OURS([row])
    masked = {"input_ids": np.arange(4), "completion_mask": np.array([0, 1, 1, 0])}
    (packed,) = PackedDataset([masked], 8)
    assert packed["labels"].tolist() == [-100, 1, 2, -100]
