"""Causal attention beside all rivals: dense and packed, host time, memory, errors, and the bars.

All times are of the device, for every implementation alike: some milliseconds of calls, forward or backward
through autograd, are queued while the device waits, so that the host's work is not in them (a row says in how
many rounds it may be). Implementations take turns, one of each per round and in any order, so that drifts of
the clock meet all. CUDA graphs would do as well, but ours refuses documents in them. TFLOP/s count 4·H·D
operations for each pair of a query and a key that it sees, T² / 2 per document, forward, and 2.5 times as
many backward. Every implementation's result and gradients are compared with PyTorch's before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from barqtrain_hf.benchmarks import attention_anchors as anchors
from barqtrain_hf.benchmarks import elementwise, outcomes
from barqtrain_hf.benchmarks.attention_cases import (
    AUTO,
    BARE,
    DENSE,
    ELEMENTWISE,
    ERRORS,
    HOST,
    PACKED,
    PORTABLE,
    SHORT,
    Candidates,
    Case,
    bare,
    candidates,
)
from barqtrain_hf.benchmarks.elementwise import OURS
from barqtrain_hf.benchmarks.elementwise_anchors import Implementation, Tensors, reason
from barqtrain_hf.benchmarks.harness import Report, time_host
from barqtrain_hf.benchmarks.rounds import in_rounds, interleave
from barqtrain_hf.ops._backend import Backend

# Microseconds of host time of a forward call, and errors beside FA2's.
HOST_BAR, ERROR_BAR = 25.0, 1.25
_HOST_ROUNDS = 5

# Bytes by which the allocator may round what a call keeps.
_ROUNDING = 4096


def run(
    dense: Sequence[Case] = (*DENSE, *SHORT),
    packed: Sequence[Case] = PACKED,
    host: Case = HOST,
    errors: Sequence[Case] = ERRORS,
) -> Report:
    """Measures every implementation at every shape."""
    report = Report("attention")
    for case in (*dense, *packed):
        chosen = candidates(case)
        _measure_case(report, case, chosen)
        _measure_memory(report, case, chosen)
        del chosen
        elementwise._forget()
    _measure_host(report, host, candidates(host, flex=False))
    elementwise._forget()
    for case in errors:
        measure_errors(report, case)
    judge(report)
    return report


def _measure_case(report: Report, case: Case, chosen: Candidates) -> None:
    """Time and TFLOP/s of each implementation, and its time beside the rival's that the bar names."""
    inputs = case.inputs(torch.bfloat16, "cuda")
    rows: dict[str, dict[str, Any]] = {}
    available = check(chosen, inputs, rows)
    prepare = {"forward": _forward}
    prepare |= {"forward_backward": _both} if case.lengths else {"backward": _backward}
    for direction, of in prepare.items():
        calls = {name: of(implementation, inputs) for name, implementation in available.items()}
        for name, row in interleave(calls).items():
            if "unavailable" in row:
                rows[name].update(row)
                continue
            ms = row.pop("ms")
            rows[name][f"{direction}_ms"] = ms
            rows[name][f"{direction}_tflops"] = case.tflops(direction, ms.median)
            rows[name].update({f"{direction}_{key}": value for key, value in row.items()})
    rows.update({name: {"unavailable": why} for name, why in chosen.missing.items()})
    rival = anchors.FLEX if case.lengths else anchors.FLASH
    for name, row in rows.items():
        for direction in prepare:
            ms, other = row.get(f"{direction}_ms"), rows.get(rival, {}).get(f"{direction}_ms")
            if ms and other:
                row[f"{direction}_of_rival"] = ms.median / other.median
        columns = {"part": case.part, "shape": str(case), "implementation": name, "rival": rival}
        elementwise._add(report, **columns, **row, flex_bar=case.flex_bar)


