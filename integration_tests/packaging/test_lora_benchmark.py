"""The benchmark of LoRA: errors, and how many cases meet each bar."""

from __future__ import annotations

import sys

import pytest
import torch
from lora_models import force_fused

from barqtrain_hf.benchmarks import lora
from barqtrain_hf.benchmarks.elementwise import OURS
from barqtrain_hf.benchmarks.harness import Report, Timing


def test_errors_are_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """All compute the same function, and fp64 is its definition."""
    fused = force_fused(monkeypatch)
    report = Report("lora")
    lora.measure_errors(report, 33, 40, 24, 4, "auto", "cpu")
    assert fused == [1] * 8  # one call each draw
    assert [row["tensor"] for row in report.rows] == [
        *("y", "gradient of x", "gradient of A", "gradient of B")
    ]
    for row in report.rows:
        assert 0 < row["ours"] < 2e-2 and 0 < row["peft"] < 2e-2
        assert row["ours"] < 1.25 * row["peft"]


def test_bars() -> None:
    report = Report("lora")
    for part, share, bar in (("linear", 1.1, 1.12), ("linear", 1.3, 1.25), ("layer", 1.1, 1.15)):
        row = {"part": part, "bar": bar, "of_frozen": share, "kept_gib": 0.8}
        report.add(**row, implementation=OURS, ms=Timing(1.0, 1.0, 1.0))
        report.add(**row | {"of_frozen": 9.0}, implementation=lora.PEFT, ms=Timing(9.0, 9.0, 9.0))
    report.add(part="linear", bar=1.12, implementation=OURS, unavailable="out of memory")
    report.add(part="errors", tensor="y", ours=1e-3, peft=1e-3)
    report.add(part="errors", tensor="y", ours=2e-3, peft=1e-3)
    lora.judge(report)
    bars = [(row["met"], row["of"]) for row in report.rows if row["part"] == "bars"]
    assert bars == [(1, 2), (1, 1), (1, 1), (1, 2)]


def test_layers_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation runs on them; without bitsandbytes a row says so."""
    pytest.importorskip("bitsandbytes")
    fused = force_fused(monkeypatch)
    torch.manual_seed(0)
    calls = lora.linear_calls(16, 64, 80, 4, in_4_bits=True, device="cpu")
    base, *adapted = (call() for call in calls.values())
    assert len(adapted) == 3 and fused[-1] == 1
    for y in adapted:
        assert y.dtype is torch.bfloat16 and y.shape == base.shape and not torch.equal(y, base)
    report = Report("lora")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    lora._measure_quantized(report, {"part": "quantized", "shape": "any"}, 16, 64, 80, 4)
    assert "pip install 'barqtrain_hf[qlora]'" in report.rows[0]["unavailable"]
