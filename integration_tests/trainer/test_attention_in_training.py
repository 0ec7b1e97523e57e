"""Attention installed by the trainer: packed rows train to stock's losses, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model
from test_packed_training import documents
from test_parity import arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from barqtrain_hf import BarqKernelsCallback, BarqTrainer, BarqTrainingArguments
from barqtrain_hf.data import BarqDataCollator, PackedDataset
from barqtrain_hf.patching import attention


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is installed on a CPU too, without being asked for by name."""
    monkeypatch.setattr(attention, "_unusable", lambda module, asked_for: None)


class Spy(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.during = kwargs["model"].config._attn_implementation


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_packed_rows_train_to_stocks_losses(family: str, bf16: bool, tmp_path: Path) -> None:
    options = {"bf16": bf16, "gradient_accumulation_steps": 2, "activation_checkpointing": True}
    stock = Trainer(
        tiny_model(family, sliding_window=9),
        TrainingArguments(**arguments(tmp_path, **options)),
        train_dataset=PackedDataset(documents(200), 64),
        data_collator=BarqDataCollator(),
    )
    options.update(save_strategy="steps", save_steps=2)
    spy = Spy()
    ours = BarqTrainer(
        tiny_model(family, sliding_window=9),
        BarqTrainingArguments(**arguments(tmp_path / "ours", **options)),
        train_dataset=PackedDataset(documents(200), 64),
        callbacks=[spy],
    )
    assert losses(ours) == pytest.approx(losses(stock), rel=2e-2 if bf16 else 2e-5)
    report = ours.barq_report
    assert len(report.installed["attention"]) == 2, str(report)
    assert not any(op == "attention" for op, _ in report.fallbacks), str(report)
    assert spy.during == "barq"
    assert ours.model.config._attn_implementation == stock.model.config._attn_implementation
    for file in tmp_path.rglob("*.json"):
        if file.name != "trainer_state.json":
            assert '"barq"' not in file.read_text(), file


def test_evaluation_and_generation_while_training(tmp_path: Path) -> None:
    class Generates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model, ids = kwargs["model"].eval(), torch.arange(3, 12)[None]
            options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
            self.ours = model.generate(ids, **options)
            twin = tiny_model("llama")
            twin.load_state_dict(model.state_dict())
            self.stock = twin.generate(ids, **options)
            model.train()

    spy, packed = Generates(), PackedDataset(documents(60), 64)
    trainer = BarqTrainer(
        tiny_model("llama"),
        BarqTrainingArguments(**arguments(tmp_path, eval_strategy="steps", eval_steps=2)),
        train_dataset=packed,
        eval_dataset=packed,
        callbacks=[spy],
    )
    trainer.train()
    assert torch.equal(spy.ours, spy.stock)
    during = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    after = trainer.evaluate()["eval_loss"]  # with stock attention again
    assert during[-1] == pytest.approx(after, rel=1e-5)


def test_context_parallelism_keeps_its_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    args = TrainingArguments(**arguments(tmp_path))
    args.parallelism_config = SimpleNamespace(cp_enabled=True, sp_enabled=False)
    callback = BarqKernelsCallback()
    callback.on_train_begin(args, None, None, model=model)  # type: ignore[arg-type]
    assert model.config._attn_implementation == "sdpa"
    assert "attention: not in the model: context or sequence parallelism" in str(callback.report)
    assert "rope" in callback.report.installed  # type: ignore[union-attr]
    callback.restore()
