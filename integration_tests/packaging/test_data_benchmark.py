"""The benchmark of the data pipeline: every part in small, and its table."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from barqtrain_hf.benchmarks import __main__, data_start, data_text, render
from barqtrain_hf.errors import UnsupportedError


def test_without_trl_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        assert name == "barqtrain_hf.benchmarks.data"
        raise UnsupportedError("trl is not installed.", "pip install 'barqtrain_hf[sft]'")

    monkeypatch.setattr(__main__.importlib, "import_module", missing)
    assert __main__.main(["data"]) == 2
    assert "pip install 'barqtrain_hf[sft]'" in capsys.readouterr().err


def test_text_is_the_same_in_every_run() -> None:
    first, second = (list(data_text.documents(20)) for _ in range(2))
    assert first == second
    words = [len(text.split()) for text in data_text.documents(200)]
    assert 200 < np.mean(words) < 400
    assert any("\n\n" in text for text in first)


def test_a_store_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process does with one; `test_every_part_in_small` starts one with a stream."""
    documents = data_text.documents
    monkeypatch.setattr(data_text, "documents", lambda n, seed=0: documents(min(n, 200), seed))
    data_text.train_tokenizer(tmp_path).save_pretrained(tmp_path / "tokenizer")
    lines = (text.replace("\n", " ") for text in documents(50))
    (tmp_path / "start.txt").write_text("\n".join(lines))
    paths = (tmp_path / name for name in ("start.txt", "tokenizer", "start.barq"))
    seconds = data_start._train("store", *map(str, paths), time.time())
    assert 0 < seconds["data"] <= seconds["whole"]


def test_every_part_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from barqtrain_hf.benchmarks import data

    monkeypatch.setattr(data_start, "RUNS", data_start.RUNS[:1])  # each is a process
    small = {"PLANNED": 2000, "MOVED": 1200, "TEXTS": 300, "RESUMED_AT": 12, "BATCHES": 2}
    for name, value in small.items():
        monkeypatch.setattr(data, name, value)
    documents = data_text.documents
    monkeypatch.setattr(data_text, "documents", lambda n, seed=0: documents(min(n, 500), seed))
    assert datasets.is_caching_enabled()  # importing the benchmark changes nothing
    report = data.run()
    assert datasets.is_caching_enabled()
    parts = {row["part"] for row in report.rows}
    assert parts == set(render._DATA_PARTS)
    for row in report.rows:
        assert row.get("s", row.get("ms", 1)) > 0, row
        if "fill" in row:
            assert 0.9 < row["fill"] <= 1, row
    lost = {
        row["implementation"]: row["share_lost"] for row in report.rows if row["part"] == "lost"
    }
    assert lost["ours, overflow='split'"] == 0 and lost["TRL bfd"] > 0
    table = render.data_table([json.loads(json.dumps(dataclasses.asdict(report)))])
    assert len(table) == len(report.rows) + 2
    assert len({line.count("|") for line in table}) == 1
