"""How long a fresh process takes from its start to the first training step, on a text file.

One more part of the benchmark `data`, as a user would write it: `_train` is the whole script. Nothing is
imported here that it would not import. The data's own seconds are those of importing
`barqtrain_hf.data`, loading the tokenizer, making the data set, and from the beginning of training to that of
the first step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barqtrain_hf.errors import UnsupportedError

if TYPE_CHECKING:
    from barqtrain_hf.benchmarks.harness import Report

MAX_LENGTH = 4096
RUNS = (
    ("stream", "ours, stream"),
    ("store", "ours, a token store's first run"),
    ("store", "ours, a token store's second run"),
)


def measure(report: Report, texts: Sequence[str], tokenizer: Any, folder: Path) -> None:
    """Adds the seconds of a stream, and of a token store in a first run and in a second."""
    file, store = folder / "start.txt", folder / "start.barq"
    lines = "".join(text.replace("\n", " ") + "\n" for text in texts)
    file.write_text(lines, encoding="utf-8")
    tokenizer.save_pretrained(folder / "start_tokenizer")
    case = f"{len(texts):,} lines, {file.stat().st_size / 1e6:.1f} MB"
    for kind, name in RUNS:
        words = [kind, file, folder / "start_tokenizer", store, time.time()]
        command = [sys.executable, "-m", __spec__.name, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UnsupportedError(f"{name}: the process failed.", done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        row = {"part": "start", "implementation": name}
        report.add(**row, case=f"{case}, the data alone", s=found["data"])
        report.add(**row, case=f"{case}, with imports, model and Trainer", s=found["whole"])


class _Stepped(Exception):
    """The first step begins."""


def _train(
    kind: str, file: str, tokenizer_path: str, store: str, started: float
) -> dict[str, float]:
    """Seconds from ``started`` until the first step begins, and how many of them are the data's."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

    assert Trainer  # it, and torch, are imported when they are asked for
    data_begins = time.time()
    from barqtrain_hf.data import PackedDataset, PackedStream, tokenize

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    dataset: Any = (
        PackedStream(file, MAX_LENGTH, tokenizer=tokenizer)
        if kind == "stream"
        else PackedDataset(tokenize(file, tokenizer, store), MAX_LENGTH, overflow="split")
    )
    data_seconds = time.time() - data_begins
    from barqtrain_hf import BarqTrainer, BarqTrainingArguments

    class Stop(TrainerCallback):  # type: ignore[misc]
        begun = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.time()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise _Stepped  # its batches are there

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    args = BarqTrainingArguments(
        f"{store}.out", max_steps=100, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = BarqTrainer(LlamaForCausalLM(config), args, train_dataset=dataset)
    stop = Stop()
    trainer.add_callback(stop)  # the last one: ours have put the ops into the model
    try:
        trainer.train()
    except _Stepped:
        now = time.time()
        return {"data": data_seconds + now - stop.begun, "whole": now - started}
    raise AssertionError("no step has begun")


if __name__ == "__main__":
    words = sys.argv[1:]
    print(json.dumps(_train(words[0], words[1], words[2], words[3], float(words[4]))))
