"""Packing by our pipeline: TRL's documents and losses, in rows of ours, and what TRL prepares itself."""

from __future__ import annotations

import gc
import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_cases import (
    arguments,
    assert_same_logs,
    data,
    datasets,
    model,
    text,
    tokenizer,
    train,
    trl,
)

from barqtrain_hf import BarqSFTConfig, BarqSFTTrainer
from barqtrain_hf.data import PackedDataset
from barqtrain_hf.errors import DataError
from barqtrain_hf.sft.packing import SFTCollator

ROW = 64


def made(path: Path, trainer_class: Any = BarqSFTTrainer, given: Any = None, **options: Any) -> Any:
    """A trainer that packs and has not trained."""
    config_class = BarqSFTConfig if trainer_class is BarqSFTTrainer else trl.SFTConfig
    options = {"packing": True, "max_length": ROW, "eval_strategy": "no", **options}
    given = {"train_dataset": data("texts"), "processing_class": tokenizer(), **(given or {})}
    return trainer_class(model(), config_class(**arguments(path, **options)), **given)


def documents(rows: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, labels but the first) of every document in packed rows, in order of their ids."""
    found = []
    for row in rows:
        start = 0
        for length in map(int, row["seq_lengths"]):
            ids, labels = (
                torch.as_tensor(row[key])[start : start + length].tolist()
                for key in ("input_ids", "labels")
            )
            found.append((ids, labels[1:]))
            start += length
    return sorted(found)


def conversations() -> Any:
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"ask {n}"},
                {"from": "gpt", "value": text(n)},
            ]
        }
        for n in range(9)
    ]
    return datasets.Dataset.from_list(rows)


def slow() -> Any:
    class Slow(type(tokenizer())):  # type: ignore[misc]
        is_fast = False

    copied = Slow(tokenizer_object=tokenizer().backend_tokenizer, pad_token="<pad>")
    copied.bos_token, copied.eos_token = "<s>", "</s>"
    return copied


# Options, what else the trainer is given, and why TRL makes the tokens.
TOKENS: dict[str, tuple[dict[str, Any], Any, str | None]] = {
    "texts": ({}, dict, None),
    "prompts": ({}, lambda: {"train_dataset": data("prompts")}, None),
    "chats": ({}, lambda: {"train_dataset": data("chats")}, None),
    "column": (
        {"dataset_text_field": "body"},
        lambda: {"train_dataset": data("texts").rename_column("text", "body")},
        None,
    ),
    "tokens": ({}, lambda: {"train_dataset": data("tokens")}, "it is tokenised already"),
    "assistant_only": (
        {"assistant_only_loss": True},
        lambda: {"train_dataset": data("chats")},
        "assistant_only_loss takes masks from the chat template",
    ),
    "prompts_with_loss": (
        {"completion_only_loss": False},
        lambda: {"train_dataset": data("prompts")},
        "completion_only_loss=False puts a loss on prompts, too",
    ),
    "formatted": (
        {},
        lambda: {"formatting_func": lambda row: row["text"].upper()},
        "there is a formatting_func",
    ),
    "conversations": (
        {},
        lambda: {"train_dataset": conversations()},
        "conversations are converted to messages first",
    ),
    "two_kinds": (
        {"dataset_text_field": "body"},
        lambda: {"train_dataset": data("chats").add_column("body", ["a"] * 24)},
        "it has 'body' beside messages",
    ),
    "slow": ({}, lambda: {"processing_class": slow()}, "Slow has no fast version"),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_documents_and_losses_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    options, given, reason = TOKENS[kind]
    # No document is longer than a row, where TRL would cut it.
    options = {**options, "max_length": 256}
    ours = made(tmp_path, given=given(), **options)
    stock = made(tmp_path, trl.SFTTrainer, given=given(), **options)
    assert isinstance(ours.train_dataset, PackedDataset)
    rows = [ours.train_dataset[index] for index in range(len(ours.train_dataset))]
    assert documents(rows) == documents(stock.train_dataset)
    report = str(ours.barq_report)
    assert "packing: installed in the train data set" in report
    if reason is None:
        assert "tokenizing: installed in the train data set" in report
    else:
        assert f"tokenizing: not in the train data set: {reason}, so TRL does it" in report


def test_the_same_rows_give_trls_numbers(tmp_path: Path) -> None:
    ours = train(BarqSFTTrainer, tmp_path, packing=True, max_length=ROW)

    def as_trl(packed: PackedDataset) -> Any:
        packed.repack(0)
        rows = [
            {key: packed[index][key].tolist() for key in ("input_ids", "labels", "seq_lengths")}
            for index in range(len(packed))
        ]
        return datasets.Dataset.from_list(rows)

    stock = train(
        trl.SFTTrainer,
        tmp_path,
        given={
            "train_dataset": as_trl(ours.train_dataset),
            "eval_dataset": as_trl(ours.eval_dataset),
        },
        padding_free=True,
        max_length=None,
    )
    assert_same_logs(stock, ours)
    entry = next(e for e in ours.state.log_history if "loss" in e)
    assert entry["packing_fill"] == ours.train_dataset.fill > 0.8


def test_no_token_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": text(3) * (1 + n)} for n in range(9)]
    given = {"train_dataset": datasets.Dataset.from_list(rows)}
    ours, stock = (
        made(tmp_path, trainer_class, given=given)
        for trainer_class in (BarqSFTTrainer, trl.SFTTrainer)
    )
    whole = sum(len(tokenizer()(row["text"] + "</s>")["input_ids"]) for row in rows)
    assert ours.train_dataset.num_tokens == whole
    assert sum(len(row["input_ids"]) for row in stock.train_dataset) < 0.8 * whole
    assert "documents split" in caplog.text


@pytest.mark.parametrize(
    ("options", "dataset", "reason"),
    [
        ({"packing_strategy": "wrapped"}, None, "packing_strategy='wrapped' lets documents run on"),
        ({}, "stream", "IterableDataset has no length to plan rows with"),
        ({"barq_config": {"packing": False}}, None, None),
        ({"use_barq_kernels": False}, None, None),
    ],
    ids=["wrapped", "stream", "config", "flag"],
)
def test_what_trl_packs(
    options: dict[str, Any], dataset: str | None, reason: str | None, tmp_path: Path
) -> None:
    given = {"train_dataset": data("texts").to_iterable_dataset()} if dataset else {}
    trainer = made(tmp_path, given=given, max_steps=1, **options)
    assert not isinstance(trainer.train_dataset, PackedDataset)
    trainer.train()
    assert trainer.state.log_history
    report = str(trainer.barq_report)
    assert (f"packing: not in the train data set: {reason}" in report) is (reason is not None)
    assert ("packing" in report) is (reason is not None)


def test_evaluation_is_packed_as_the_training(tmp_path: Path) -> None:
    few = data("texts").select(range(6))
    for options, packed in (({}, True), ({"eval_packing": False}, False)):
        trainer = made(tmp_path, given={"eval_dataset": {"one": few, "two": few}}, **options)
        assert isinstance(trainer.eval_dataset["one"], PackedDataset) is packed
        prepared = trainer.evaluate()
        assert prepared["eval_one_loss"] == pytest.approx(prepared["eval_two_loss"])
        again = trainer.evaluate(few)
        assert again["eval_loss"] == pytest.approx(prepared["eval_one_loss"], rel=1e-5)
        # What is prepared already stays as it is.
        assert trainer.evaluate(trainer.eval_dataset["one"])["eval_loss"] == pytest.approx(
            again["eval_loss"], rel=1e-5
        )


def test_epochs_are_packed_anew_and_resumed_in_the_middle(tmp_path: Path) -> None:
    def run(path: Path, resume: str | None = None) -> tuple[Any, list[list[int]]]:
        seen: list[list[int]] = []

        class Spy(BarqSFTTrainer):
            def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(inputs["input_ids"].flatten().tolist())
                return super().training_step(model, inputs, *args, **kwargs)

        options = {
            "max_steps": -1,
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        options.update(packing=True, max_length=ROW, eval_strategy="no")
        options.update(per_device_train_batch_size=1, logging_steps=1)
        trainer = Spy(
            model(),
            BarqSFTConfig(**arguments(path, **options)),
            train_dataset=data("texts"),
            processing_class=tokenizer(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    whole, seen = run(tmp_path / "whole")
    batches = len(seen) // 2
    first, second = seen[:batches], seen[batches:]
    assert sorted(chain(*first)) == sorted(chain(*second)) and first != second
    resumed, rest = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{batches + 2}"))
    assert rest == second[2:]
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_tokens_are_kept_beside_the_data_or_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data("texts")), encoding="utf-8")
    loaded = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    for _ in range(2):
        made(tmp_path / "out", given={"train_dataset": loaded})
        (store,) = (tmp_path / "cache").rglob("*.tokens")
        written = store.stat().st_mtime_ns
    assert store.stat().st_mtime_ns == written
    made(tmp_path / "out", given={"train_dataset": loaded.select(range(9))})
    assert len(list((tmp_path / "cache").rglob("*.tokens"))) == 2

    trainer = made(tmp_path / "out")
    (folder,) = (tmp_path / "temporary").glob("barqtrain_hf-*")
    packed = trainer.train_dataset
    del trainer
    gc.collect()
    assert len(packed[0]["input_ids"]) > 0 and folder.exists()
    del packed
    gc.collect()
    assert not folder.exists()


def test_a_row_that_cannot_be_read_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": None}])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(DataError, match=r"dataset\[1\] is None .*instead of text"):
        made(tmp_path, given={"train_dataset": rows})
    assert not list((tmp_path / "temporary").glob("barqtrain_hf-*"))


def test_batches_are_those_of_trls_collator() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, -100, 7], "seq_lengths": [2, 1]},
        {"input_ids": [8, 9, 3, 4], "labels": [8, 9, 3, 4], "seq_lengths": [4]},
    ]
    stock = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=True
    )
    ours, theirs = SFTCollator()(rows), stock(rows)
    assert ours.to("cpu").boundaries == ours["cu_seq_lens_q"].tolist()  # known on the host
    assert ours.pop("use_cache") is False and ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[key].dtype is value.dtype and ours[key].tolist() == value.tolist(), key
        else:
            assert ours[key] == value
