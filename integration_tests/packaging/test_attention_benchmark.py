"""The benchmark of attention: shapes, timing in turns, checks, verdicts and tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from barqtrain_hf.benchmarks import attention, attention_cases, elementwise, render, rounds
from barqtrain_hf.benchmarks import attention_anchors as anchors
from barqtrain_hf.benchmarks.attention_cases import (
    AUTO,
    NO_ROPE,
    ROPE_BEFORE,
    Candidates,
    Case,
    candidates,
)
from barqtrain_hf.benchmarks.elementwise import OURS
from barqtrain_hf.benchmarks.elementwise_anchors import Implementation
from barqtrain_hf.benchmarks.harness import Report, Timing

DENSE = Case(2, 33, 32, heads=4, key_heads=2)
PACKED = Case(1, 40, 32, (1, 30, 9), heads=4, key_heads=2, flex_bar=0.5)


def test_documents_are_those_of_the_target() -> None:
    lengths = attention_cases.lognormal_lengths(16384)
    assert (len(lengths), sum(lengths), max(lengths), min(lengths) > 0) == (45, 16384, 1003, True)
    assert {case.lengths for case in attention_cases.PACKED} == {lengths}


def test_operations_are_those_of_the_visible_half() -> None:
    case = Case(4, 4096, 128)
    forward = 4 * 4 * 32 * 4096 * 4096 * 128 / 2
    assert case.tflops("forward", 1.0) == pytest.approx(forward / 1e9)
    assert case.tflops("backward", 2.0) == pytest.approx(2.5 * forward / 2e9)
    assert PACKED.tflops("forward_backward", 1.0) == pytest.approx(
        3.5 * 4 * 4 * 32 * (1 + 900 + 81) / 2 / 1e9
    )


def test_positions_start_again() -> None:
    rope = PACKED.rope(torch.float32, "cpu")
    assert rope.cos.shape == rope.sin.shape == (1, 40, 32)
    for start, length in ((0, 1), (1, 30), (31, 9)):
        torch.testing.assert_close(
            rope.sin[0, start : start + length, 0], torch.arange(length).float().sin()
        )
    assert PACKED.boundaries("cpu").tolist() == [0, 1, 31, 40]


@pytest.mark.parametrize("case", [DENSE, PACKED], ids=["dense", "packed"])
def test_all_compute_the_same(case: Case) -> None:
    """Of those that run on a CPU; the rows of the others say why they do not."""
    chosen = candidates(case, "torch", "cpu", flex=False)
    rows: dict[str, dict[str, Any]] = {}
    available = attention.check(chosen, case.inputs(torch.bfloat16, "cpu"), rows)
    expected = {OURS, NO_ROPE, ROPE_BEFORE} if case.lengths else {OURS, anchors.FLASH}
    assert set(available) == expected
    assert AUTO not in rows  # the same path as ours
    for name in set(rows) - expected:
        assert "Error" in rows[name]["unavailable"]
    others = set(rows) | set(chosen.missing)
    if case.lengths:
        assert {anchors.VARLEN, anchors.VARLEN + anchors.AFTER_ROPE} <= others
    else:
        assert anchors.CUDNN in others


def test_another_function_is_refused() -> None:
    chosen = candidates(DENSE, "torch", "cpu")
    wrong = {OURS: chosen.found[OURS], "wrong": anchors.by_document((32, 1))}
    rows: dict[str, dict[str, Any]] = {}
    broken = Candidates(wrong, {}, chosen.stock, chosen.stock_with_rope)
    available = attention.check(broken, DENSE.inputs(torch.bfloat16, "cpu"), rows)
    assert set(available) == {OURS}
    assert "differs from stock" in rows["wrong"]["unavailable"]


def test_another_path_of_auto_has_its_row() -> None:
    chosen = candidates(DENSE, "torch", "cpu")
    ours = chosen.found[OURS]
    other = Implementation(lambda q, k, v: ours.call(q * 1.0, k, v))
    both = Candidates({OURS: ours, AUTO: other}, {}, chosen.stock, chosen.stock_with_rope)
    rows: dict[str, dict[str, Any]] = {}
    assert AUTO in attention.check(both, DENSE.inputs(torch.bfloat16, "cpu"), rows)
    assert "MulBackward0" in rows[AUTO]["runs"]


def test_errors_are_rounding() -> None:
    report = Report("attention")
    attention.measure_errors(report, DENSE, "torch", "cpu")
    assert [(row["dtype"], row["tensor"]) for row in report.rows] == [
        (dtype, tensor) for dtype in ("bfloat16", "float16") for tensor in ("out", "dq", "dk", "dv")
    ]
    most = {"bfloat16": 2e-2, "float16": 3e-3}
    for row in report.rows:
        assert 0 < row["ours"] < most[row["dtype"]] and 0 < row["flash"] < most[row["dtype"]]
        assert row["ratio"] == row["ours"] / row["flash"]


class _Event:
    """Its time is the number of calls made before it; it has happened if the last wait was short."""

    calls = 0
    wait = 0.0

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None:
        self.at = _Event.calls

    def query(self) -> bool:
        return _Event.wait < 40 * rounds._CYCLES

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return float(end.at - self.at)


def test_implementations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        _Event.calls += 1

    def sleep(cycles: int) -> None:
        _Event.wait = cycles

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def broken() -> None:
        raise RuntimeError("out of memory")

    calls = {"a": lambda: call("a"), "broken": broken, "b": lambda: call("b")}
    rows = rounds.interleave(calls)
    assert rows.pop("broken") == {"unavailable": "RuntimeError: out of memory"}
    # Three calls of each say how long one takes, here 1 ms: then four make a turn.
    turns = "".join(order[6:])
    each = [turns[i : i + 8] for i in range(0, len(turns), 8)]
    assert len(each) == rounds._ROUNDS + 1
    assert set(each) == {"aaaabbbb", "bbbbaaaa"}
    for row in rows.values():
        assert row["ms"] == Timing(1.0, 1.0, 1.0)
        # The wait has grown until the host was ahead.
        assert 0 < row["rounds_with_host"] < rounds._ROUNDS


def _time(name: str, ms: float) -> dict[str, Any]:
    return {f"{name}_ms": Timing(ms, 0.99 * ms, 1.03 * ms), f"{name}_tflops": 100 / ms}


def _report() -> Report:
    """Rows as the benchmark writes them."""
    report = Report("attention")
    dense = {"part": "dense", "shape": str(DENSE), "rival": anchors.FLASH, "flex_bar": None}
    report.add(
        **dense,
        implementation=OURS,
        **{**_time("forward", 1.0), **_time("backward", 2.2)},
        **{"forward_of_rival": 0.5, "backward_of_rival": 1.1},
    )
    report.add(
        **dense,
        implementation=attention_cases.PORTABLE,
        **{**_time("forward", 1.8), **_time("backward", 1.6)},
        **{"forward_of_rival": 0.9, "backward_of_rival": 0.8},
    )
    report.add(
        **dense,
        implementation=anchors.FLASH,
        **{**_time("forward", 2.0), **_time("backward", 2.0), "backward_rounds_with_host": 3},
        **{"forward_of_rival": 1.0, "backward_of_rival": 1.0},
    )
    report.add(**dense, implementation=anchors.CUDNN, unavailable="RuntimeError: a|b")
    packed = {"part": "packed", "shape": str(PACKED), "rival": anchors.FLEX, "flex_bar": 0.5}
    after = anchors.VARLEN + anchors.AFTER_ROPE
    repeated = anchors.VARLEN + anchors.REPEATED + anchors.AFTER_ROPE
    for name, ms in ((OURS, 1.0), (after, 1.6), (repeated, 2.0), (anchors.FLEX, 4.0)):
        report.add(
            **packed,
            implementation=name,
            **{**_time("forward", ms / 2), **_time("forward_backward", ms)},
            **{"forward_of_rival": ms / 4, "forward_backward_of_rival": ms / 4},
        )
    host = {"part": "host", "op": "attention", "shape": str(PACKED)}
    times = {f"{name}_us": Timing(30.0, 29.0, 31.0) for name in ("forward", "grad", "step")}
    report.add(**host, implementation=OURS, **times)
    report.add(**host, implementation=anchors.VARLEN, **times)
    report.add(**host, implementation=attention_cases.BARE, forward_us=times["forward_us"])
    memory = {"part": "memory", "shape": str(DENSE), "lse_bytes": 2**20}
    used = {"forward_kept_bytes": 2**20, "forward_peak_bytes": 2**20 + 512}
    report.add(**memory, implementation=OURS, **used, backward_workspace_bytes=2**21)
    report.add(**memory, implementation=anchors.FLASH, unavailable="RuntimeError: no")
    errors = {"part": "accuracy", "shape": str(DENSE), "dtype": "bfloat16"}
    report.add(**errors, tensor="out", ours=1e-3, flash=2e-3, ratio=0.5)
    report.add(**errors, tensor="dq", ours=3e-3, flash=2e-3, ratio=1.5)
    attention.judge(report)
    return report


def test_bars() -> None:
    bars = {
        row["bar"]: (row["met"], row["of"], row["worst_share_of_limit"])
        for row in _report().rows
        if row["part"] == "bars"
    }
    assert bars == {
        "forward and backward at least FA2's TFLOP/s": (1, 2, 1.1),
        "portable kernels: forward and backward at least FA2's TFLOP/s": (2, 2, 0.9),
        f"{PACKED}: at most 0.5 of flex_attention's time": (1, 1, 0.5),
        "packed: faster than FA2 after a RoPE kernel": (1, 1, 1.0 / 1.6),
        "host time of a forward call at most 25 µs": (0, 1, 30 / 25),
        "a forward call keeps nothing but result, q, k, v and LSE": (
            *(1, 1),
            2**20 / (2**20 + 4096),
        ),
        "errors at most 1.25 times FA2's": (1, 2, 1.5 / 1.25),
    }


def test_bars_need_their_rivals() -> None:
    report = Report("attention")
    report.add(part="dense", shape="B2", implementation=OURS, rival=anchors.FLASH)
    for name in (OURS, anchors.FLEX):
        row = {"part": "packed", "shape": "T1", "flex_bar": 0.45, "unavailable": "no"}
        report.add(**row, implementation=name)
    report.add(part="accuracy", shape="B2", dtype="bfloat16", unavailable="no")
    attention.judge(report)
    bars = [row for row in report.rows if row["part"] == "bars"]
    assert [(row["met"], row["of"]) for row in bars] == [(0, 2), (0, 1), (0, 1), (0, 1)]
    assert not any(row["all_met"] for row in bars)
    assert {row["worst_share_of_limit"] for row in bars} == {None}


def test_tables_show_every_part() -> None:
    reports = [dataclasses.asdict(_report())]
    assert render.attention_table(reports)[2:] == [
        "| B2 S33 D32 | **ours** | **1.000 ± 2.0%** | **100** | **2.00×** | **2.200 ± 2.0%** | **45** "
        "| **0.91×** |",
        f"|  | {attention_cases.PORTABLE} | 1.800 ± 2.0% | 56 | 1.11× | 1.600 ± 2.0% | 62 | 1.25× |",
        "|  | torch SDPA, FA2 | 2.000 ± 2.0% | 50 | 1.00× | 2.000 ± 2.0% (with host) | 50 | 1.00× |",
        "|  | torch SDPA, cuDNN | unavailable (RuntimeError: a\\|b) |  |  |  |  |  |",
    ]
    packed = render.packed_attention_table(reports)[2:]
    assert packed[0] == (
        "| 40 tokens in 3 documents, D32 | **ours** | **0.500 ± 2.0%** | **0.25×** | **1.000 ± 2.0%** "
        "| **0.25×** | **100** |"
    )
    assert packed[1].startswith("|  | torch varlen, FA2 after a RoPE kernel | 0.800 ± 2.0% |")
    assert render.attention_memory_table(reports)[2:] == [
        "| B2 S33 D32 | **ours** | **1.00** | **1.00** | **1.00** | **2.00** |",
        "|  | torch SDPA, FA2 | unavailable (RuntimeError: no) |  |  |  |",
    ]
    assert render.attention_accuracy_table(reports)[2:] == [
        "| B2 S33 D32, bfloat16 | out | 1.00e-03 | 2.00e-03 | 0.50 |",
        "|  | dq | 3.00e-03 | 2.00e-03 | 1.50 |",
    ]
    host = render.host_table(reports)[2:]
    assert len(host) == 3
    assert host[2] == f"|  | {attention_cases.BARE} | 30.0 |  |  |"
    names = (
        "attention",
        "packed_attention",
        "attention_memory",
        "attention_accuracy",
        "bars",
        "host",
    )
    for name in names:
        table = render.TABLES[name](reports)
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1, name


def test_a_file_to_come_is_named(tmp_path: Path) -> None:
    text = "<!-- bars: attention.json -->\nold\n<!-- /bars -->\n"
    waiting = render.render(text, tmp_path)
    assert waiting == text.replace("old", "Not measured yet: `attention.json`.")
    _report().write(tmp_path / "attention.json")
    assert "| attention | errors at most" in render.render(waiting, tmp_path)
    assert "Not measured" not in render.render(waiting, tmp_path)


@pytest.mark.gpu
def test_every_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_ROUNDS", 3)
    monkeypatch.setattr(elementwise, "time_host", lambda call, **_: Timing(1.0, 1.0, 1.0))
    dense = Case(2, 256, 64, heads=4, key_heads=2)
    packed = Case(1, 256, 64, (100, 1, 155), heads=4, key_heads=2, flex_bar=0.5)
    report = attention.run([dense], [packed], packed, [dense])
    ours = {row["part"]: row for row in report.rows if row.get("implementation") == OURS}
    assert set(ours) == {"dense", "packed", "host", "memory"}
    for row in ours.values():
        assert "unavailable" not in row
    for part, directions in (
        ("dense", ("forward", "backward")),
        ("packed", ("forward", "forward_backward")),
    ):
        for direction in directions:
            assert ours[part][f"{direction}_ms"]["median"] > 0
    assert ours["memory"]["forward_kept_bytes"] >= ours["memory"]["lse_bytes"]
    errors = [row for row in report.rows if row["part"] == "accuracy"]
    assert len(errors) == 8 and all(row["ratio"] < 2 for row in errors)
    assert len([row for row in report.rows if row["part"] == "bars"]) == 6
