"""Training on packed rows: the same loss as the documents one by one, and the logs that go with it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, tiny_model
from small_tokenizers import small_tokenizer
from test_parity import arguments
from transformers import Trainer, TrainingArguments

from barqtrain_hf import BarqKernelsCallback, BarqTrainer, BarqTrainingArguments
from barqtrain_hf.data import PackedDataset, tokenize
from barqtrain_hf.metrics import attention_flops_per_pair, flops_per_token


def documents(count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 30, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return rows


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gpt2"])
def test_packed_loss_is_the_mean_over_documents(family: str, tmp_path: Path) -> None:
    packed = PackedDataset(documents(30), 64)
    trainer = BarqTrainer(
        tiny_model(family),
        BarqTrainingArguments(**arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)),
        train_dataset=packed,
    )
    trainer.train()
    model = tiny_model(family)
    total, count = 0.0, 0
    for row in (packed[0], packed[1]):
        start = 0
        for length in map(int, row["seq_lengths"]):
            ids = row["input_ids"][None, start : start + length]
            if length > 1:
                loss = model(ids, labels=ids).loss.item()
                total, count = total + loss * (length - 1), count + length - 1
            start += length
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(total / count, rel=1e-5)


def test_persistent_workers_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for workers in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        caplog.clear()
        packed = PackedDataset(documents(6), 64)
        options = arguments(tmp_path, max_steps=-1, num_train_epochs=3, **workers)
        BarqTrainer(
            tiny_model("llama"), BarqTrainingArguments(**options), train_dataset=packed
        ).train()
        warnings = [
            r for r in caplog.records if "dataloader_persistent_workers=True" in r.getMessage()
        ]
        assert len(warnings) == bool(workers)


def test_every_epoch_is_packed_anew_and_resumed_in_its_middle(tmp_path: Path) -> None:
    """Ids of each step; a run resumed in the second epoch sees what the uninterrupted one saw."""

    def train(output: Path, epochs: int, resume: Path | None = None) -> list[list[int]]:
        seen: list[list[int]] = []

        class Spy(BarqTrainer):
            def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(inputs["input_ids"].flatten().tolist())
                return super().training_step(model, inputs, *args, **kwargs)

        trainer = Spy(
            tiny_model("llama"),
            BarqTrainingArguments(
                **arguments(
                    output,
                    max_steps=-1,
                    num_train_epochs=epochs,
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=2,
                    save_strategy="steps",
                    save_steps=1,
                )
            ),
            train_dataset=PackedDataset(documents(60), 64),
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return seen

    whole = train(tmp_path / "whole", 2)
    batches = len(whole) // 2
    first, second = whole[:batches], whole[batches:]
    assert sorted(chain(*first)) == sorted(chain(*second))
    # A plan of its own, not another order of the same rows.
    assert sum(row in first for row in second) < batches // 2
    steps = -(-batches // 2)
    resumed = train(tmp_path / "resumed", 2, tmp_path / "whole" / f"checkpoint-{steps + 2}")
    assert resumed == second[4:]


def test_training_on_a_store_of_text(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    texts = [f"text number {number} " * (1 + number % 5) for number in range(60)]
    packed = PackedDataset(tokenize(texts, tokenizer, tmp_path / "tokens"), 64, overflow="split")
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    args = arguments(tmp_path / "out", max_steps=2, dataloader_num_workers=1)
    trainer = BarqTrainer(model, BarqTrainingArguments(**args), train_dataset=packed)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_logs_and_tensorboard(tmp_path: Path) -> None:
    packed = PackedDataset(documents(60), 64)
    args = arguments(tmp_path / "out", max_steps=3, report_to=["tensorboard"])
    trainer = BarqTrainer(tiny_model("llama"), BarqTrainingArguments(**args), train_dataset=packed)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["tokens_per_second"] > 0
        assert 0.05 < entry["peak_memory_gib"] < 64
        assert entry["packing_fill"] == packed.fill
        assert "mfu" not in entry or torch.cuda.is_available()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert {"train/tokens_per_second", "train/packing_fill"} <= set(accumulator.Tags()["scalars"])


def test_tokens_are_counted_without_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from barqtrain_hf import metrics, timeline

    times = iter(range(100))
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: float(next(times)))
    meter = metrics.ThroughputMeter(tiny_model("llama"), torch.device("cpu"), 2, None)
    assert meter.logs() == {}
    meter.add({"input_ids": torch.zeros(2, 8), "attention_mask": torch.ones(2, 8).tril()})
    meter.add({"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])})
    meter.add({"input_ids": torch.zeros(2, 3)})
    assert meter.logs()["tokens_per_second"] == 2 * (1 + 2 + 9 + 6)
    assert meter.logs() == {}
    meter.add({"input_ids": torch.zeros(2, 3)})
    assert meter.logs()["tokens_per_second"] == 2 * 6


def test_mfu_and_packed_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from barqtrain_hf import metrics, timeline

    times = iter(range(100))
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: float(next(times)))
    meter = metrics.ThroughputMeter(tiny_model("llama"), torch.device("cpu"), 1, None)
    # What it would know on a GPU.
    meter._peak, meter._flops_per_token, meter._flops_per_pair = 1e6, 100.0, 7.0
    meter.add({"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])})
    assert meter.logs()["mfu"] == pytest.approx((9 * 100 + (16 + 25) * 7) / 1e6)
    monkeypatch.undo()
    packed = PackedDataset(documents(20), 64)
    trainer = BarqTrainer(
        tiny_model("llama"), TrainingArguments(**arguments(tmp_path)), eval_dataset=packed
    )
    assert trainer.evaluate()["eval_loss"] > 0


def test_evaluation_and_saving_do_not_slow_the_tokens(tmp_path: Path) -> None:
    import time

    class Slow(BarqTrainer):
        def _save(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.7)
            super()._save(*args, **kwargs)

        def get_eval_dataloader(self, *args: Any) -> Any:
            time.sleep(0.7)
            return super().get_eval_dataloader(*args)

    packed = PackedDataset(documents(60), 64)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Slow(
        tiny_model("llama"),
        BarqTrainingArguments(**arguments(tmp_path, max_steps=2, **options)),
        train_dataset=packed,
        eval_dataset={"one": packed, "two": packed},
    )
    trainer.train()
    # Two packed rows a step: a step takes milliseconds, two seconds would leave 60 tokens/s.
    speeds = [e["tokens_per_second"] for e in trainer.state.log_history if "loss" in e]
    assert len(speeds) == 2 and speeds[1] > 128


def test_flops_of_full_and_lora_training() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    embedding = model.get_input_embeddings().weight.numel()
    assert flops_per_token(model) == 6 * (matrices - embedding)
    tied = tiny_model("llama_tied")
    assert flops_per_token(tied) == flops_per_token(model)  # the head's product is there either way
    assert attention_flops_per_pair(model) == 6 * 2 * 32
    saved = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    trained = sum(p.numel() for p in saved.parameters() if p.requires_grad)
    assert flops_per_token(saved) == 4 * (matrices - 2 * embedding) + 6 * trained
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert flops_per_token(adapted) == 4 * (matrices - embedding) + 6 * trained


def test_callback_on_a_stock_trainer(tmp_path: Path) -> None:
    class Spy(BarqKernelsCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            norms = [m for m in kwargs["model"].modules() if type(m).__name__ == "LlamaRMSNorm"]
            self.during = [("forward" in m.__dict__) for m in norms]

    from test_parity import Rows

    results = []
    spy = Spy()
    for callbacks in ([], [spy]):
        trainer = Trainer(
            tiny_model("llama"),
            TrainingArguments(**arguments(tmp_path)),
            train_dataset=Rows(40, seed=1),
            callbacks=callbacks,
        )
        trainer.train()
        results.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert spy.during and all(spy.during)
    assert "rms_norm: installed in 5 modules" in str(spy.report)
    norms = [m for m in trainer.model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert not any("forward" in m.__dict__ for m in norms)
