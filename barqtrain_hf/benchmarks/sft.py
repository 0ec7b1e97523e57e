"""`barqtrain sft` beside `trl sft`: LoRA on the demo's chats, with every way that TRL has to lay them out.

Each run is a process of its own, one after another on the same machine, with the same options but those that
the row names. Steps are timed by fours; tokens are those of documents, as TRL counts them, and no padding.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from barqtrain_hf.benchmarks.apart import run_apart
from barqtrain_hf.benchmarks.harness import Report
from barqtrain_hf.benchmarks.sft_run import WINDOW
from barqtrain_hf.benchmarks.steps import MODEL
from barqtrain_hf.cli.demo import tasks
from barqtrain_hf.cli.demo.tokenizer import train_tokenizer
from barqtrain_hf.cli.demo.workload import TASK_VOCAB_SIZE

PACKED = ("--packing", "--per_device_train_batch_size", "{rows}")
# The same rows one after another: stock sdpa sees a mask of [T, T], and T is that of all rows of a batch.
ONE_BY_ONE = (
    *("--packing", "--per_device_train_batch_size", "1"),
    *("--gradient_accumulation_steps", "{rows}"),
)
# As many documents as a packed row holds.
UNPACKED = (
    *("--per_device_train_batch_size", "{documents}"),
    *("--gradient_accumulation_steps", "{rows}"),
)
# It is compiled anew for every length, so rows are padded to one.
FLEX = ("--attn_implementation", "flex_attention", "--pad_to_multiple_of", "{length}")


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: what the table calls it.
        command: "trl" or "barqtrain".
        options: beside those that all have.
        packs: whether documents share rows.
        apart: whether they are kept from seeing each other there.
        turn: when it is run: ours first, so that it is there if time runs out, and last what may take long
            to say that it cannot be run.
    """

    name: str
    command: str
    options: tuple[str, ...]
    packs: bool = True
    apart: bool = True
    turn: int = 1


OURS = Row("barqtrain sft, packed", "barqtrain", PACKED, turn=0)
BFD = Row("trl sft, packed", "trl", PACKED)
BFD_ONE = Row("trl sft, packed, row by row", "trl", ONE_BY_ONE)
WRAPPED = Row(
    "trl sft, wrapped: documents see each other",
    "trl",
    (*PACKED, "--packing_strategy", "wrapped"),
    apart=False,
)
TRL = (
    Row("trl sft, padded", "trl", UNPACKED, packs=False),
    Row("trl sft, padding-free", "trl", ("--padding_free", *UNPACKED), packs=False),
    BFD,
    BFD_ONE,
    Row(f"{BFD_ONE.name}, Liger", "trl", (*ONE_BY_ONE, "--use_liger_kernel")),
    WRAPPED,
    Row(
        "trl sft, packed, flash_attention_2",
        "trl",
        (*PACKED, "--attn_implementation", "flash_attention_2"),
        turn=2,
    ),
    Row(
        f"{BFD_ONE.name}, flex_attention",
        "trl",
        (*ONE_BY_ONE, *FLEX),
        turn=2,
    ),
)
# With or without TRL's default, which computes activations again; without is faster, where they fit.
CASES: tuple[tuple[str, bool, tuple[Row, ...]], ...] = (
    ("LoRA r=16", False, (*TRL, OURS)),
    ("LoRA r=16, gradient checkpointing", True, (BFD_ONE, WRAPPED, OURS)),
)
ROWS, LENGTH, STEPS, EXAMPLES = 4, 4096, 24, 16_000
SPEED = 1.4  # the bar: times TRL's tokens per second
_MINUTES, _ALL_MINUTES = 3, 9  # that a run and all may take


