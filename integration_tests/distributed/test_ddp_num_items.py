"""Two DDP ranks with unlike numbers of targets, or none: the losses and gradients of stock Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from two_ranks import run_on_two_ranks

SCRIPT = """
import json, os
from models import tiny_model
from test_parity import Rows, arguments
from transformers import Trainer, TrainerCallback, TrainingArguments
from barqtrain_hf import BarqTrainer, BarqTrainingArguments

STEPS = 4
rows = Rows(8 * STEPS, seed=1)
for i, row in enumerate(rows.rows):
    step, rank = i // 8, i // 2 % 2  # 2 rows in each of 2 micro-steps of 2 ranks
    if step == 3 or (step, rank) == (0, 1):  # nothing counts on one rank, or on any
        row["labels"][:] = -100
    if (step, rank) == (1, 0):  # one target per row
        row["labels"][:] = -100
        row["labels"][2] = row["input_ids"][2]

class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, *args, model, **kwargs):
        self.steps.append({k: p.grad.clone() for k, p in model.named_parameters()})

def train(trainer_class, args_class, average):
    options = dict(
        average_tokens_across_devices=average,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        max_grad_norm=0.0,
        optim="sgd",  # Adam would blow rounding up in the second step
        learning_rate=0.3,
        logging_nan_inf_filter=False,
    )
    gradients = Gradients()
    trainer = trainer_class(
        tiny_model("llama"),
        args_class(**arguments(sys.argv[1], **options)),
        train_dataset=rows,
        callbacks=[gradients],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, gradients.steps

results = {}
for average in (True, False):
    _, stock_losses, stock = train(Trainer, TrainingArguments, average)
    trainer, losses, ours = train(BarqTrainer, BarqTrainingArguments, average)
    results[str(average)] = {
        "stock_losses": stock_losses,
        "losses": losses,
        "norms": [sum(float(g.norm()) for g in step.values()) for step in stock],
        "errors": [
            max(float((step[k] - g).norm() / g.norm().clamp(min=1e-30)) for k, g in want.items())
            for step, want in zip(ours, stock, strict=True)
        ],
        "installed": sorted(trainer.barq_report.installed),
        "fallbacks": [list(key) for key in trainer.barq_report.fallbacks],
    }
with open(sys.argv[1] + f"/results{os.environ['RANK']}.json", "w") as file:
    json.dump(results, file)
"""


def test_two_ranks(tmp_path: Path) -> None:
    run_on_two_ranks(SCRIPT, tmp_path)
    for rank in (0, 1):
        results = json.loads((tmp_path / f"results{rank}.json").read_text())
        assert len(results) == 2
        for average, result in results.items():
            assert result["installed"] == ["glu", "linear_cross_entropy", "rms_norm", "rope"]
            assert result["fallbacks"] == []
            assert result["errors"] == pytest.approx([0.0] * 4, abs=1e-5), average
            assert [norm > 0.0 for norm in result["norms"]] == [True, True, True, False]
            pairs = list(zip(result["losses"], result["stock_losses"], strict=True))
            for (
                ours,
                stock,
            ) in pairs:  # stock has 0 / 0 where a divisor counts no target, ours has 0
                assert ours == pytest.approx(stock if math.isfinite(stock) else ours, rel=1e-6)
            assert all(math.isfinite(ours) for ours, _ in pairs)
            if average == "True":  # else each rank divides by its own count, which may be 0
                assert all(math.isfinite(stock) for _, stock in pairs[:3])