def check(
    chosen: Candidates, inputs: Tensors, rows: dict[str, dict[str, Any]]
) -> dict[str, Implementation]:
    """Those that compute the same as PyTorch, with a row begun; the rows of the others say why not."""
    available = {}
    ours = None
    for name, implementation in chosen.found.items():
        try:
            out = implementation.call(*inputs)  # a node of Python's does not outlive it
            nodes = {node.name() for node in outcomes.nodes(out)}
            del out
            if name == AUTO and nodes == ours:
                continue  # the same kernel by another name
            expected = outcomes.results(chosen.stock_of(name), inputs)
            outcomes.check(outcomes.results(implementation, inputs), expected)
        except Exception as error:
            # A kernel that does not build, a limit of its own, no memory: the row says so.
            rows[name] = {"unavailable": reason(error)}
            continue
        available[name], rows[name] = implementation, {}
        if name == OURS:
            ours = nodes
        if name == AUTO:
            rows[name] = {"runs": ", ".join(sorted(nodes))}
    return available


def _forward(implementation: Implementation, inputs: Tensors) -> Callable[[], Any]:
    return partial(implementation.call, *inputs)


def _backward(implementation: Implementation, inputs: Tensors) -> Callable[[], Any]:
    out = implementation.call(*inputs)
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True)


def _both(implementation: Implementation, inputs: Tensors) -> Callable[[], Any]:
    upstream = torch.randn_like(implementation.call(*inputs))
    return lambda: torch.autograd.grad(implementation.call(*inputs), inputs, upstream)


def _measure_memory(report: Report, case: Case, chosen: Candidates) -> None:
    """Bytes of a forward call beyond its result, and of a backward call beyond the gradients."""
    inputs = case.inputs(torch.bfloat16, "cuda")
    lse = 4 * case.heads * case.batch * case.tokens
    for name in (OURS, anchors.FLASH, anchors.CUDNN, anchors.VARLEN):
        if name in chosen.found:
            columns = {"part": "memory", "shape": str(case), "implementation": name}
            try:
                row = _memory(chosen.found[name], inputs)
            except Exception as error:  # as in check
                row = {"unavailable": reason(error)}
            elementwise._add(report, **columns, lse_bytes=lse, **row)


def _memory(implementation: Implementation, inputs: Tensors) -> dict[str, Any]:
    _both(implementation, inputs)()  # compiles, and allocates what stays
    # As in a model: nobody but the graph holds q, k and v after the call, so that what it keeps in their
    # place counts for nothing. The peak is while the caller has them still.
    given = [x.clone() for x in inputs]
    before = _reset_peak()
    out = implementation.call(*given)
    peak = torch.cuda.max_memory_allocated() - before - out.nbytes
    del given
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    upstream = torch.randn_like(out)
    before = _reset_peak()
    gradients = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    workspace = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in gradients)
    return {
        "forward_kept_bytes": kept,
        "forward_peak_bytes": peak,
        "backward_workspace_bytes": workspace,
    }


def _reset_peak() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _measure_host(report: Report, case: Case, chosen: Candidates) -> None:
    """Microseconds per iteration where the device waits for the host; boundaries are known already."""
    inputs = case.inputs(torch.bfloat16, "cuda")
    columns = {"part": "host", "op": "attention", "shape": str(case)}
    rows: dict[str, dict[str, Any]] = {}
    implementations = check(chosen, inputs, rows)

    def measure(name: str, first: bool) -> dict[str, Any]:
        warm_up = 500 if first else 100
        return elementwise._host_times(implementations[name], inputs, inputs, 3, warm_up)

    for name, row in in_rounds(implementations, measure, _HOST_ROUNDS).items():
        rows[name] = row if "unavailable" in row else rows[name] | row
    x = torch.ones(1024, device="cuda")
    with torch.no_grad():
        rows[BARE] = {"forward_us": time_host(bare(case, inputs))}
    rows[ELEMENTWISE] = {"forward_us": time_host(lambda: torch.mul(x, 2.0, out=x))}
    rows.update({name: {"unavailable": why} for name, why in chosen.missing.items()})
    for name, row in rows.items():
        elementwise._add(report, **columns, implementation=name, **row)


