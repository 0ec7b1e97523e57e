"""LoRA beside PEFT and beside frozen weights alone: single layers, a decoder layer, errors, and the bars.

Forward and backward through autograd, bf16, device time, implementations in turns as in the attention
benchmark. PEFT's adapters are fp32 by default and then run under autocast, as `Trainer` with ``bf16=True``
runs them; "bf16 adapters" is PEFT with ``autocast_adapter_dtype=False``. Memory is what a forward pass leaves
behind for the backward pass, its result included.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from barqtrain_hf.benchmarks.attention import interleave
from barqtrain_hf.benchmarks.elementwise import OURS
from barqtrain_hf.benchmarks.harness import Report, Timing
from barqtrain_hf.errors import UnsupportedError

FROZEN, PEFT, PEFT_BF16 = "frozen weights alone", "PEFT, fp32 adapters", "PEFT, bf16 adapters"
STOCK_LAYER = "frozen weights alone, stock layer"
# Dimensions in and out of 16384 rows, rank, and at most how many times the frozen layer's time.
ROWS = 16384
LINEARS = (
    *((wide, out, 16, 1.12) for wide, out in ((2048, 8192), (8192, 2048), (4096, 4096))),
    (2048, 2048, 16, 1.25),
    *((wide, out, 64, 1.2) for wide, out in ((2048, 8192), (8192, 2048), (4096, 4096))),
)
# Layers of Llama-3.2-1B, some, so that what a model does once a pass is a small part.
LAYER: dict[str, int] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128,
    "num_hidden_layers": 4,
}
BATCH, LENGTH, LAYER_BAR, MEMORY_BAR, ERROR_BAR = 4, 4096, 1.15, 0.9, 1.0
Call = Callable[[], Any]


def run(
    linears: tuple[tuple[int, int, int, float], ...] = LINEARS,
    rows: int = ROWS,
    layer: dict[str, int] | None = None,
    batch: tuple[int, int] = (BATCH, LENGTH),
) -> Report:
    """Measures every implementation at every shape."""
    report = Report("lora")
    for wide, out, rank, bar in linears:
        torch.manual_seed(0)
        _measure(
            report,
            {"part": "linear", "shape": f"{rows} × {wide} → {out}, r={rank}", "bar": bar},
            linear_calls(rows, wide, out, rank),
        )
    torch.manual_seed(0)
    layer = LAYER if layer is None else layer
    shape = f"a Llama-3.2-1B layer, {batch[0]}×{batch[1]} tokens, r=16"
    columns = {"part": "layer", "shape": shape, "bar": LAYER_BAR}
    _measure(report, columns, layer_calls(layer, *batch), layer["num_hidden_layers"])
    for wide, out in ((1000, 520), (2048, 512)):
        measure_errors(report, 1031, wide, out, 16)
    judge(report)
    return report


def linear_calls(rows: int, wide: int, out: int, rank: int) -> dict[str, Call]:
    """Forward passes by implementation."""
    base = nn.Linear(wide, out, bias=False, device="cuda", dtype=torch.bfloat16)
    base.weight.requires_grad_(False)
    x = torch.randn(rows, wide, device="cuda", dtype=torch.bfloat16).requires_grad_()
    calls: dict[str, Call] = {FROZEN: lambda: base(x)}
    for name in (PEFT, PEFT_BF16, OURS):
        calls[name] = _forward(_adapted(nn.Sequential(base), rank, name), x)
    return calls


def layer_calls(config: dict[str, int], batch: int, length: int) -> dict[str, Call]:
    """Forward passes of some decoder layers by implementation."""
    from transformers import LlamaConfig, LlamaModel

    from barqtrain_hf import patch_model

    calls: dict[str, Call] = {}
    hidden = config["hidden_size"]
    x = torch.randn(batch, length, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    for name in (STOCK_LAYER, FROZEN, PEFT, PEFT_BF16, OURS):
        with torch.device("cuda"):
            model = LlamaModel(LlamaConfig(**config, attn_implementation="sdpa")).bfloat16()  # type: ignore[arg-type]
        model.train().requires_grad_(False)
        adapted = model if name in (STOCK_LAYER, FROZEN) else _adapted(model, 16, name)
        if name == FROZEN:
            patch_model(model, fused_head=False)
        calls[name] = _layer_forward(adapted, x)
    return calls


def _layer_forward(model: Any, x: torch.Tensor) -> Call:
    def call() -> Any:
        with _precision(model):
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

    return call


def _forward(model: Any, x: torch.Tensor) -> Call:
    def call() -> Any:
        with _precision(model):
            return model(x)

    return call


def _precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast where adapters are fp32."""
    mixed = any(p.dtype is torch.float32 for p in model.parameters())
    return torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()


