"""The benchmarks of norms, gated activations and RoPE: bytes, errors, verdicts and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from barqtrain_hf.benchmarks import elementwise, glu, norms, outcomes, render, rope
from barqtrain_hf.benchmarks.elementwise import OURS, Case, Op, judge, measure_errors
from barqtrain_hf.benchmarks.elementwise_anchors import Implementation, Tensors
from barqtrain_hf.benchmarks.harness import Report, Timing


def report(*rows: dict[str, Any]) -> Report:
    result = Report("norms")
    for row in rows:
        result.add(**row)
    return result


def bandwidth(
    implementation: str, forward: float, backward: float, **columns: Any
) -> dict[str, Any]:
    """A row as the benchmark writes it, with times in ms; 1 ms is the speed of a copy."""
    row: dict[str, Any] = {"part": "bandwidth", "op": "RMSNorm", "shape": "2×4", "in_bars": True}
    row["implementation"] = implementation
    for direction, ms in (("forward", forward), ("backward", backward)):
        for key in (f"{direction}_ms", f"autograd_{direction}_ms"):
            row[key] = Timing(ms, ms, ms)
        row[f"{direction}_tb_s"] = 4.0 / ms
        row[f"{direction}_share_of_copy"] = 1.0 / ms
    return row | columns


def missing(implementation: str) -> dict[str, Any]:
    columns = {"part": "bandwidth", "op": "RMSNorm", "shape": "2×4", "in_bars": True}
    return {**columns, "implementation": implementation, "unavailable": "not installed: a|b"}


def verdicts(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    result = report(*rows)
    judge(result)
    return [row for row in result.rows if row["part"] == "verdict"]


@pytest.mark.parametrize(
    ("ours", "rival", "met"),
    [
        ((1.1, 1.2), (1.2, 1.3), [True, True]),
        ((1.12, 1.2), (1.2, 1.3), [False, True]),  # 89 % of copy forward
        ((1.1, 1.26), (1.2, 1.3), [True, False]),  # 79 % backward
        ((1.1, 1.2), (1.0, 1.3), [False, True]),  # a rival is faster forward
        ((1.1, 1.2), (1.1, 1.2), [False, False]),  # as fast is not faster
    ],
)
def test_verdict_needs_share_and_speed(
    ours: tuple[float, float], rival: tuple[float, float], met: list[bool]
) -> None:
    found = verdicts(
        bandwidth(OURS, *ours), bandwidth("A", 9.0, 9.0), bandwidth("B", *rival), missing("C")
    )
    assert [row["met"] for row in found] == met
    assert {row["best_rival"] for row in found} == {"B"}
    assert [row["times_faster"] for row in found] == [
        b / a for a, b in zip(ours, rival, strict=True)
    ]
    assert found[0]["not_compared"] == ["C"]


def test_verdict_without_ours_is_not_met() -> None:
    found = verdicts(missing(OURS), bandwidth("A", 1.0, 1.0))
    assert [(row["met"], row["unavailable"]) for row in found] == [
        (False, "not installed: a|b")
    ] * 2


def test_bars_count_cases() -> None:
    accuracy = {"part": "accuracy", "op": "RMSNorm", "shape": "2×4"}
    times = {"part": "host", "op": "RMSNorm", "shape": "2×4"}
    result = report(
        bandwidth(OURS, 1.0, 1.0),
        bandwidth("A", 2.0, 0.5),
        bandwidth(OURS, 9.0, 9.0, shape="2×8", in_bars=False),
        bandwidth("A", 1.0, 1.0, shape="2×8", in_bars=False),
        {**times, "implementation": OURS, "grad_us": Timing(50.0, 50.0, 50.0)},
        {**times, "implementation": "F.rms_norm", "grad_us": Timing(60.0, 60.0, 60.0)},
        {**accuracy, "within_bar": True},
        {**accuracy, "within_bar": False},
    )
    judge(result)
    bars = {row["bar"]: (row["met"], row["of"]) for row in result.rows if row["part"] == "bars"}
    assert bars == {
        "forward at 90% of copy, backward at 80%": (2, 2),
        "faster than every rival on the device": (1, 2),
        "faster than every rival through autograd": (1, 2),
        "RMSNorm, host-bound: no slower than F.rms_norm": (1, 1),
        "errors at most 1.01 times stock's": (1, 2),
    }


def test_bytes_are_the_floors() -> None:
    element = 2  # bytes
    for case, forward, backward in (
        (norms.case(norms.RMS, 16, 32), 2, 3),
        (norms.case(norms.LAYER, 16, 32), 2, 3),
        (norms.case(norms.ADD, 16, 32), 4, 4),
        (glu.case(glu.SWIGLU, 16, 32), 3, 5),
        (glu.case(glu.HALVES, 16, 32), 3, 5),
        (glu.case(glu.GELU, 16, 32), 2, 3),
    ):
        assert case.forward_bytes == forward * 16 * 32 * element
        assert case.backward_bytes == backward * 16 * 32 * element
    case = rope.case(2, 8, 4, 2, 16)
    q, k, cos, sin = case.make(torch.bfloat16, "cpu")
    assert case.forward_bytes == case.backward_bytes
    assert case.forward_bytes == 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    assert q.shape == (2, 4, 8, 16) and q.stride() == (8 * 4 * 16, 16, 4 * 16, 1)


SMALL = (
    *((norms, norms.case(op, 33, 64)) for op in (norms.RMS, norms.LAYER, norms.ADD)),
    *((norms, norms.case(op, 33, 64)) for op in (norms.ROUNDED_ONCE, norms.GEMMA)),
    *((glu, glu.case(op, 33, 64)) for op in (glu.SWIGLU, glu.HALVES, glu.GEGLU, glu.GEGLU_TANH)),
    *((glu, glu.case(op, 33, 64)) for op in (glu.GELU, glu.GELU_TANH)),
    (rope, rope.case(2, 9, 4, 2, 16)),
)


@pytest.mark.parametrize(("module", "case"), SMALL, ids=[case.op for _, case in SMALL])
def test_errors_are_rounding(module: Any, case: Case) -> None:
    """All compute the same function, and fp64 is its definition."""
    (op,) = [op for op in module.ops("torch") if op.name == case.op]
    result = Report("errors")
    measure_errors(result, op, case, "cpu")
    tensors = len(op.outputs) + len(op.inputs)
    assert len(result.rows) == 3 * tensors
    most = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-6}
    for row in result.rows:
        for name in ("ours", "stock"):
            assert 0 < row[name] < most[row["dtype"]], row


def test_another_function_is_refused() -> None:
    inputs = (torch.randn(4, 8, requires_grad=True),)
    expected = outcomes.results(Implementation(torch.tanh), inputs)
    outcomes.check(outcomes.results(Implementation(torch.tanh), inputs), expected)
    for wrong in (torch.sigmoid, lambda x: x * float("nan")):
        with pytest.raises(ValueError, match="differs from stock"):
            outcomes.check(outcomes.results(Implementation(wrong), inputs), expected)


def test_tables_show_every_part() -> None:
    result = report(
        bandwidth(OURS, 1.0, 1.25),
        bandwidth("A", 2.0, 2.0, backward_not_captured="RuntimeError: no"),
        missing("B"),
        {
            **{"part": "host", "op": "RMSNorm", "shape": "2×2", "implementation": OURS},
            **{f"{name}_us": Timing(12.34, 12.0, 13.0) for name in ("forward", "grad", "step")},
        },
        *(
            {
                **{"part": "accuracy", "op": "RMSNorm", "shape": "2×4", "tensor": "y"},
                **{"dtype": dtype, "ours": 1e-3, "stock": 2e-3, "stock_is": "A"},
                "within_bar": True,
            }
            for dtype in ("bfloat16", "float16", "float32")
        ),
    )
    judge(result)
    reports: Sequence[dict[str, Any]] = [dataclasses.asdict(result)]
    assert render.bandwidth_table(reports)[2:] == [
        "| RMSNorm, 2×4 | **ours** | **4.00** | **100%** | **3.20** | **80%** | **1.000** | **1.250** |",
        "|  | A | 2.00 | 50% | 2.00 (with host) | 50% | 2.000 | 2.000 |",
        "|  | B | unavailable (not installed: a\\|b) |  |  |  |  |  |",
    ]
    assert render.verdict_table(reports)[2:] == [
        "| RMSNorm, 2×4 | forward | 100% | A | 2.00× | A | 2.00× | B |",
        "|  | backward | 80% | A | 1.60× | A | 1.60× | B |",
    ]
    assert render.host_table(reports)[2:] == [
        "| RMSNorm, 2×2 | **ours** | **12.3** | **12.3** | **12.3** |"
    ]
    assert render.op_accuracy_table(reports)[2:] == [
        "| RMSNorm, 2×4, stock is A | y | 1.00e-03 | 2.00e-03 | 1.00e-03 | 2.00e-03 | 1.00e-03 | 2.00e-03 |"
    ]
    assert "| norms | errors at most 1.01 times stock's | 3 of 3 |" in render.bars_table(reports)
    for table in (
        render.TABLES[name](reports) for name in ("bandwidth", "verdict", "bars", "host")
    ):
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


class _Overwriting(torch.autograd.Function):
    """As Liger's: the gradient goes where the input was saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        x.data.mul_(dy).mul_(2)
        return x.data


