"""Linear layer with cross-entropy, forward and backward: time, memory and error beside all rivals.

TFLOP/s count the products that cannot be avoided over the rows that have a label: 6·N·H·V with a trained
head, 4·N·H·V with a frozen one. "Pure GEMM" is the time of those products alone, in the same run. Extra
bytes are the peak of a call after the first, above what was there before; the gradients are among them.

Every timed call stands behind a matrix product, as a head stands behind the layers of its model: what the
host does before it must wait for the device costs nothing, and waiting does. Ours counts its targets before
that product, as a patched model does; "ours, target not counted before" is a plain call of the op.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from barqtrain_hf.benchmarks.harness import Report, Timing, copy_bandwidth, time_gpu
from barqtrain_hf.benchmarks.head_anchors import IGNORE_INDEX, LIGER, Loss, anchors, reason
from barqtrain_hf.ops import CountedTarget, linear_cross_entropy
from barqtrain_hf.ops._cross_entropy_rows import LossTerms, RowContext

GIB = 2**30
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Of device time per measurement: some 25 calls of the largest cases, 100 at most of the small ones.
_MILLISECONDS = 1000.0
# Rows taken at once where a reference needs logits in fp32 or fp64.
_CHUNK = 256


OURS, PLAIN = "ours", "ours, target not counted before"


@dataclass
class Ours:
    """Our op as a patched model calls it."""

    max_extra_bytes: int | None = None
    counted: CountedTarget | None = None

    def prepare(self, target: torch.Tensor) -> None:
        """What the model does at the start of its forward pass."""
        self.counted = CountedTarget(target)

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        counted, self.counted = self.counted, None
        extra = self.max_extra_bytes
        return linear_cross_entropy(hidden, weight, counted or target, max_extra_bytes=extra)


@dataclass(frozen=True)
class Case:
    """One shape of the head; ``sweep_gib`` are total extra sizes at which ours is measured too."""

    rows: int
    hidden: int
    vocab: int
    trained: bool
    ignored: float = 0.0
    sweep_gib: tuple[float, ...] = ()

    @property
    def valid(self) -> int:
        """Rows with a label."""
        return self.rows - round(self.ignored * self.rows)

    def inputs(self, device: str = "cuda") -> Inputs:
        """Hidden states, weight and labels; the same at every call."""
        torch.manual_seed(0)
        hidden = torch.randn(self.rows, self.hidden, device=device).mul_(0.5).bfloat16()
        weight = torch.randn(self.vocab, self.hidden, device=device).mul_(0.02).bfloat16()
        target = torch.randint(self.vocab, (self.rows,), device=device)
        target[torch.randperm(self.rows, device=device)[self.valid :]] = IGNORE_INDEX
        return hidden.requires_grad_(), weight.requires_grad_(self.trained), target

    def tflops(self, ms: float) -> float:
        """Useful TFLOP/s of a call that took ``ms``."""
        products = 3 if self.trained else 2
        return products * 2 * self.valid * self.hidden * self.vocab / ms / 1e9

    def columns(self) -> dict[str, Any]:
        """What every row of this case starts with."""
        return {
            "rows": self.rows,
            "hidden": self.hidden,
            "vocab": self.vocab,
            "weight": "trained" if self.trained else "frozen",
            "ignored": self.ignored,
        }

    def __str__(self) -> str:
        ignored = f", {self.ignored:.0%} ignored" if self.ignored else ""
        weight = "trained" if self.trained else "frozen"
        return f"{self.rows}×{self.hidden}×{self.vocab} {weight}{ignored}"


CASES = (
    # From little more than the gradients to where more memory no longer helps; `_measure_case` adds
    # what Liger took.
    Case(8192, 4096, 128256, True, sweep_gib=(1.25, 1.4, 1.6, 1.8, 2.1, 2.5, 3.0)),
    Case(8192, 4096, 128256, False, sweep_gib=(0.1, 0.2, 0.3, 0.6, 1.1)),
    Case(16384, 2048, 151936, True),
    Case(16384, 2048, 151936, False),
    Case(8192, 2048, 151936, True),
    Case(8192, 2048, 151936, False),
    # One short batch: the weight and its gradient weigh more.
    Case(1024, 4096, 128256, True),
    Case(1024, 4096, 128256, False),
    # Prompts have no loss: gains only where ignored rows are dropped before the products.
    Case(8192, 4096, 128256, True, ignored=0.6),
    Case(8192, 4096, 128256, False, ignored=0.6),
)
# The whole main case, a chunk of it, a small vocabulary, and a Gemma's.
ROW_KERNEL_SHAPES = ((8192, 128256), (1024, 128256), (8192, 151936), (32768, 32000), (4096, 262144))
ACCURACY_CASES = (Case(1024, 4096, 128256, True), Case(1024, 2048, 151936, True))


def run(cases: Sequence[Case] = CASES, accuracy_cases: Sequence[Case] = ACCURACY_CASES) -> Report:
    """Measures every implementation in every case in bf16."""
    report = Report("linear_cross_entropy")
    copy = _ceilings(report)
    for rows, vocabulary in ROW_KERNEL_SHAPES:
        _row_kernel_alone(report, copy, rows, vocabulary)
    found, missing = anchors()
    implementations: dict[str, Loss] = {OURS: Ours(), PLAIN: linear_cross_entropy, **found}
    for case in cases:
        _measure_case(report, case, implementations, missing)
        _forget()
    for case in accuracy_cases:
        _measure_errors(report, case, implementations, missing)
        _forget()
    return report


def _ceilings(report: Report) -> Timing:
    """Adds the card's copy bandwidth and matrix rate; returns the former."""
    copy = copy_bandwidth()
    report.add(part="ceiling", implementation="device copy, read + write", tb_s=copy.median)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    ms = _time(lambda: torch.mm(left, right, out=out))
    tflops = 2 * 8192**3 / ms.median / 1e9
    report.add(part="ceiling", implementation="GEMM 8192³, random bf16", ms=ms, tflops=tflops)
    return copy