def run(
    model: dict[str, Any] | None = None,
    rows: int = ROWS,
    length: int = LENGTH,
    steps: int = STEPS,
    examples: int = EXAMPLES,
    cases: Sequence[tuple[str, bool, tuple[Row, ...]]] = CASES,
) -> Report:
    """Makes model, tokenizer and data, and runs every row of every case."""
    report = Report("sft")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = prepare(folder, MODEL if model is None else model, examples)
        sizes = {"rows": rows, "length": length, "documents": max(1, round(length / tokens))}
        ways = [(case, checkpointing, way) for case, checkpointing, of in cases for way in of]
        turns = sorted(ways, key=lambda each: each[2].turn)
        runs = [
            (way.command, {"argv": options(folder, way, checkpointing, sizes, steps)})
            for _, checkpointing, way in turns
        ]
        module = "barqtrain_hf.benchmarks.sft_run"
        results = run_apart(module, runs, 60 * _MINUTES, 60 * _ALL_MINUTES, _environment(folder))
        for (case, _, way), result in zip(turns, results, strict=True):
            about = {"case": case, "packs": way.packs, "apart": way.apart}
            report.add(part="sft", implementation=way.name, **about, **result)
    shown = [(case, way.name) for case, _, way in ways]
    report.rows.sort(key=lambda row: shown.index((row["case"], row["implementation"])))
    judge(report)
    return report


def prepare(folder: Path, config: dict[str, Any], examples: int) -> float:
    """Writes ``model`` (random weights in bf16, and a tokenizer) and ``data`` (the demo's chats).

    Returns:
        Tokens in an average document.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    train, _ = tasks.generate(0, examples, 8)
    texts = (text for example in train for text in (example.prompt, example.answer))
    tokenizer = train_tokenizer(texts, TASK_VOCAB_SIZE, chat=True)
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"messages": example.messages}) for example in train]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device("cuda" if on_gpu else "cpu"):
        made: Any = LlamaForCausalLM(LlamaConfig(**config, **ends, bos_token_id=None))
    made.bfloat16().save_pretrained(folder / "model")
    del made
    if on_gpu:
        torch.cuda.empty_cache()  # it belongs to the runs
    some = [example.messages for example in train[:1000]]
    encoded = tokenizer.apply_chat_template(some, tokenize=True, return_dict=True)["input_ids"]
    return sum(map(len, encoded)) / len(encoded)


def options(
    folder: Path, way: Row, checkpointing: bool, sizes: dict[str, int], steps: int
) -> list[str]:
    """The command line after ``sft``: what all have in common, and what a row adds."""
    of_device = [] if torch.cuda.is_available() else ["--use_cpu", "--bf16", "false"]
    of_row = [word.format(**sizes) for word in way.options]
    # Padding-free documents are not cut off, and TRL wants to be told.
    max_length = "none" if "--padding_free" in way.options else str(sizes["length"])
    return [
        *("--model_name_or_path", str(folder / "model"), "--dtype", "bfloat16"),
        *("--dataset_name", str(folder / "data"), "--output_dir", str(folder / "out")),
        *("--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"),
        *("--lora_target_modules", "all-linear", "--learning_rate", "2e-4"),
        *("--max_length", max_length, "--max_steps", str(steps)),
        *("--gradient_checkpointing", str(checkpointing).lower()),
        *("--logging_steps", str(WINDOW), "--save_strategy", "no", "--report_to", "none"),
        *("--disable_tqdm", "true", *of_device, *of_row),
    ]


def _environment(folder: Path) -> dict[str, str]:
    """No hub, no cache of another run, one GPU."""
    return {
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }


def judge(report: Report) -> None:
    """Whether ours is fast enough beside TRL's best packing, in the first case."""
    rows = [row for row in report.rows if row["case"] == CASES[0][0] and "loss" in row]
    ours = [row["tokens_per_second"] for row in rows if row["implementation"] == OURS.name]
    packed = [row for row in rows if row["packs"] and row["implementation"] != OURS.name]
    for kind, rivals in (
        ("that keeps documents apart", [row for row in packed if row["apart"]]),
        ("of any kind", packed),
    ):
        if ours and rivals:
            best = max(row["tokens_per_second"] for row in rivals)
            bar = f"at least {SPEED} times the tokens per second of TRL's best packing {kind}"
            report.add(part="bars", bar=bar, met=int(ours[0] >= SPEED * best), of=1)
