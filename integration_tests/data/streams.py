"""Documents to stream, and what is to come out."""

import numpy as np
import torch

from barqtrain_hf.data import window


def document(length, first=0):
    tokens = list(range(first, first + length))
    return {"input_ids": tokens, "labels": [token + 1_000_000 for token in tokens]}


def documents(lengths):
    return [document(length, 1000 * index) for index, length in enumerate(lengths)]


def random_documents(count, longest, seed=0):
    return documents(np.random.default_rng(seed).integers(1, longest, count).tolist())


def parts(batch):
    """The documents of a batch, each with ids, labels and positions."""
    sizes = batch["cu_seq_lens_q"].diff().tolist()
    assert max(sizes) == batch["max_length_q"] == batch["max_length_k"]
    columns = (batch[key][0].split(sizes) for key in ("input_ids", "labels", "position_ids"))
    return [tuple(tuple(column.tolist()) for column in part) for part in zip(*columns, strict=True)]


def expected(docs):
    return [
        (tuple(d["input_ids"]), (-100, *d["labels"][1:]), tuple(range(len(d["labels"]))))
        for d in docs
    ]


def same(one, other):
    return one.keys() == other.keys() and all(
        value.equal(other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def small_windows(monkeypatch):
    monkeypatch.setattr(window, "_FIRST_DOCUMENTS", 8)
    monkeypatch.setattr(window, "_DOCUMENTS", 32)
