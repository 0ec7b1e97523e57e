"""One training run of `sft`, in a process of its own: `trl sft` or `barqtrain sft`; prints a line of JSON."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback

from barqtrain_hf.benchmarks.apart import read_settings

WARM = 4  # steps until what is compiled and allocated on first use is there
WINDOW = 4  # steps that are timed together, and logged


class Clock(TrainerCallback):
    """Times windows of steps, and keeps what TRL logs of tokens and of the loss."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}  # by step
        self.tokens: dict[int, float] = {}  # until a step, without padding
        self.loss = float("nan")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits for the device once in a window."""
        if state.global_step < WARM or state.global_step % WINDOW:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if state.global_step == WARM:
                torch.cuda.reset_peak_memory_stats()
        self.ends[state.global_step] = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes after the step's end."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self.tokens[state.global_step] = logs["num_tokens"]
        self.loss = logs.get("train_loss", self.loss)


def run(command: str, argv: list[str]) -> dict[str, float]:
    """Runs the command and says what its steps took.

    Args:
        command: "trl", whose script is run as `trl sft` does, or "barqtrain".
        argv: what is written after ``sft``; it must log every `WINDOW` steps.

    Returns:
        The median step in ms and tokens per second with the middle half of each, the peak of allocated
        memory of the timed steps in GiB, and the mean loss of all steps.
    """
    from transformers import trainer

    clock = Clock()
    trainer.DEFAULT_CALLBACKS.append(clock)
    try:
        if command == "trl":
            from trl.scripts.sft import main, make_parser

            main(*make_parser(prog="trl sft").parse_args_and_config(argv))
        else:
            from barqtrain_hf.cli import main as barqtrain

            if code := barqtrain(["sft", *argv]):
                raise SystemExit(code)
    finally:
        trainer.DEFAULT_CALLBACKS.remove(clock)
    windows = list(itertools.pairwise(sorted(clock.ends)))
    seconds = [clock.ends[end] - clock.ends[start] for start, end in windows]
    speeds = [
        (clock.tokens[end] - clock.tokens[start]) / each
        for (start, end), each in zip(windows, seconds, strict=True)
    ]
    result: dict[str, float] = {}
    for name, values in (
        ("step_ms", [1e3 * each / WINDOW for each in seconds]),
        ("tokens_per_second", speeds),
    ):
        low, median, high = statistics.quantiles(values, n=4)
        result |= {name: median, f"{name}_quartile_1": low, f"{name}_quartile_3": high}
    on_gpu = torch.cuda.is_available()
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {**result, "loss": clock.loss}


def _import(command: str) -> None:
    import peft  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    if command == "barqtrain":
        from barqtrain_hf import BarqSFTTrainer  # noqa: F401


if __name__ == "__main__":
    _import(sys.argv[1])
    print(json.dumps(run(sys.argv[1], **read_settings())))
