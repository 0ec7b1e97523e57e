"""BarqTrainer trains LoRA adapters as stock Trainer does, on both paths of the op, and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import adapted, force_fused, lora_layers
from models import LEAF_OPS, counts
from test_parity import Rows, arguments, assert_equal_runs
from transformers import TrainerCallback

from barqtrain_hf import BarqTrainer, BarqTrainingArguments


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ],
    ids=["accumulation", "checkpointing", "reentrant checkpointing"],
)
def test_lora(
    options: dict[str, Any], fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = force_fused(monkeypatch) if fused else []
    trainer = assert_equal_runs(lambda: adapted("llama"), tmp_path, **options)
    assert counts(trainer.barq_report) == {**LEAF_OPS["llama"], "lora": 14}
    # Every layer in every micro-step at least, and none after the training.
    assert sum(calls) >= 14 * 4 * options.get("gradient_accumulation_steps", 1) * fused
    assert not any("forward" in m.__dict__ for m in lora_layers(trainer.model).values())


class _Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append(
            {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
        )


def test_every_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    force_fused(monkeypatch)
    found = []
    for patched in (False, True):
        gradients = _Gradients()
        options = {"max_steps": 2, "optim": "sgd", "gradient_accumulation_steps": 2}
        args = BarqTrainingArguments(**arguments(tmp_path, use_barq_kernels=patched, **options))
        model = adapted("llama")
        BarqTrainer(model, args, train_dataset=Rows(40, seed=1), callbacks=[gradients]).train()
        found.append(gradients.steps)
    for theirs, mine in zip(*found, strict=True):
        assert mine.keys() == theirs.keys() and len(mine) == 28
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
def test_resume_is_exact(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        force_fused(monkeypatch)

    def train(name: str, checkpoint: str | None = None) -> tuple[list[float], Any]:
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        options |= {"gradient_accumulation_steps": 2, "train_sampling_strategy": "random"}
        args = BarqTrainingArguments(**arguments(tmp_path / name, **options))
        trainer = BarqTrainer(adapted("llama"), args, train_dataset=Rows(40, seed=1))
        trainer.train(resume_from_checkpoint=checkpoint)
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer.model

    losses, whole = train("whole")
    again, resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert again == losses and len(losses) == 6
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # The checkpoint is one of PEFT's.
    saved = sorted(path.name for path in (tmp_path / "whole" / "checkpoint-6").glob("adapter*"))
    assert saved == ["adapter_config.json", "adapter_model.safetensors"]
