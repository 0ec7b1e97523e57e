"""Whole training steps beside stock Trainer, torch.compile, Liger and Unsloth, on a model of Llama-3.2-1B's
shape.

Each run is a process of its own, one after another on the same machine: `Trainer` as users call it, bf16,
fused AdamW, 4 x 4096 random tokens a step. A step's time is that between the ends of two on the device, which
nobody is made to wait for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

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
    ("all weights", False, False, ("stock", "liger", "ours")),
    ("LoRA r=16, gradient checkpointing", True, True, ("stock", "liger", "unsloth", "ours")),
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
_MINUTES = 5  # that a run may take
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
    for case, lora, checkpointing, trainers in cases:
        for trainer in trainers:
            settings = {
                "trainer": trainer,
                "lora": lora,
                "checkpointing": checkpointing,
                "config": MODEL if model is None else model,
                "batch": batch,
                "length": length,
                "steps": steps,
            }
            row = _run_apart(settings)
            report.add(part="steps", case=case, implementation=NAMES[trainer], **row)
    judge(report)
    return report


def _run_apart(settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "barqtrain_hf.benchmarks.steps_run", json.dumps(settings)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_MINUTES * 60
        )
    except subprocess.TimeoutExpired:
        return {"unavailable": f"took more than {_MINUTES} minutes"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return {"unavailable": lines[-1] if lines else f"exit code {error.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


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
