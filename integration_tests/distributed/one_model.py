"""Two ranks of BarqTrainer against one plain model on the rows of both: losses and every gradient."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from test_parity import Rows, arguments
from transformers import TrainerCallback
from two_ranks import run_on_two_ranks

from barqtrain_hf import BarqTrainer

STEPS, RATE, ROWS = 2, 0.3, 8  # 8 rows: 2 in each of 2 micro-steps of 2 ranks
TRAIN, HELD_OUT = Rows(STEPS * ROWS, seed=1), Rows(4, seed=2)


def build(case: str) -> Any:
    """A tiny model of a family, or Llama with adapters and a head trained under PEFT."""
    if case != "lora+head":
        return tiny_model(case)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at initialisation, which would hide the adapters
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def together(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trained(model: Any) -> dict[str, Any]:
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return {k.replace("_checkpoint_wrapped_module.", ""): p for k, p in parameters.items()}


def expectation(case: str) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses (the last one of held-out rows) and gradients of an unpatched model in one process."""
    model, losses, gradients = build(case), [], []
    for step in range(STEPS):
        rows = together(TRAIN.rows[ROWS * step : ROWS * (step + 1)])
        loss = model(**rows, num_items_in_batch=(rows["labels"][:, 1:] != -100).sum()).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({k: p.grad for k, p in trained(model).items()})
        for parameter in trained(model).values():
            parameter.data -= RATE * parameter.grad
            parameter.grad = None
    with torch.no_grad():
        losses.append(model(**together(HELD_OUT.rows)).loss.item())
    return losses, gradients


def options(folder: str, **more: Any) -> dict[str, Any]:
    """Training arguments under which both ranks together do what `expectation` does."""
    return arguments(
        Path(folder),
        optim="sgd",  # Adam would blow rounding up in the second step
        learning_rate=RATE,
        max_steps=STEPS,
        max_grad_norm=0.0,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        **more,
    )


class _Gradients(TrainerCallback):
    def __init__(self, full_gradient: Callable[[Any], torch.Tensor]) -> None:
        self.full_gradient = full_gradient
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append({k: self.full_gradient(p) for k, p in trained(model).items()})


def compare(
    model: Any,
    args: Any,
    expected: tuple[list[float], list[dict[str, torch.Tensor]]],
    full_gradient: Callable[[Any], torch.Tensor],
) -> dict[str, Any]:
    """Trains ``model``; what a rank can say about it in JSON."""
    gradients = _Gradients(full_gradient)
    trainer = BarqTrainer(
        model, args, train_dataset=TRAIN, eval_dataset=HELD_OUT, callbacks=[gradients]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    wanted_losses, wanted = expected
    errors = {
        f"{name}, step {step}": ((got[name] - gradient).norm() / gradient.norm()).item()
        for step, (want, got) in enumerate(zip(wanted, gradients.steps, strict=True))
        for name, gradient in want.items()
    }
    return {
        "losses": [*losses, trainer.evaluate()["eval_loss"]],
        "wanted_losses": wanted_losses,
        "errors": errors,
        "installed": sorted(trainer.barq_report.installed),
        "skipped": [op for op, _ in trainer.barq_report.skipped],
        "fallbacks": [list(key) for key in trainer.barq_report.fallbacks],
        "sharded": [n for n, m in trainer.model.named_modules() if type(m).__name__[:4] == "FSDP"],
    }


def save(results: dict[str, Any], folder: str) -> None:
    if os.environ["RANK"] == "0":
        (Path(folder) / "results.json").write_text(json.dumps(results))


def run(script: str, folder: Path) -> dict[str, Any]:
    """Runs a script that imports this module, on two ranks without GPU; what it saved."""
    run_on_two_ranks(script, folder)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def check(
    case: str,
    result: dict[str, Any],
    losses: float = 1e-6,
    gradients: float = 1e-5,
    fallbacks: Collection[list[str]] = (),
) -> None:
    """Asserts that a result of `compare` is that of one model, within relative tolerances."""
    assert result["fallbacks"] == list(fallbacks), case
    assert result["losses"] == pytest.approx(result["wanted_losses"], rel=losses), case
    names = ("lora_A", "lora_B", "lm_head.modules_to_save") if "lora" in case else ("embed", "norm")
    for name in names:
        assert any(name in key for key in result["errors"]), (case, name)
    for name, error in result["errors"].items():
        assert error == pytest.approx(0.0, abs=gradients), (case, name)
