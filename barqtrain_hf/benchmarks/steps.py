"""Whole training steps beside stock Trainer, torch.compile, Liger and Unsloth, on a model of Llama-3.2-1B's
shape.

Each run is a process of its own, one after another on the same machine: `Trainer` as users call it, bf16,
fused AdamW, 4 x 4096 random tokens a step. A step's time is that between the ends of two on the device, which
nobody is made to wait for.
"""

from __future__ import annotations

from typing import Any

from barqtrain_hf.benchmarks.apart import run_apart
from barqtrain_hf.benchmarks.harness import Report

NAMES = {
    "stock": "HF Trainer, sdpa",
    "compile": "+ torch_compile",
    "liger": "+ Liger",
    "unsloth": "Unsloth",
    "ours": "BarqTrainer",
}
# What is trained, with or without checkpointing, and beside whom.
CASES: tuple[tuple[str, bool, bool, tuple[str, ...]], ...] = (
    (
        "LoRA r=16 on all linear layers",
        True,
        False,
        ("stock", "compile", "liger", "unsloth", "ours"),
    ),
    ("LoRA r=16, gradient checkpointing", True, True, ("stock", "liger", "unsloth", "ours")),
    ("all weights", False, False, ("stock", "liger", "ours")),
)
MODEL: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
BATCH, LENGTH, STEPS = 4, 4096, 24
_MINUTES, _ALL_MINUTES = 3, 9  # that a run and all may take
# LoRA's bars: tokens per second beside Liger's, peak memory in GiB, distance of the loss from stock's.
LORA_SPEED, LORA_PEAK, LOSS = 1.5, 18.0, 1e-3


def run(
    model: dict[str, Any] | None = None,
    batch: int = BATCH,
    length: int = LENGTH,
    steps: int = STEPS,
    cases: tuple[tuple[str, bool, bool, tuple[str, ...]], ...] = CASES,
) -> Report:
    """Runs every case with every trainer."""
    report = Report("steps")
    shape = {"config": model or MODEL, "batch": batch, "length": length, "steps": steps}
    about, runs = [], []
    for case, lora, checkpointing, trainers in cases:
        for trainer in trainers:
            about.append({"case": case, "implementation": NAMES[trainer]})
            of_run = {"trainer": trainer, "lora": lora, "checkpointing": checkpointing}
            runs.append((trainer, {**of_run, **shape}))
    module = "barqtrain_hf.benchmarks.steps_run"
    results = run_apart(module, runs, 60 * _MINUTES, 60 * _ALL_MINUTES)
    for row, result in zip(about, results, strict=True):
        report.add(part="steps", **row, **result)
    judge(report)
    return report


def judge(report: Report) -> None:
    """Which bars are met."""
    rows = {(row["case"], row["implementation"]): row for row in report.rows if "loss" in row}
    ours, stock, liger, unsloth = (NAMES[name] for name in ("ours", "stock", "liger", "unsloth"))
    lora = CASES[0][0]
    bars: dict[str, list[bool]] = {}
    if (lora, ours) in rows and (lora, liger) in rows:
        speeds = [rows[lora, name]["tokens_per_second"] for name in (ours, liger)]
        bars[f"LoRA at least {LORA_SPEED} times Liger's tokens per second"] = [
            speeds[0] >= LORA_SPEED * speeds[1]
        ]
        if (lora, unsloth) in rows:
            bars["LoRA at least Unsloth's tokens per second"] = [
                speeds[0] >= rows[lora, unsloth]["tokens_per_second"]
            ]
        bars[f"LoRA in at most {LORA_PEAK:g} GiB"] = [rows[lora, ours]["peak_gib"] <= LORA_PEAK]
    bars[f"mean loss within {LOSS:g} of stock's"] = [
        abs(row["loss"] - rows[case, stock]["loss"]) <= LOSS
        for (case, name), row in rows.items()
        if name == ours and (case, stock) in rows
    ]
    for bar, met in bars.items():
        report.add(part="bars", bar=bar, met=sum(met), of=len(met))
