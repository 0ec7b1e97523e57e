"""The benchmark of `barqtrain sft`: a small run beside `trl sft`, and what is said of failures and bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from barqtrain_hf.benchmarks import sft  # noqa: E402
from barqtrain_hf.benchmarks.harness import Report  # noqa: E402
from barqtrain_hf.benchmarks.sft_run import run  # noqa: E402
from barqtrain_hf.benchmarks.training_tables import sft_table  # noqa: E402

MODEL = {
    **sft.MODEL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 1100,
    "max_position_embeddings": 256,
}


def test_both_commands_train_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokens = sft.prepare(tmp_path, MODEL, 320)
    assert 10 < tokens < 100
    sizes = {"rows": 2, "length": 128, "documents": 3}
    rows = {
        way.command: run(way.command, sft.options(tmp_path, way, False, sizes, 12))
        for way in (sft.BFD, sft.OURS)
    }
    assert "barqtrain_hf:" in capsys.readouterr().out  # of ours, which prints its report
    for row in rows.values():
        assert 0 < row["step_ms_quartile_1"] <= row["step_ms"] <= row["step_ms_quartile_3"]
        # Rows are nearly full, and nothing else is counted.
        in_a_step = row["tokens_per_second"] * row["step_ms"] / 1e3
        assert 0.8 * 256 < in_a_step < 1.2 * 256
    assert rows["barqtrain"]["loss"] == pytest.approx(rows["trl"]["loss"], abs=0.1)


def _report() -> Report:
    """Both cases, ours 1.5 times the best that keeps documents apart and 1.2 times the other."""
    speeds = {sft.OURS.name: 30.0, sft.BFD.name: 20.0, sft.WRAPPED.name: 25.0}
    report = Report("sft")
    for case, _, ways in sft.CASES:
        for way in ways:
            row: dict[str, Any] = {"unavailable": "no flash"}
            if way.name in speeds:
                speed = speeds[way.name] * 1000
                row = {"tokens_per_second": speed, "peak_gib": 1.0, "loss": 2.0}
                row |= {f"tokens_per_second_quartile_{number}": speed for number in (1, 3)}
            about = {"packs": way.packs, "apart": way.apart}
            report.add(part="sft", case=case, implementation=way.name, **about, **row)
    return report


def test_bars() -> None:
    report = _report()
    sft.judge(report)
    bars = [row for row in report.rows if row["part"] == "bars"]
    assert [row["met"] for row in bars] == [1, 0]
    assert "apart" in bars[0]["bar"] and "any kind" in bars[1]["bar"]


def test_table() -> None:
    lines = sft_table([{"rows": _report().rows}])
    name = f"| {sft.BFD.name} | 20,000 | 20,000 to 20,000 | 1.50× | 1.0 GiB | 2.0000 |"
    assert any(line.endswith(name) for line in lines)
    assert "|  | trl sft, padding-free | unavailable (no flash) |  |  |  |  |" in lines
    bold = "**30,000** | **30,000 to 30,000** |  | **1.0 GiB** | **2.0000** |"
    assert any(line.endswith(bold) for line in lines)


def test_time_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is run first, and what may fail last; rows are told in the table's order."""
    order: list[list[str]] = []

    def run_apart(module: str, runs: Any, *_: Any) -> Any:
        order.extend([command, *settings["argv"]] for command, settings in runs)
        return ({"unavailable": "not tried"} for _ in runs)

    monkeypatch.setattr(sft, "run_apart", run_apart)
    monkeypatch.setattr(sft, "prepare", lambda *_: 32.0)
    report = sft.run()
    assert [words[0] for words in order] == ["barqtrain"] * 2 + ["trl"] * 10
    assert "flash_attention_2" in order[-2] and "flex_attention" in order[-1]
    lengths = [words[words.index("--max_length") + 1] for words in order]
    assert lengths.count("none") == 1 and lengths.count("4096") == 11  # padding-free, and all else
    names = [row["implementation"] for row in report.rows if row["part"] == "sft"]
    assert names == [way.name for _, _, ways in sft.CASES for way in ways]