def _row_kernel_alone(report: Report, copy: Timing, rows: int, vocabulary: int) -> None:
    """The kernel between the products: TB/s of its one read and one write beside the copy bandwidth."""
    logits = torch.randn(rows, vocabulary, device="cuda").mul_(2).bfloat16()
    context = RowContext(
        torch.randint(vocabulary, (rows,), device="cuda"),
        torch.ones(1, device="cuda"),
        torch.empty(6, rows, device="cuda"),
        LossTerms(IGNORE_INDEX, 0.0, 0.0, None, 1.0),
        vocabulary,
        per_token=False,
        cuda=True,
    )
    slab = torch.empty_like(logits)
    columns = {"part": "row kernel", "rows": rows, "vocab": vocabulary}
    for name, elements, call in (
        (
            "statistics and gradient: one read, one write",
            2,
            lambda: context.rows(slab, 0, rows, write=True),
        ),
        ("statistics only: one read", 1, lambda: context.rows(slab, 0, rows, write=False)),
        (
            "gradient from statistics: one read, one write",
            2,
            lambda: context.strip(slab, 0, rows, slice(0, vocabulary)),
        ),
    ):
        # In place: each call gets the logits anew, and not from the cache.
        ms = time_gpu(call, repeats=30, warm_up=3, before=lambda: slab.copy_(logits))
        tb_s = elements * slab.nbytes / 1e9 / ms.median
        share = tb_s / copy.median
        report.add(**columns, implementation=name, ms=ms, tb_s=tb_s, share_of_copy=share)
        print(f"{rows}×{vocabulary} {name}: {ms.median:.3f} ms, {share:.0%}", file=sys.stderr)


def _measure_case(
    report: Report, case: Case, implementations: dict[str, Loss], missing: dict[str, str]
) -> None:
    inputs = case.inputs()
    products = _products(*inputs)
    gemm = _time(products, _layers("cuda"))
    del products  # and with it two buffers of all logits
    columns: dict[str, Any] = {"part": "case", **case.columns()}
    tflops = case.tflops(gemm.median)
    report.add(**columns, implementation="pure GEMM", ms=gemm, tflops=tflops, times_gemm=1.0)
    totals = {round(gib * GIB) for gib in case.sweep_gib}
    for name, loss in implementations.items():
        row = _measure(case, inputs, loss, gemm)
        if name in (OURS, PLAIN):
            row["max_extra_bytes"] = None  # its default
        _add(report, case, **columns, implementation=name, **row)
        if name == LIGER and case.sweep_gib and "extra_bytes" in row:
            totals.add(row["extra_bytes"])  # which of the two is faster at the same memory?
    for name, why in missing.items():
        _add(report, case, **columns, implementation=name, unavailable=why)
    gradients = sum(tensor.nbytes for tensor in inputs if tensor.requires_grad)
    columns["part"] = "sweep"
    for total in sorted(totals):
        limit = total - gradients
        row = _measure(case, inputs, Ours(limit), gemm)
        _add(report, case, **columns, implementation=OURS, **row, max_extra_bytes=limit)


def _measure(case: Case, inputs: Inputs, loss: Loss, gemm: Timing) -> dict[str, Any]:
    """Time and memory of one implementation, or why there are none."""
    try:
        extra_bytes = _extra_bytes(inputs, loss)
        layers = _layers(inputs[0].device)

        def before() -> None:
            if isinstance(loss, Ours):
                loss.prepare(inputs[2])
            layers()

        ms = _time(lambda: _step(inputs, loss), before)
    except Exception as error:
        # Out of memory, a kernel that does not build, a limit of its own: the row says so, and the
        # rest of a run of minutes goes on.
        return {"unavailable": reason(error)}
    finally:
        _drop_gradients(inputs)
    return {
        "ms": ms,
        "extra_bytes": extra_bytes,
        "tflops": case.tflops(ms.median),
        "times_gemm": ms.median / gemm.median,
    }


