"""The benchmark of whole steps: one small run of each trainer, and what is said of failures and bars."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from barqtrain_hf.benchmarks import steps
from barqtrain_hf.benchmarks.harness import Report
from barqtrain_hf.benchmarks.steps_run import run
from barqtrain_hf.benchmarks.training_tables import steps_table

SMALL = {
    **steps.MODEL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def test_both_trainers_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    stock, ours = (run(name, True, True, SMALL, 2, 16, 12) for name in ("stock", "ours"))
    assert ours["loss"] == pytest.approx(stock["loss"], abs=1e-3)
    assert 0 < ours["step_ms_quartile_1"] <= ours["step_ms"] <= ours["step_ms_quartile_3"]
    assert ours["tokens_per_second"] == pytest.approx(32e3 / ours["step_ms"])


def test_all_cases_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def run_apart(module: str, runs: Any, *_: Any) -> Any:
        assert importlib.util.find_spec(module) is not None
        asked.extend(runs)
        return ({"unavailable": f"number {number}"} for number in range(len(runs)))

    monkeypatch.setattr(steps, "run_apart", run_apart)
    report = steps.run(SMALL, 2, 16, 12)
    rows = [row for row in report.rows if row["part"] == "steps"]
    assert len(rows) == 12
    last = rows[11]
    assert (last["case"], last["implementation"]) == ("all weights", "BarqTrainer")
    assert last["unavailable"] == "number 11"
    name, settings = asked[11]
    assert name == "ours"
    assert settings == {
        **{"trainer": "ours", "lora": False, "checkpointing": False},
        **{"config": SMALL, "batch": 2, "length": 16, "steps": 12},
    }


def test_a_table_without_stock() -> None:
    rows = [
        {"case": "LoRA", "implementation": "HF Trainer, sdpa", "unavailable": "out of memory"},
        {
            "case": "LoRA",
            "implementation": "BarqTrainer",
            "tokens_per_second": 1000.0,
            "peak_gib": 1.0,
            "loss": 2.0,
        },
    ]
    report = {"rows": [{"part": "steps", **row} for row in rows]}
    assert steps_table([report])[2:] == [
        "| LoRA | HF Trainer, sdpa | unavailable (out of memory) |  |  |  |",
        "|  | **BarqTrainer** | **1,000** |  | **1.0 GiB** | **2.0000** |",
    ]


def test_bars() -> None:
    report = Report("steps")
    case = steps.CASES[0][0]
    for name, speed, peak, loss in (
        ("stock", 10.0, 50.0, 2.0),
        ("liger", 20.0, 30.0, 2.0),
        ("unsloth", 28.0, 19.0, 2.0),
        ("ours", 29.0, 17.0, 2.0005),
    ):
        row = {"tokens_per_second": speed, "peak_gib": peak, "loss": loss}
        report.add(part="steps", case=case, implementation=steps.NAMES[name], **row)
    steps.judge(report)
    assert [row["met"] for row in report.rows if row["part"] == "bars"] == [0, 1, 1, 1]
