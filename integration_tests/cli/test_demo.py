"""``barqtrain demo`` from the command line to the files it leaves, interrupted and resumed."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from barqtrain_hf.cli import main
from barqtrain_hf.cli.demo import callbacks, run
from barqtrain_hf.cli.demo.callbacks import Bar
from barqtrain_hf.cli.demo.scale import CPU, build_model
from barqtrain_hf.cli.demo.tokenizer import IGNORE_INDEX
from barqtrain_hf.cli.demo.training import training_arguments
from barqtrain_hf.cli.demo.workload import from_own_data, from_tasks

TINY = replace(CPU, hidden_size=32, intermediate_size=64, examples=320, own_bytes=20_000)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CPU", TINY)


def _demo(folder: Path, *options: str) -> int:
    return main(["demo", "--device", "cpu", "--output_dir", str(folder), *options])


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "demo.json").read_text())
    return record


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _demo(tmp_path, "--seed", "5") == 0
    printed = capsys.readouterr().out
    for row in ("real tokens/s", "padding share", "held-out loss", "exact match", "added memory"):
        assert row in printed
    assert "Samples from the model" in printed

    record = _record(tmp_path)
    assert record["status"] == "done"
    assert record["seed"] == 5
    assert "--seed 5" in record["command"]
    assert record["versions"]["torch"] == torch.__version__
    barq, stock = record["runs"]["barq"], record["runs"]["stock"]
    assert barq["tokens"] == stock["tokens"] == 2 * record["data"]["tokens"]
    assert abs(barq["steps"] - stock["steps"]) <= 0.1 * stock["steps"]
    assert barq["padding"] == 0
    assert 0.3 < stock["padding"] < 0.75
    for scored in (barq, stock):
        assert scored["scores"]["loss"] < record["before"]["loss"]
        assert scored["curve"][-1]["step"] <= scored["steps"]
    assert record["before"]["exact_match"] < 0.05
    assert "linear_cross_entropy" in barq["report"]

    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "checkpoints").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "Add one to 347."}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


def test_progress_where_output_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "SECONDS_PER_LINE", 0.0)
    assert _demo(tmp_path, "--no_baseline", "--max_steps", "3") == 0
    printed = capsys.readouterr().out
    for step in (1, 2, 3):
        line = rf"^BarqTrainer, packed: step {step} of 3  loss \d.* tok/s$"
        assert re.search(line, printed, re.M), printed
    for stage in ("training a tokenizer", "Scoring the untrained model", "Scoring it"):
        assert stage in printed


def test_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        words = " ".join(f"word{(i * 7 + j) % 50}" for j in range(20 + 40 * i))
        (texts / f"{i}.txt").write_text(words)
    assert _demo(tmp_path / "out", "--data", str(texts), "--no_baseline", "--max_steps", "3") == 0
    printed = capsys.readouterr().out
    assert "held-out loss" in printed
    assert "exact match" not in printed
    record = _record(tmp_path / "out")
    assert list(record["runs"]) == ["barq"]
    assert record["runs"]["barq"]["scores"]["loss"] < record["before"]["loss"]


def test_chat_labels_are_what_the_assistant_says(tmp_path: Path) -> None:
    workload = from_tasks(0, TINY)
    tokenizer = workload.tokenizer
    for question, tokens in zip(workload.questions, workload.held_out, strict=True):
        said = [token for token in tokens["labels"] if token != IGNORE_INDEX]
        assert said[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == question.answer
        assert tokens["input_ids"][: -len(said)] == list(question.input_ids)
        assert tokens["input_ids"][-len(said) :] == said


def test_texts_come_back_from_their_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  x = 1\n\tgrüße 12 345\r\n" * 9, encoding="utf-8")
    (tmp_path / "b.txt").write_text("def f():\n    return '日本'\n" * 9, encoding="utf-8")
    workload = from_own_data(str(tmp_path), 0, TINY)
    originals = {(tmp_path / name).read_bytes().decode() for name in ("a.txt", "b.txt")}
    decoded = {
        workload.tokenizer.decode(d["input_ids"], skip_special_tokens=True)
        for d in workload.train + workload.held_out
    }
    assert decoded == originals


def test_both_runs_start_from_the_same_weights() -> None:
    tokenizer = from_tasks(0, TINY).tokenizer
    first, second = (build_model(TINY, tokenizer, 7).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("in_hardware", [True, False])
def test_precision_is_one_that_the_gpu_has(
    in_hardware: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or in_hardware,
    )
    chosen = training_arguments(from_tasks(0, TINY), tmp_path, seed=0, device="auto", max_steps=-1)
    assert (chosen["bf16"], chosen["fp16"]) == (in_hardware, not in_hardware)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CPU", TINY)
        assert _demo(folder, "--max_steps", "12") == 0
    return folder


class _Stop(Exception):
    """What stands for a crash."""


@pytest.mark.parametrize("how", ["ctrl-c", "ctrl-c twice", "crash"])
@pytest.mark.parametrize("trainer", ["BarqTrainer", "Trainer"])
def test_resumed_run_equals_an_uninterrupted_one(
    how: str,
    trainer: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = tmp_path / "cut"
    step_end = Bar.on_step_end

    def stop_at_step_7(bar: Bar, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        step_end(bar, args, state, *rest, **kwargs)
        title = bar._progress.tasks[0].description
        if state.global_step == 7 and title.startswith(f"{trainer},"):
            if how == "crash":
                raise _Stop
            signal.raise_signal(signal.SIGINT)
            if how == "ctrl-c twice":
                signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "on_step_end", stop_at_step_7)
        if how == "crash":
            with pytest.raises(_Stop):
                _demo(cut, "--max_steps", "12")
        else:
            assert _demo(cut, "--max_steps", "12") == 130
            assert f"demo --resume --output_dir {cut}" in capsys.readouterr().out
            assert _record(cut)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is handler

    assert _demo(cut, "--resume") == 0
    expected, resumed = (_record(folder)["runs"] for folder in (whole, cut))
    for name in ("barq", "stock"):
        assert resumed[name]["steps"] == expected[name]["steps"] == 12
        assert resumed[name]["scores"] == expected[name]["scores"]
        losses = [[entry["loss"] for entry in run[name]["curve"]] for run in (expected, resumed)]
        assert losses[0] == losses[1]
    models = [AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (whole, cut)]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("scoring", [2, 3])
def test_resumed_after_its_last_step(
    scoring: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = 0

    def evaluate(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == scoring:  # the first is before training
            raise _Stop
        return scores(*args)

    scores = run.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", evaluate)
        with pytest.raises(_Stop):
            _demo(tmp_path, "--max_steps", "12")
    assert _demo(tmp_path, "--resume") == 0
    assert "All 12 steps were trained before" in capsys.readouterr().out
    expected, resumed = (_record(folder)["runs"] for folder in (whole, tmp_path))
    for name in ("barq", "stock"):
        for key in ("steps", "tokens", "padding", "scores"):
            assert resumed[name][key] == expected[name][key], (name, key)


def test_what_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _demo(tmp_path, "--resume") == 2
    assert "demo.json is missing" in capsys.readouterr().err
    assert _demo(tmp_path, "--max_steps", "1", "--no_baseline") == 0
    assert _demo(tmp_path, "--resume") == 2
    assert "is complete" in capsys.readouterr().err

    record = _record(tmp_path)
    record.update(status="interrupted", runs={})
    (tmp_path / "demo.json").write_text(json.dumps(record))
    assert _demo(tmp_path, "--resume", "--seed", "9") == 2
    assert "--seed is 9 and the run in" in capsys.readouterr().err
    record["data"]["fingerprint"] = "another"
    (tmp_path / "demo.json").write_text(json.dumps(record))
    assert _demo(tmp_path, "--resume") == 2
    assert "the data has changed" in capsys.readouterr().err
    (tmp_path / "demo.json").write_text("{")
    assert _demo(tmp_path, "--resume") == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--help"], 0, "usage: barqtrain COMMAND"),
        (["--version"], 0, "barqtrain_hf"),
        (["demo", "--help"], 0, "--data DATA"),
        ([], 2, "no command given"),
        (["dmeo"], 2, "unknown command 'dmeo'"),
        (["demo", "--no_such_option"], 2, "unrecognized arguments: --no_such_option"),
        (["demo", "--max_steps", "0"], 2, "pass a positive number of steps"),
        (["demo", "--seed", "-1"], 2, "--seed -1"),
        (["demo", "--data", "/no/such/file"], 2, "there is no such file"),
    ],
)
def test_exit_codes(
    argv: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if argv[:1] == ["demo"] and "--help" not in argv:
        argv = [*argv, "--device", "cpu"]
    assert main(argv) == code
    printed = capsys.readouterr()
    assert words in (printed.err if code else printed.out)


def test_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert _demo(tmp_path) == 2
    assert "barqtrain_hf[bench]" in capsys.readouterr().err