def _step(inputs: Inputs, loss: Loss) -> None:
    _drop_gradients(inputs)
    loss(*inputs).backward()


def _drop_gradients(inputs: Inputs) -> None:
    for tensor in inputs:
        tensor.grad = None


def _extra_bytes(inputs: Inputs, loss: Loss) -> int:
    """Peak of a call above what is allocated before it."""
    _step(inputs, loss)  # compiles, and allocates what stays
    _drop_gradients(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _step(inputs, loss)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _layers(device: torch.device | str) -> Callable[[], Any]:
    """Some 0.8 ms of work for the device."""
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return lambda: square @ square[:, :4096]


def _time(call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> Timing:
    once = time_gpu(call, repeats=3, warm_up=2, before=before).median
    repeats = min(max(round(_MILLISECONDS / once), 10), 100)
    return time_gpu(call, repeats=repeats, warm_up=2, before=before)


def _products(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    target: torch.Tensor,  # [N]
) -> Callable[[], None]:
    """The products of one call alone, for the rows with a label, into buffers that are there.

    The gradient of the logits is the true one, since the card's rate depends on its operands' values.
    """
    valid = target != IGNORE_INDEX
    rows, labels, weight_data = hidden.detach()[valid], target[valid], weight.detach()
    logits = rows @ weight_data.t()
    logits_grad = torch.empty_like(logits)
    for chunk, chunk_labels, out in zip(
        *(t.split(_CHUNK) for t in (logits, labels, logits_grad)), strict=True
    ):
        out.copy_(_logits_gradient(chunk.float(), chunk_labels) / len(labels))
    rows_grad = torch.empty_like(rows)
    weight_grad = torch.empty_like(weight_data) if weight.requires_grad else None

    def products() -> None:
        torch.mm(rows, weight_data.t(), out=logits)
        torch.mm(logits_grad, weight_data, out=rows_grad)
        if weight_grad is not None:
            torch.mm(logits_grad.t(), rows, out=weight_grad)

    return products


def _logits_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    gradient = torch.softmax(logits, dim=-1)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return gradient


def _measure_errors(
    report: Report, case: Case, implementations: dict[str, Loss], missing: dict[str, str]
) -> None:
    """Adds ‖x − x64‖ / ‖x64‖ of the loss and both gradients for every implementation."""
    inputs = case.inputs()
    hidden, weight, _ = inputs
    exact = _in_fp64(*inputs)
    columns: dict[str, Any] = {"part": "accuracy", **case.columns()}
    for name, loss_of in implementations.items():
        _drop_gradients(inputs)
        try:
            loss = loss_of(*inputs)
            loss.backward()
        except Exception as error:  # as in _measure
            _add(report, case, **columns, implementation=name, unavailable=reason(error))
            continue
        errors = {
            f"{part}_error": _relative_error(value, exact_value)
            for part, value, exact_value in zip(
                ("loss", "hidden_grad", "weight_grad"),
                (loss.detach(), hidden.grad, weight.grad),
                exact,
                strict=True,
            )
        }
        _add(report, case, **columns, implementation=name, **errors)
    for name, why in missing.items():
        _add(report, case, **columns, implementation=name, unavailable=why)


def _in_fp64(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    target: torch.Tensor,  # [N]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and both gradients of the same 16-bit inputs, every step in fp64."""
    valid = int((target != IGNORE_INDEX).sum())
    exact_weight = weight.detach().double()
    loss = exact_weight.new_zeros(())
    hidden_grad = torch.zeros_like(hidden, dtype=torch.float64)
    weight_grad = torch.zeros_like(exact_weight)
    for chunk, labels, chunk_grad in zip(
        *(t.split(_CHUNK) for t in (hidden.detach(), target, hidden_grad)), strict=True
    ):
        kept = labels != IGNORE_INDEX
        rows, labels = chunk[kept].double(), labels[kept]
        logits = rows @ exact_weight.t()
        label_logits = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        loss += (logits.logsumexp(-1) - label_logits).sum() / valid
        logits_grad = _logits_gradient(logits, labels) / valid
        chunk_grad[kept] = logits_grad @ exact_weight
        weight_grad += logits_grad.t() @ rows
    return loss, hidden_grad, weight_grad


def _relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _forget() -> None:
    """Drops one case's compiled code and memory, so that no case changes the next."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _add(report: Report, case: Case, **row: Any) -> None:
    """Adds a row and says so: the whole run takes minutes."""
    report.add(**row)
    result = row.get("unavailable") or ", ".join(
        f"{key} {value.median if isinstance(value, Timing) else value:.4g}"
        for key, value in row.items()
        if key in ("ms", "extra_bytes", "times_gemm") or key.endswith("_error")
    )
    print(f"{case}, {row['implementation']}: {result}", file=sys.stderr, flush=True)
