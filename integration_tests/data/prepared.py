"""What becomes of rows: ours, and TRL's."""

import numpy as np
import pytest

from barqtrain_hf.data import tokenize


def ours(rows, tokenizer, tmp_path, **options):
    """(ids, labels) of each row; the first label is left out, which packing masks in any case."""
    store = tokenize(rows, tokenizer, tmp_path / "tokens", **options)
    ids = store.input_ids & np.iinfo(np.int32).max
    labels = np.where(store.input_ids < 0, -100, ids)
    cuts = np.cumsum(store.lengths)[:-1]
    return [
        (i.tolist(), label.tolist()[1:])
        for i, label in zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
    ]


def trls(rows, tokenizer, tmp_path, **options):
    """The same from SFTTrainer's preparation, with ``options`` of an SFTConfig."""
    prepared = []
    for row in trl_rows(rows, tokenizer, tmp_path, **options):
        cuts = np.cumsum(row.get("seq_lengths", []))[:-1].astype(int)
        for ids, labels in zip(
            np.split(row["input_ids"], cuts), np.split(row["labels"], cuts), strict=True
        ):
            prepared.append((ids.tolist(), labels.tolist()[1:]))
    return prepared


def trl_rows(rows, tokenizer, tmp_path, **options):
    """The rows that SFTTrainer trains on."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(config),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            shuffle_dataset=False,
            **{"max_length": None, **options},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer.train_dataset