def test_what_a_backward_pass_overwrites_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[torch.Tensor] = []

    def time_gpu(call: Any, repeats: int, warm_up: int, before: Any) -> Timing:
        for _ in range(2):
            for _ in range(elementwise._SETS):
                before()
                (result,) = call()
                gradients.append(result.detach().clone())
        return Timing(1.0, 1.0, 1.0)

    def time_graph(call: Any, calls: int, repeats: int, before: Any) -> Timing:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(elementwise, "time_gpu", time_gpu)
    monkeypatch.setattr(elementwise, "time_graph", time_graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sets = [(torch.randn(3, 5, requires_grad=True),) for _ in range(elementwise._SETS)]
    before = [inputs[0].detach().clone() for inputs in sets]
    row = elementwise._measure(
        Implementation(lambda x: (_Overwriting.apply(x),), overwrites=True), sets
    )
    backward = gradients[2 * elementwise._SETS :]
    for first, second in zip(backward, backward[elementwise._SETS :], strict=False):
        assert torch.equal(first, second)
    assert all(torch.equal(inputs[0], x) for inputs, x in zip(sets, before, strict=True))
    # What cannot be captured is timed through autograd, and says so.
    assert row["backward_ms"] == row["autograd_backward_ms"]
    assert (
        "capturing" in row["forward_not_captured"] and "capturing" in row["backward_not_captured"]
    )


@pytest.mark.gpu
def test_device_times_through_autograd() -> None:
    def make(dtype: torch.dtype, device: str) -> Tensors:
        return (torch.randn(64, 256, device=device).to(dtype).requires_grad_(),)

    implementations = {
        OURS: Implementation(torch.square),
        "overwriting": Implementation(_Overwriting.apply, overwrites=True),
        "another function": Implementation(torch.sigmoid),
    }
    op = Op(
        "square", ("x",), ("y",), OURS, torch.square, implementations, {"none": "not installed"}
    )
    result = Report("test")
    elementwise._measure_case(result, op, Case("square", "64×256", 1, 1, make), Timing(1, 1, 1))
    ours, overwriting, another, absent = result.rows
    for row in (ours, overwriting):
        assert 0 < row["forward_ms"]["median"] < 1 and 0 < row["backward_ms"]["median"] < 1
        assert not any(key.endswith("not_captured") for key in row)
    assert "differs from stock" in another["unavailable"]
    assert absent["unavailable"] == "not installed"
