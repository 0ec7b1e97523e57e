"""The benchmark of whole steps: one small run of each trainer, and what is said of failures and bars."""

from __future__ import annotations

import subprocess
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


def test_a_run_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter(
        [
            subprocess.CalledProcessError(1, "python", stderr="Traceback\nImportError: no liger"),
            subprocess.TimeoutExpired("python", 300),
        ]
    )

    def fail(*_: Any, **__: Any) -> None:
        raise next(failures)

    monkeypatch.setattr(subprocess, "run", fail)
    cases = (("LoRA", True, False, ("liger", "ours")),)
    report = steps.run(SMALL, 2, 16, 12, cases)
    assert [row.get("unavailable") for row in report.rows[:2]] == [
        "ImportError: no liger",
        "took more than 5 minutes",
    ]


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
