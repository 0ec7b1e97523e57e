"""Two gloo ranks: losses and gradient norms of stock Trainer, tokens averaged or not; and our callbacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from two_ranks import run_on_two_ranks

SCRIPT = """
import json, os, sys
import torch
from models import tiny_model
import test_parity
from test_parity import Rows, arguments
from transformers import Trainer, TrainingArguments
from barqtrain_hf import (
    BarqMetricsCallback, BarqSamplesCallback, BarqTrainer, BarqTrainingArguments
)
results = {}
for average in (True, False):
    for trainer_class, args_class in ((Trainer, TrainingArguments), (BarqTrainer, BarqTrainingArguments)):
        options = dict(gradient_accumulation_steps=2, average_tokens_across_devices=average)
        trainer = trainer_class(
            tiny_model("llama"),
            args_class(**arguments(sys.argv[1], **options)),
            train_dataset=Rows(40, seed=1),
        )
        trainer.train()
        logs = [e for e in trainer.state.log_history if "loss" in e]
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        gathered = [torch.empty_like(weights) for _ in range(2)]
        torch.distributed.all_gather(gathered, weights)
        results[f"{trainer_class.__name__} {average}"] = dict(
            loss=[e["loss"] for e in logs],
            grad_norm=[float(e["grad_norm"]) for e in logs],
            ranks_agree=torch.equal(*gathered),
        )

# The main process generates while the other waits; both measure.
sys.path.append(os.path.join(os.path.dirname(test_parity.__file__), "..", "data"))
from small_tokenizers import small_tokenizer
tokenizer, losses = small_tokenizer(), []
samples = BarqSamplesCallback(["a", "The fox"], tokenizer, max_new_tokens=4, show=True)
for callbacks in ([], [BarqMetricsCallback(), samples]):
    trainer = Trainer(
        tiny_model("llama", vocab_size=len(tokenizer), attention_dropout=0.2),
        TrainingArguments(**arguments(sys.argv[1], eval_strategy="steps", eval_steps=2)),
        train_dataset=Rows(40, seed=1),
        eval_dataset=Rows(4, seed=2),
        callbacks=callbacks,
    )
    trainer.train()
    losses.append([e.get("loss", e.get("eval_loss")) for e in trainer.state.log_history])
results["callbacks"] = dict(
    losses=losses, metrics=[e for e in trainer.state.log_history if "loss" in e][-1]
)
if os.environ["RANK"] == "0":
    json.dump(results, open(sys.argv[1] + "/results.json", "w"))
"""


def test_two_ranks(tmp_path: Path) -> None:
    printed = run_on_two_ranks(SCRIPT, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    callbacks = results.pop("callbacks")
    assert len(results) == 4
    for average in ("True", "False"):
        stock, ours = results[f"Trainer {average}"], results[f"BarqTrainer {average}"]
        assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(stock["grad_norm"], rel=1e-4)
        assert stock["ranks_agree"] and ours["ranks_agree"]
    assert printed.count("samples at step") == 2
    without, with_both = callbacks["losses"]
    assert with_both == without and len(without) == 7
    assert callbacks["metrics"]["tokens_per_second"] > 0
    assert 0 <= callbacks["metrics"]["data_wait_share"] <= 1