def measure_errors(
    report: Report, case: Case, backend: Backend = "cuda", device: str = "cuda"
) -> None:
    """Adds ‖x − x64‖ / ‖x64‖ of ours and of FA2 for the result and the gradients, in both 16-bit dtypes."""
    found = candidates(case, backend, device).found
    exact = Implementation(anchors.by_document((case.tokens,)).call)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = case.inputs(dtype, device)
        wide = tuple(t.detach().double().requires_grad_() for t in inputs)
        expected = outcomes.results(exact, wide, dtype)
        columns = {"part": "accuracy", "shape": str(case)}
        columns["dtype"] = str(dtype).removeprefix("torch.")
        try:
            ours, flash = (
                outcomes.errors(outcomes.results(found[name], inputs), expected)
                for name in (OURS, anchors.FLASH)
            )
        except Exception as error:  # as in check
            elementwise._add(report, **columns, unavailable=reason(error))
            continue
        for tensor, one, other in zip(("out", "dq", "dk", "dv"), ours, flash, strict=True):
            ratio = one / other
            elementwise._add(report, **columns, tensor=tensor, ours=one, flash=other, ratio=ratio)


def judge(report: Report) -> None:
    """Adds the bars: in how many of the cases each is met, and the worst of them as a share of the limit.

    A case that could not be measured, or without its rival, does not meet its bar.
    """
    bars: dict[str, list[float | None]] = {}
    for row in report.rows:
        if row["part"] == "dense" and row["implementation"] in (OURS, PORTABLE):
            kernels = "" if row["implementation"] == OURS else "portable kernels: "
            bar = bars.setdefault(f"{kernels}forward and backward at least FA2's TFLOP/s", [])
            bar += [row.get(f"{direction}_of_rival") for direction in ("forward", "backward")]
        elif row.get("implementation", OURS) != OURS:
            continue
        elif row["part"] == "packed":
            share = row.get("forward_backward_of_rival")
            name = f"{row['shape']}: at most {row['flex_bar']} of flex_attention's time"
            bars[name] = [share and share / row["flex_bar"]]
            bar = bars.setdefault("packed: faster than FA2 after a RoPE kernel", [])
            bar.append(_of_varlen(report, row))
        elif row["part"] == "host":
            time = row.get("forward_us")
            bars[f"host time of a forward call at most {HOST_BAR:.0f} µs"] = [
                time and time["median"] / HOST_BAR
            ]
        elif row["part"] == "memory":
            bar = bars.setdefault("a forward call keeps nothing but result, q, k, v and LSE", [])
            kept = row.get("forward_kept_bytes")
            bar.append(None if kept is None else kept / (row["lse_bytes"] + _ROUNDING))
        elif row["part"] == "accuracy":
            bar = bars.setdefault(f"errors at most {ERROR_BAR} times FA2's", [])
            ratio = row.get("ratio")
            bar.append(ratio and ratio / ERROR_BAR)
    for name, shares in bars.items():
        met = sum(share is not None and share <= 1 for share in shares)
        worst = max((share for share in shares if share is not None), default=None)
        columns: dict[str, Any] = {"of": len(shares), "met": met, "all_met": met == len(shares)}
        report.add(part="bars", bar=name, **columns, worst_share_of_limit=worst)


def _of_varlen(report: Report, ours: dict[str, Any]) -> float | None:
    """Our time beside that of the faster of the ways to call torch's varlen attention after RoPE."""
    times = [
        row["forward_backward_ms"]["median"]
        for row in report.rows
        if row.get("shape") == ours["shape"]
        and row.get("implementation", "").endswith(anchors.AFTER_ROPE)
        and row["implementation"].startswith(anchors.VARLEN)
        and "forward_backward_ms" in row
    ]
    if not times or "forward_backward_ms" not in ours:
        return None
    return float(ours["forward_backward_ms"]["median"] / min(times))