def _adapted(model: nn.Module, rank: int, name: str) -> Any:
    """The model under PEFT, patched if it is ours."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnsupportedError(
            "The benchmark compares with PEFT, which is not installed.",
            "pip install 'barqtrain_hf[peft]'",
        ) from None
    from barqtrain_hf import patch_model

    linear = [n for n, module in model.named_modules() if type(module) is nn.Linear]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, init_lora_weights=False)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=name != PEFT_BF16)
    if name == OURS:
        patch_model(adapted, fused_head=False)
    return adapted.train()


def _measure(
    report: Report, columns: dict[str, Any], forwards: dict[str, Call], layers: int = 1
) -> None:
    calls, kept = {}, {}
    for name, forward in forwards.items():
        out = forward()
        upstream = torch.randn_like(out)
        trained = _leaves(out)
        del out
        gc.collect()
        before = torch.cuda.memory_allocated()
        out = forward()
        kept[name] = (torch.cuda.memory_allocated() - before) / 2**30 / layers
        del out
        calls[name] = _step(forward, trained, upstream)
    rows = interleave(calls)
    for name, row in rows.items():
        base = rows[FROZEN].get("ms")
        if "ms" in row and base is not None:
            row |= {"of_frozen": row["ms"].median / base.median, "kept_gib": kept[name]}
            row["ms"] = Timing(*(value / layers for value in astuple(row["ms"])))
        report.add(**columns, implementation=name, **row)


def _step(forward: Call, trained: list[torch.Tensor], upstream: torch.Tensor) -> Call:
    return lambda: torch.autograd.grad(forward(), trained, upstream)


def _leaves(out: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a graph asks for gradients of."""
    leaves, todo, seen = [], [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [parent for parent, _ in node.next_functions]
    return leaves


def measure_errors(report: Report, rows: int, wide: int, out: int, rank: int) -> None:
    """Relative errors against fp64 of ours and PEFT's, both in bf16."""
    from barqtrain_hf.ops import lora_linear
    from barqtrain_hf.ops.lora import lora_linear_reference

    names = ("y", "gradient of x", "gradient of A", "gradient of B")
    totals = {name: [0.0, 0.0, 0.0] for name in names}
    for seed in range(8):
        torch.manual_seed(seed)
        shapes = ((rows, wide), (rank, wide), (out, rank))
        leaves = [torch.randn(*s, device="cuda").bfloat16() * s[1] ** -0.5 for s in shapes]
        weight = (torch.randn(out, wide, device="cuda") * wide**-0.5).bfloat16()
        upstream = torch.randn(rows, out, device="cuda").bfloat16()

        def results(function: Any, wider: Callable[[Any], Any]) -> list[torch.Tensor]:
            given = [wider(leaf).detach().requires_grad_() for leaf in leaves]  # noqa: B023
            y = function(given[0], wider(weight), *given[1:], 2.0)  # noqa: B023
            return [y, *torch.autograd.grad(y, given, wider(upstream))]  # noqa: B023

        mine = results(lora_linear, lambda t: t)
        theirs = results(lora_linear_reference, lambda t: t)
        truth = results(lora_linear_reference, lambda t: t.double())
        for name, m, s, exact in zip(names, mine, theirs, truth, strict=True):
            totals[name][0] += (m.double() - exact).square().sum().item()
            totals[name][1] += (s.double() - exact).square().sum().item()
            totals[name][2] += exact.square().sum().item()
    for name, (ours, stock, size) in totals.items():
        report.add(
            part="errors",
            shape=f"{rows} × {wide} → {out}, r={rank}",
            tensor=name,
            ours=(ours / size) ** 0.5,
            peft=(stock / size) ** 0.5,
        )


def judge(report: Report) -> None:
    """How many cases meet each bar."""
    ours = [row for row in report.rows if row.get("implementation") == OURS and "ms" in row]
    linear = [row["of_frozen"] <= row["bar"] for row in ours if row["part"] == "linear"]
    layers = [row for row in ours if row["part"] == "layer"]
    errors = [row["ours"] <= ERROR_BAR * row["peft"] for row in report.rows if "peft" in row]
    bars = {
        "a layer at most 1.12 (r=64: 1.2; 2048 → 2048: 1.25) times the frozen one's time": linear,
        f"a decoder layer at most {LAYER_BAR} times the frozen one's time": [
            row["of_frozen"] <= row["bar"] for row in layers
        ],
        f"a decoder layer keeps at most {MEMORY_BAR} GiB": [
            row["kept_gib"] <= MEMORY_BAR for row in layers
        ],
        "errors at most PEFT's": errors,
    }
    for bar, met in bars.items():
        report.add(part="bars", bar=bar, met=sum(met), of=len(met))
