"""``barqtrain bench``: it lists what there is, runs it, and says what it cannot run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from barqtrain_hf.benchmarks import __main__ as benchmarks
from barqtrain_hf.benchmarks.harness import Report
from barqtrain_hf.cli import main


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: barqtrain bench NAME [--output FILE]"
    for name, about in {**benchmarks.ON_GPU, **benchmarks.ON_CPU}.items():
        assert f"  {name:<22}{about}" in lines
        assert importlib.util.find_spec(f"barqtrain_hf.benchmarks.{name}") is not None
    assert main(["--help"]) == 0
    assert "\n  bench     measure " in capsys.readouterr().out


def test_it_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "data", "--output", str(tmp_path / "new" / "data.json")]
    monkeypatch.setattr("sys.argv", ["barqtrain", *argv])

    def run() -> Report:
        report = Report("data")
        report.add(case="one", s=1.5)
        return report

    # The real one turns the caches of datasets off for the whole process.
    stub = SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "barqtrain_hf.benchmarks.data", stub)  # type: ignore[arg-type]
    assert main(argv) == 0
    assert "one" in capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "data.json").read_text())
    assert written["rows"] == [{"case": "one", "s": 1.5}]
    assert written["environment"]["command"] == " ".join(["barqtrain", *argv])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["norms"], "barqtrain bench norms needs a GPU: none here"),
        (["norm"], "argument NAME: invalid choice: 'norm'"),
        ([], "the following arguments are required: NAME"),
        (["data", "--output", "."], "--output .: it is a folder; name a file in it."),
    ],
)
def test_mistakes(
    argv: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("barqtrain_hf.runtime.cuda_unavailable_reason", lambda: "none here")
    assert main(["bench", *argv]) == 2
    assert words in capsys.readouterr().err
