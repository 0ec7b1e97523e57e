"""Losses that are not finite are logged as Trainer logs them, but nobody asks on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from test_parity import Rows, arguments
from transformers import Trainer, TrainingArguments

from barqtrain_hf import BarqTrainer


class Poisoned:
    """Micro-batches whose loss is not finite; their gradients are as ever."""

    calls = 0

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]
        if not model.training:
            return loss
        self.calls += 1
        poison = {1: float("nan"), 4: float("inf"), 5: float("nan")}.get(self.calls)
        return loss if poison is None else loss + (poison - loss.detach())


def logged(
    kind: type[Trainer], path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[float], int]:
    """Training and evaluation losses, and how often the host asked."""
    asked = 0
    isnan = torch.isnan

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return isnan(x)

    args = TrainingArguments(
        **arguments(path, gradient_accumulation_steps=2, logging_steps=2, **options)
    )
    trainer = type("Case", (Poisoned, kind), {})(
        model=tiny_model("llama"), args=args, train_dataset=Rows(16, 0), eval_dataset=Rows(4, 1)
    )
    monkeypatch.setattr("transformers.trainer.torch.isnan", counted)
    trainer.train()
    monkeypatch.undo()
    assert args.logging_nan_inf_filter == options.get("logging_nan_inf_filter", True)
    history = trainer.state.log_history
    return [entry.get("loss", entry.get("eval_loss", 0.0)) for entry in history], asked


@pytest.mark.parametrize("on", [True, False])
def test_losses_are_stocks(on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"logging_nan_inf_filter": on, "eval_strategy": "steps", "eval_steps": 2}
    stock, asked = logged(Trainer, tmp_path / "stock", monkeypatch, **options)
    ours, ours_asked = logged(BarqTrainer, tmp_path / "ours", monkeypatch, **options)
    assert ours == pytest.approx(stock, rel=1e-5, nan_ok=True)
    assert len(ours) > 4 and any(loss != loss for loss in ours) != on
    assert ours_asked == 0 and (asked == 8) == on


class Twice:
    """Two batches to a micro-step, of which the first may not be finite."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        first = super().training_step(*args, **kwargs)  # type: ignore[misc]
        return first + super().training_step(*args, **kwargs)  # type: ignore[misc]


def test_a_subclass_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [type("Twice" + kind.__name__, (Twice, kind), {}) for kind in (Trainer, BarqTrainer)]
    stock, ours = (logged(kind, tmp_path / kind.__name__, monkeypatch)[0] for kind in kinds)
    assert ours == pytest.approx(stock, rel=1e-5) and all(loss == loss for loss in ours)


def test_a_step_outside_training_leaves_the_setting(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path, max_steps=1))
    trainer = BarqTrainer(model=tiny_model("llama"), args=args, train_dataset=Rows(4, 0))
    trainer.train()
    batch = {name: value[None] for name, value in Rows(1, 0)[0].items()}
    trainer.training_step(trainer.model, batch)
    assert args.logging_nan_inf_filter


def test_the_setting_comes_back_after_an_error(tmp_path: Path) -> None:
    class Broken(BarqTrainer):
        def _clip_grad_norm(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    args = TrainingArguments(**arguments(tmp_path))
    trainer = Broken(model=tiny_model("llama"), args=args, train_dataset=Rows(4, 0))
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert args.logging_nan_inf_filter
