"""What the benchmarks of norms, gated activations and RoPE share: timing, errors, and verdicts.

Each implementation is timed twice. "Device" time is that of the kernels alone, forward or backward, replayed
from a CUDA graph captured through autograd: every rival is compared without its host's work. "Through
autograd" is one eager call between two events, which on small shapes waits for the host. Several sets of
inputs take turns, together larger than the cache. Rivals are timed in rounds. TB/s count the bytes that
cannot be avoided, in bf16.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from barqtrain_hf.benchmarks import outcomes
from barqtrain_hf.benchmarks.elementwise_anchors import Implementation, Tensors, reason
from barqtrain_hf.benchmarks.harness import (
    Report,
    Timing,
    capture_stream,
    copy_bandwidth,
    time_gpu,
    time_graph,
    time_host,
)
from barqtrain_hf.benchmarks.outcomes import as_tuple
from barqtrain_hf.benchmarks.rounds import in_rounds

OURS, OURS_KERNEL = "ours", "ours, its kernel"
# Shares of the copy bandwidth, and errors beside stock's (1 % more is the noise of one draw).
FORWARD_BAR, BACKWARD_BAR, ERROR_BAR = 0.9, 0.8, 1.01

# Sets of inputs that take turns.
_SETS = 4
# Of device time in one graph; replays of it and eager calls in a round; rounds of both kinds.
_MILLISECONDS, _REPLAYS, _EAGER, _ROUNDS, _HOST_ROUNDS = 4.0, 8, 16, 3, 15
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Op:
    """An op and all that compute it, each from the same inputs; ``missing`` says why others could not."""

    name: str
    inputs: tuple[str, ...]  # those with gradients
    outputs: tuple[str, ...]
    stock: str  # what ours stands for in a model: one of the implementations
    exact: Callable[..., Any]  # the definition, in the inputs' dtype throughout
    implementations: dict[str, Implementation]
    missing: dict[str, str]


@dataclass(frozen=True)
class Case:
    """One shape of an op, with the bytes that cannot be avoided."""

    op: str
    shape: str
    forward_bytes: int
    backward_bytes: int
    make: Callable[[torch.dtype, str], Tensors]  # new random inputs on a device
    in_bars: bool = True  # among the cases for which shares and rivals decide


def run_cases(
    report: Report,
    ops: Sequence[Op],
    cases: Sequence[Case],
    small: Sequence[Case],
    errors: Sequence[Case],
    automatic: Sequence[Op] = (),
) -> None:
    """Fills a report: bandwidth of ``cases``, host time of ``small`` ones, errors, and the verdicts.

    ``ops`` take our kernels. ``automatic`` are the same with the choice users get, which may be PyTorch's
    kernel for small inputs: both are timed there.
    """
    # The timed backward passes run repeatedly over one graph.
    torch._functorch.config.donated_buffer = False
    copy = copy_bandwidth()
    report.add(part="ceiling", implementation="device copy, read + write", tb_s=copy.median)
    named = {op.name: op for op in ops}
    for case in cases:
        _measure_case(report, named[case.op], case, copy)
        _forget()
    chosen = {op.name: op.implementations[OURS] for op in automatic}
    for case in small:
        _measure_host(report, named[case.op], case, chosen.get(case.op))
        _forget()
    for case in errors:
        measure_errors(report, named[case.op], case)
        _forget()
    judge(report)


def _measure_case(report: Report, op: Op, case: Case, copy: Timing) -> None:
    columns = {"part": "bandwidth", "op": op.name, "shape": case.shape, "in_bars": case.in_bars}
    with torch.cuda.stream(capture_stream()):
        sets = [case.make(torch.bfloat16, "cuda") for _ in range(_SETS)]
        expected = outcomes.results(op.implementations[op.stock], sets[0])

        def measure(name: str, first: bool) -> dict[str, Any]:
            implementation = op.implementations[name]
            if first:
                outcomes.check(outcomes.results(implementation, sets[0]), expected)
            return _measure(implementation, sets)

        rows = in_rounds(op.implementations, measure, _ROUNDS)
    for name, row in rows.items():
        if "unavailable" not in row:
            for direction in ("forward", "backward"):
                size = getattr(case, f"{direction}_bytes")
                tb_s = size / 1e9 / row[f"{direction}_ms"].median
                row[f"{direction}_tb_s"] = tb_s
                row[f"{direction}_share_of_copy"] = tb_s / copy.median
        _add(report, **columns, implementation=name, **row)
    for name, why in op.missing.items():
        _add(report, **columns, implementation=name, unavailable=why)


def _measure(implementation: Implementation, originals: Sequence[Tensors]) -> dict[str, Any]:
    """Device time and time through autograd of both directions."""
    sets = [implementation.prepare(outcomes.copies(inputs)) for inputs in originals]
    turn = itertools.cycle(range(len(sets)))

    def forward() -> Any:
        return implementation.call(*sets[next(turn)])

    row: dict[str, Any] = {}
    row.update(_both_times("forward", forward, lambda: None, None))
    outputs = [as_tuple(implementation.call(*inputs)) for inputs in sets]
    upstream = [tuple(map(torch.randn_like, output)) for output in outputs]
    wanted = [outcomes.trained(inputs) for inputs in sets]
    # Some write their gradients over what they saved: it is put back before every replay.
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    if implementation.overwrites:
        functions = (y.grad_fn for output in outputs for y in output)
        saved = [(t.data, t.clone()) for function in functions for t in function.saved_tensors]

    def backward() -> Any:
        i = next(turn)
        return torch.autograd.grad(outputs[i], wanted[i], upstream[i], retain_graph=True)

    def restore() -> None:
        for tensor, content in saved:
            tensor.copy_(content)

    calls = len(sets) if saved else None
    row.update(_both_times("backward", backward, restore, calls))
    return row


def _both_times(
    direction: str, call: Callable[[], Any], before: Callable[[], None], calls: int | None
) -> dict[str, Any]:
    eager = time_gpu(call, repeats=_EAGER, warm_up=4, before=before)
    if calls is None:
        calls = _SETS * min(max(round(_MILLISECONDS / eager.median / _SETS), 1), 10)
    row: dict[str, Any] = {}
    try:
        device = time_graph(call, calls=calls, repeats=_REPLAYS, before=before)
    except Exception as error:
        # It cannot be captured: its time through autograd stands for it, and the row says so.
        device, row[f"{direction}_not_captured"] = eager, reason(error)
        torch.cuda.synchronize()
    return {f"{direction}_ms": device, f"autograd_{direction}_ms": eager, **row}


def _measure_host(report: Report, op: Op, case: Case, chosen: Implementation | None) -> None:
    """Microseconds per iteration where the device waits for the host."""
    columns = {"part": "host", "op": op.name, "shape": case.shape}
    implementations = dict(op.implementations)
    if chosen is not None:
        implementations = {OURS: chosen, OURS_KERNEL: op.implementations[OURS], **implementations}
        implementations[OURS] = chosen
    originals = case.make(torch.bfloat16, "cuda")

    def measure(name: str, first: bool) -> dict[str, Any]:
        inputs = implementations[name].prepare(outcomes.copies(originals))
        warm_up = 500 if first else 100
        return _host_times(implementations[name], inputs, outcomes.trained(inputs), 3, warm_up)

    for name, row in in_rounds(implementations, measure, _HOST_ROUNDS).items():
        _add(report, **columns, implementation=name, **row)
    for name, why in op.missing.items():
        _add(report, **columns, implementation=name, unavailable=why)


def _host_times(
    implementation: Implementation,
    inputs: Tensors,
    wanted: Tensors,
    repeats: int = 7,
    warm_up: int = 500,  # until clocks and caches of the host are as they stay
) -> dict[str, Any]:
    upstream = tuple(map(torch.randn_like, as_tuple(implementation.call(*inputs))))

    def forward() -> None:
        implementation.call(*inputs)

    def gradients() -> None:
        torch.autograd.grad(as_tuple(implementation.call(*inputs)), wanted, upstream)

    def backward() -> None:
        for tensor in wanted:
            tensor.grad = None
        torch.autograd.backward(as_tuple(implementation.call(*inputs)), upstream)

    row = {}
    for name, call in (("forward", forward), ("grad", gradients), ("step", backward)):
        with torch.set_grad_enabled(name != "forward"):
            for _ in range(warm_up):
                call()
            row[f"{name}_us"] = time_host(call, calls=200, repeats=repeats)
    for tensor in wanted:
        tensor.grad = None
    return row


def measure_errors(report: Report, op: Op, case: Case, device: str = "cuda") -> None:
    """Adds ‖x − x64‖ / ‖x64‖ of ours and of stock for outputs and gradients, in each dtype."""
    for dtype in _DTYPES:
        inputs = case.make(dtype, device)
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        exact = outcomes.results(Implementation(op.exact), tuple(wide), dtype)
        found = {
            name: outcomes.errors(outcomes.results(op.implementations[name], inputs), exact)
            for name in (OURS, op.stock)
        }
        tensors = (*op.outputs, *(f"gradient of {name}" for name in op.inputs))
        for tensor, ours, stock in zip(tensors, found[OURS], found[op.stock], strict=True):
            _add(
                report,
                **{"part": "accuracy", "op": op.name, "shape": case.shape},
                **{"dtype": str(dtype).removeprefix("torch."), "tensor": tensor},
                **{"ours": ours, "stock": stock, "stock_is": op.stock},
                within_bar=ours <= ERROR_BAR * stock,
            )


def judge(report: Report) -> None:
    """Adds what the rows say: each direction of a case beside copy and the best rival, then the bars."""
    for rows in _groups(report, "bandwidth"):
        ours = next((row for row in rows if row["implementation"] == OURS), {})
        rivals = [row for row in rows if row is not ours and "forward_ms" in row]
        for direction, bar in (("forward", FORWARD_BAR), ("backward", BACKWARD_BAR)):
            verdict = {
                "part": "verdict",
                **{key: rows[0][key] for key in ("op", "shape", "in_bars")},
            }
            verdict["direction"] = direction
            if "forward_ms" not in ours or not rivals:
                report.add(**verdict, met=False, unavailable=ours.get("unavailable"))
                continue
            share = ours[f"{direction}_share_of_copy"]
            rival, faster = _best(rivals, ours, f"{direction}_ms")
            eager_rival, eager_faster = _best(rivals, ours, f"autograd_{direction}_ms")
            report.add(
                **verdict,
                share_of_copy=share,
                share_met=share >= bar,
                best_rival=rival,
                times_faster=faster,
                met=share >= bar and faster > 1,
                autograd_rival=eager_rival,
                autograd_times_faster=eager_faster,
                not_compared=[row["implementation"] for row in rows if "unavailable" in row],
            )
    _add_bars(report)


def _best(rivals: list[dict[str, Any]], ours: dict[str, Any], key: str) -> tuple[str, float]:
    """The fastest rival, and how many times faster ours is."""
    time_of_best, name = min((_median(row, key), row["implementation"]) for row in rivals)
    return name, time_of_best / _median(ours, key)


def _add_bars(report: Report) -> None:
    verdicts = [row for row in report.rows if row["part"] == "verdict" and row["in_bars"]]
    bars: dict[str, list[bool]] = {
        f"forward at {FORWARD_BAR:.0%} of copy, backward at {BACKWARD_BAR:.0%}": [
            verdict.get("share_met", False) for verdict in verdicts
        ],
        "faster than every rival on the device": [
            verdict.get("times_faster", 0.0) > 1 for verdict in verdicts
        ],
        "faster than every rival through autograd": [
            verdict.get("autograd_times_faster", 0.0) > 1 for verdict in verdicts
        ],
    }
    for rows in _groups(report, "host"):
        times = {
            row["implementation"]: row["grad_us"]["median"] for row in rows if "grad_us" in row
        }
        for name in ("F.rms_norm", "F.layer_norm"):
            if name in times:
                bar = f"{rows[0]['op']}, host-bound: no slower than {name}"
                bars[bar] = [times.get(OURS, float("inf")) <= times[name]]
    errors = [row["within_bar"] for row in report.rows if row["part"] == "accuracy"]
    bars[f"errors at most {ERROR_BAR} times stock's"] = errors
    for bar, tests in bars.items():
        report.add(part="bars", bar=bar, of=len(tests), met=sum(tests), all_met=all(tests))


def _groups(report: Report, part: str) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report.rows:
        if row["part"] == part:
            groups.setdefault((row["op"], row["shape"]), []).append(row)
    return list(groups.values())


def _median(row: dict[str, Any], key: str) -> float:
    return float(row[key]["median"])


def _forget() -> None:
    """Drops one case's compiled code and memory, so that no case changes the next."""
    torch.cuda.synchronize()
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


_START = time.monotonic()


def _add(report: Report, **row: Any) -> None:
    """Adds a row and says so: a whole run takes a minute or two."""
    report.add(**row)
    numbers = ", ".join(
        f"{key} {value.median if isinstance(value, Timing) else value:.4g}"
        for key, value in row.items()
        if isinstance(value, (float, Timing))
    )
    names = [
        str(row[key]) for key in ("op", "shape", "dtype", "tensor", "implementation") if key in row
    ]
    elapsed = time.monotonic() - _START
    what = row.get("unavailable") or numbers
    print(f"{elapsed:5.0f} s  {', '.join(names)}: {what}", file=sys.stderr, flush=True)
