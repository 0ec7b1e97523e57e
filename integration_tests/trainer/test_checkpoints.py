"""Checkpoints: exact resume, loadable in stock transformers, and a model that still generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from test_packed_training import documents
from test_parity import Rows, arguments
from transformers import AutoModelForCausalLM, Trainer

from barqtrain_hf import BarqTrainer, BarqTrainingArguments
from barqtrain_hf.data import PackedDataset


def make(path: Path, train_dataset: Any = None, **options: object) -> BarqTrainer:
    return BarqTrainer(
        model=tiny_model("llama"),
        args=BarqTrainingArguments(**arguments(path, train_sampling_strategy="random", **options)),
        train_dataset=train_dataset or Rows(40, seed=1),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make(tmp_path / "resumed", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("packed", [False, True])
def test_a_finished_run_is_not_trained_on(
    packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed after its last checkpoint a run is resumed there, in the middle of an epoch."""
    runs = []
    for resume in (None, True):
        dataset = PackedDataset(documents(60), 64) if packed else None
        trainer = make(tmp_path, dataset, max_steps=6, save_strategy="steps", save_steps=6)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    whole, resumed = runs
    assert (whole.steps_trained, resumed.steps_trained) == (6, 0)
    assert caplog.text.count("nothing left to train: the checkpoint is of step 6 of 6") == 1
    ends = [[e for e in run.state.log_history if "train_runtime" in e][-1] for run in runs]
    assert ["train_loss" in entry for entry in ends] == [True, False]
    assert resumed.state.global_step == 6 and losses(resumed) == losses(whole)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpoint_loads_in_stock_transformers(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    stock_keys = set(tiny_model("llama").state_dict())
    assert set(trainer.model.state_dict()) == stock_keys
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-4", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(3, 20)[None]
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


def test_model_generates_and_is_stock_again_after_training(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    model = trainer.model
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert norms and not any("forward" in m.__dict__ for m in norms)
    stock = tiny_model("llama")
    stock.load_state_dict(model.state_dict())
    ids = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 12, "do_sample": False}
    model.eval()
    assert torch.equal(model.generate(ids, **options), stock.eval().generate(ids, **options))
    labels = ids.clone()
    assert torch.equal(model(ids, labels=labels).loss, stock(ids, labels=labels).loss)


def test_leaves_are_restored_when_training_fails(tmp_path: Path) -> None:
    class Broken(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 5:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    trainer = BarqTrainer(
        tiny_model("llama"),
        BarqTrainingArguments(**arguments(tmp_path)),
        train_dataset=Broken(40, 1),
    )
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    norms = [m for m in trainer.model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert not any("forward" in m.__dict__ for m in norms)
