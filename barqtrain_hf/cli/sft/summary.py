"""What the user sees at the end of ``barqtrain sft``."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def table(trainer: Any, result: Any) -> Table:
    """Steps, speed, memory and losses of a run.

    Args:
        trainer: a `BarqSFTTrainer` that has trained.
        result: what its ``train`` returned.
    """
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in rows(trainer.state.log_history, result, trainer.steps_trained):
        made.add_row(label, value)
    return made


def rows(history: list[dict[str, float]], result: Any, trained: int) -> list[tuple[str, str]]:
    """Labels and values, from what was logged; of time and speed only if any steps were ``trained`` now."""
    logged = [entry for entry in history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    seconds = result.metrics.get("train_runtime", 0.0)
    found = [("steps", f"{result.global_step:,}")]
    tokens = max((int(entry.get("num_tokens", 0)) for entry in history), default=0)
    if tokens:
        found.append(("tokens", f"{tokens:,}"))
    if trained:
        found.append(("training time", f"{seconds:,.1f} s"))
    speed = tokens_per_second(logged) if trained else None
    if speed is None and tokens and seconds and trained:
        speed = tokens / seconds
    if speed is not None:
        found.append(("tokens/s", f"{speed:,.0f}"))
    peak = max((entry.get("peak_memory_gib", 0.0) for entry in logged), default=0.0)
    if peak:
        found.append(("peak memory", f"{peak:.2f} GiB"))
    if trained:
        found.append(("mean loss", f"{result.training_loss:.4f}"))
    if logged:
        found.append(("final loss", f"{logged[-1]['loss']:.4f}"))
    if evaluated:
        found.append(("evaluation loss", f"{evaluated[-1]:.4f}"))
    return found


def tokens_per_second(logged: list[dict[str, float]]) -> float | None:
    """Tokens over time between the first log and the last; before it, kernels are compiled.

    Args:
        logged: entries of training, with the speed since the entry before and the tokens until now.
    """
    tokens = seconds = before = 0.0
    for number, entry in enumerate(logged):
        new = entry.get("num_tokens", 0.0) - before
        before += new
        speed = entry.get("tokens_per_second", 0.0)
        # A run that is resumed begins to count anew.
        if speed and new > 0 and (number or len(logged) == 1):
            tokens += new
            seconds += new / speed
    return tokens / seconds if seconds else None
