"""What wandb, TensorBoard and trackio have written of a run, read back from their files. All offline."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_parity import Rows, arguments
from test_samples_callback import CHAT, model, tokenizer
from transformers import Trainer, TrainingArguments

from barqtrain_hf import (
    BarqMetricsCallback,
    BarqSamplesCallback,
    BarqTrainer,
    BarqTrainingArguments,
)

# In every training entry, on a CPU.
METRICS = {"tokens_per_second", "peak_memory_gib", "data_wait_share"}
PROMPTS = ["The quick brown fox", CHAT]


def train(path: Path, logger: str, kind: type[Trainer] = Trainer, **options: Any) -> Any:
    ours = kind is BarqTrainer
    options = arguments(path / "out", report_to=[logger], **options)
    trainer = kind(
        model(),
        (BarqTrainingArguments if ours else TrainingArguments)(**options),
        train_dataset=Rows(40, seed=1),
        eval_dataset=Rows(7, seed=2),
        processing_class=tokenizer(),
        callbacks=[
            BarqSamplesCallback(PROMPTS, max_new_tokens=4),
            *([] if ours else [BarqMetricsCallback()]),
        ],
    )
    trainer.train()
    return trainer


def history(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def records(file: Path) -> Iterator[Any]:
    """Of a .wandb file: 7 bytes, then blocks of 32 KiB with records that may go on in the next block."""
    from wandb.proto import wandb_internal_pb2

    content = file.read_bytes()
    assert content[:4] == b":W&B"
    place, whole = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:  # too little for a header
            place += left
            continue
        _, size, part = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("", "CACHE_", "CONFIG_", "DATA_", "ARTIFACT_"):
        monkeypatch.setenv(f"WANDB_{name}DIR", str(tmp_path))
    wandb.teardown()  # it reads its settings once
    config = {"rope": False, "max_extra_bytes": 1 << 20}
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    try:
        trainer = train(tmp_path, "wandb", BarqTrainer, barq_config=config, **evaluated)
    finally:
        wandb.finish()
        wandb.teardown()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    read: dict[str, Any] = {}
    logged = []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "config":
            read.update(values(record.config.update))
        elif kind == "history":
            logged.append(values(record.history.item))
    assert read["barq_config"] == config and read["use_barq_kernels"] is True
    assert read["learning_rate"] == 1e-2 and read["model_type"] == "llama"

    steps = [entry for entry in logged if "train/loss" in entry]
    assert [entry["train/global_step"] for entry in steps] == [1, 2, 3, 4]
    for entry, expected in zip(steps, history(trainer), strict=True):
        for name in METRICS | {"loss"}:
            assert entry[f"train/{name}"] == pytest.approx(expected[name])

    tables = [entry for entry in logged if "samples/path" in entry]
    assert [entry["train/global_step"] for entry in tables] == [2, 4]
    table = json.loads((folder / "files" / tables[-1]["samples/path"]).read_text("utf-8"))
    assert table["columns"] == ["step", "prompt", "sample"]
    chat = "<s>user\nthe quick dog</s>\n<s>assistant\n"
    expected = [[step, prompt] for step in (2, 4) for prompt in (PROMPTS[0], chat)]
    assert [row[:2] for row in table["data"]] == expected
    assert all(row[2] for row in table["data"])


def test_tensorboard_on_a_stock_trainer(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path, "tensorboard")  # no evaluation: samples when training ends
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    for name in METRICS:
        logged = {event.step: event.value for event in read.Scalars(f"train/{name}")}
        wanted = {entry["step"]: entry[name] for entry in history(trainer)}
        assert logged == pytest.approx(wanted, rel=1e-6) and len(wanted) == 4
    for number, prompt in enumerate((PROMPTS[0], "    the quick dog</s>")):
        (event,) = read.Tensors(f"samples/{number}/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert event.step == 4 and prompt in text
        assert all(line.startswith("    ") for line in text.split("\n")[:-1])


def test_trackio_on_a_stock_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("trackio") is None:  # it brings a dozen packages with it
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # That is read when it is imported, and another test may have done so.
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    trainer = train(tmp_path, "trackio", project="barq")
    with sqlite3.connect(tmp_path / "trackio" / "barq.db") as database:
        rows = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics")]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 4
    for entry, expected in zip(steps, history(trainer), strict=True):
        assert entry["train/global_step"] == expected["step"]
        for name in METRICS:
            assert entry[f"train/{name}"] == pytest.approx(expected[name])
