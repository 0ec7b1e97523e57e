"""LoRA beside PEFT and beside frozen weights alone: single layers, one of them in bitsandbytes' 4 bits, a
decoder layer, errors, and the bars.

Forward and backward through autograd, bf16, device time, implementations in turns as in the attention
benchmark. PEFT's adapters are fp32 by default and then run under autocast, as `Trainer` with ``bf16=True``
runs them; "bf16 adapters" is PEFT with ``autocast_adapter_dtype=False``. Memory is what a forward pass leaves
behind for the backward pass, its result included.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import nn

from barqtrain_hf.benchmarks import outcomes
from barqtrain_hf.benchmarks.elementwise import OURS
from barqtrain_hf.benchmarks.elementwise_anchors import Implementation, Tensors
from barqtrain_hf.benchmarks.harness import Report, Timing
from barqtrain_hf.benchmarks.rounds import interleave
from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.ops import lora_linear
from barqtrain_hf.ops._backend import Backend
from barqtrain_hf.ops.lora import lora_linear_reference

FROZEN, PEFT, PEFT_BF16 = "frozen weights alone", "PEFT, fp32 adapters", "PEFT, bf16 adapters"
STOCK_LAYER = "frozen weights alone, stock layer"
# Dimensions in and out of 16384 rows, rank, and at most how many times the frozen layer's time.
ROWS = 16384
LINEARS = (
    *((wide, out, 16, 1.12) for wide, out in ((2048, 8192), (8192, 2048), (4096, 4096))),
    (2048, 2048, 16, 1.25),
    *((wide, out, 64, 1.2) for wide, out in ((2048, 8192), (8192, 2048), (4096, 4096))),
)
QUANTIZED = ((4096, 4096, 16),)
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
DROPOUT = 0.05  # of the adapters, in one case
BATCH, LENGTH, LAYER_BAR, MEMORY_BAR, ERROR_BAR = 4, 4096, 1.15, 0.9, 1.0
Call = Callable[..., Any]


def run(
    linears: tuple[tuple[int, int, int, float], ...] = LINEARS,
    rows: int = ROWS,
    layer: dict[str, int] | None = None,
    batch: tuple[int, int] = (BATCH, LENGTH),
    quantized: tuple[tuple[int, int, int], ...] = QUANTIZED,
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
    wide, out, rank, _ = linears[0]
    torch.manual_seed(0)
    _measure(
        report,
        {"part": "dropout", "shape": f"{rows} × {wide} → {out}, r={rank}, dropout {DROPOUT}"},
        linear_calls(rows, wide, out, rank, DROPOUT),
    )
    for wide, out, rank in quantized:
        torch.manual_seed(0)
        shape = f"{rows} × {wide} → {out} in 4 bits, r={rank}"
        _measure_quantized(report, {"part": "quantized", "shape": shape}, rows, wide, out, rank)
    torch.manual_seed(0)
    layer = LAYER if layer is None else layer
    shape = f"a Llama-3.2-1B layer, {batch[0]}×{batch[1]} tokens, r=16"
    columns = {"part": "layer", "shape": shape, "bar": LAYER_BAR}
    _measure(report, columns, layer_calls(layer, *batch), layer["num_hidden_layers"])
    for wide, out in ((1000, 2056), (2048, 1024)):
        measure_errors(report, 4000, wide, out, 16)
    judge(report)
    return report


def linear_calls(
    rows: int,
    wide: int,
    out: int,
    rank: int,
    dropout: float = 0.0,
    in_4_bits: bool = False,
    device: str = "cuda",
) -> dict[str, Call]:
    """Forward passes by implementation."""
    base = nn.Linear(wide, out, bias=False, device=device, dtype=torch.bfloat16)
    base.weight.requires_grad_(False)
    if in_4_bits:
        base = _quantized(base)
    x = torch.randn(rows, wide, device=device, dtype=torch.bfloat16).requires_grad_()
    calls: dict[str, Call] = {FROZEN: lambda: base(x)}
    for name in (PEFT, PEFT_BF16, OURS):
        calls[name] = _forward(_adapted(nn.Sequential(base), rank, name, dropout), x)
    return calls


def _quantized(linear: nn.Linear) -> Any:
    """As QLoRA has it: nf4, its scales quantised too."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    wide, out, device = linear.in_features, linear.out_features, linear.weight.device
    layer = Linear4bit(wide, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = Params4bit(linear.weight.data.cpu(), quant_type="nf4", module=layer)
    layer.weight = weight.to(device)
    return layer


def _measure_quantized(
    report: Report, columns: dict[str, Any], rows: int, wide: int, out: int, rank: int
) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        reason = "bitsandbytes is not installed: pip install 'barqtrain_hf[qlora]'"
        report.add(**columns, implementation=OURS, unavailable=reason)
        return
    _measure(report, columns, linear_calls(rows, wide, out, rank, in_4_bits=True))


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
        calls[name] = _forward(adapted, inputs_embeds=x, use_cache=False)
    return calls


def _forward(model: Any, *args: Any, **kwargs: Any) -> Call:
    """The model's call, under autocast where adapters are fp32."""
    mixed = any(p.dtype is torch.float32 for p in model.parameters())

    def call(layers: int | None = None) -> Any:
        if layers is not None:
            model.config.num_hidden_layers = layers  # of those that there are
        with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
            out = model(*args, **kwargs)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    return call


def _adapted(model: nn.Module, rank: int, name: str, dropout: float = 0.0) -> Any:
    """The model under PEFT, patched if it is ours."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnsupportedError(
            "The benchmark compares with PEFT, which is not installed.",
            "pip install 'barqtrain_hf[peft]'",
        ) from None
    from barqtrain_hf import patch_model

    modules = dict(model.named_modules())
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
    quantized = any(type(modules[name]) is not nn.Linear for name in linear)
    model.is_loaded_in_4bit = quantized  # type: ignore[assignment]  # what PEFT goes by
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=linear,
        init_lora_weights=False,
    )
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
        trained = [n.variable for n in outcomes.nodes(out) if hasattr(n, "variable")]
        del out
        kept[name] = _kept(forward, layers)
        calls[name] = _step(forward, trained, upstream)
    rows = interleave(calls)
    base = rows[FROZEN].get("ms")
    for name, row in rows.items():
        if "ms" in row and base is not None:
            row |= {"of_frozen": row["ms"].median / base.median, "kept_gib": kept[name]}
            row["ms"] = Timing(*(value / layers for value in astuple(row["ms"])))
        report.add(**columns, implementation=name, **row)


def _kept(forward: Call, layers: int) -> float:
    """GiB that a forward pass leaves behind; of several layers, what one more adds."""

    def after(*count: int) -> float:
        gc.collect()
        before = torch.cuda.memory_allocated()
        out = forward(*count)
        amount = (torch.cuda.memory_allocated() - before) / 2**30
        del out
        return amount

    if layers == 1:
        return after()
    one, every = after(1), after(layers)  # in this order: the model goes on with all of them
    return (every - one) / (layers - 1)


def _step(forward: Call, trained: list[torch.Tensor], upstream: torch.Tensor) -> Call:
    return lambda: torch.autograd.grad(forward(), trained, upstream)


def measure_errors(
    report: Report,
    rows: int,
    wide: int,
    out: int,
    rank: int,
    backend: Backend = "cuda",
    device: str = "cuda",
) -> None:
    """Relative errors against fp64 of ours and PEFT's, both in bf16, over eight draws."""
    stock = Implementation(partial(lora_linear_reference, scaling=2.0))
    ours = Implementation(partial(lora_linear, scaling=2.0, backend=backend))
    draws: dict[str, list[Tensors]] = {"ours": [], "stock": [], "exact": []}
    for seed in range(8):
        inputs = _inputs(seed, rows, wide, out, rank, device)
        double = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        draws["ours"].append(outcomes.results(ours, inputs))
        draws["stock"].append(outcomes.results(stock, inputs))
        draws["exact"].append(outcomes.results(stock, double, torch.bfloat16))
    all_draws = {n: tuple(map(torch.cat, zip(*found, strict=True))) for n, found in draws.items()}
    names = ("y", "gradient of x", "gradient of A", "gradient of B")
    errors = (outcomes.errors(all_draws[n], all_draws["exact"]) for n in ("ours", "stock"))
    for name, mine, theirs in zip(names, *errors, strict=True):
        shape = f"{rows} × {wide} → {out}, r={rank}"
        report.add(part="errors", shape=shape, tensor=name, ours=mine, peft=theirs)


def _inputs(seed: int, rows: int, wide: int, out: int, rank: int, device: str) -> Tensors:
    """x, the frozen weight, A and B of one draw, in bf16."""
    torch.manual_seed(seed)
    shapes = ((rows, wide), (out, wide), (rank, wide), (out, rank))
    scales = (wide**-0.5, wide**-0.5, wide**-0.5, rank**-0.5)
    return tuple(
        (torch.randn(shape, device=device) * scale).bfloat16().requires_grad_(i != 1)
        for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
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
