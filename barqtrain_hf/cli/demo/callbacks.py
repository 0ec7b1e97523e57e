"""What the demo hangs into a Trainer: a progress bar, a meter, and Ctrl-C that can be resumed."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Between lines of progress, where output is no terminal.
SECONDS_PER_LINE = 10.0


class CountingCollator:
    """A collator that also counts: tokens of documents, and slots the model computes.

    Args:
        collate: the collator that does the work.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self._collate = collate
        # The loader collates ahead of training, so counts wait here until their batch is trained.
        self.waiting: deque[tuple[int, int]] = deque()

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Collates and counts."""
        batch = self._collate(features)
        mask = batch.get("attention_mask")
        slots = int(batch["input_ids"].numel())
        tokens = slots if mask is None else int(mask.sum())
        self.waiting.append((tokens, slots))
        return batch


class Meter(TrainerCallback):
    """Adds real tokens, slots and training seconds to each logged entry; saving is not training.

    They are put into ``state.log_history``, so they travel with checkpoints.
    """

    def __init__(self, collator: CountingCollator) -> None:
        self._collator = collator
        self._tokens = self._slots = 0
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the step's batch."""
        tokens, slots = self._collator.waiting.popleft()
        self._tokens += tokens
        self._slots += slots

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Completes the newest entry."""
        if not self._tokens:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        state.log_history[-1].update(
            real_tokens=self._tokens,
            slots=self._slots,
            real_seconds=now - self._since,
            total_steps=state.max_steps,
        )
        self._tokens, self._slots, self._since = 0, 0, now

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the time of a save out, which follows a log."""
        if not self._tokens:
            self._since = time.perf_counter()


class Interrupt(TrainerCallback):
    """Turns the first Ctrl-C into a checkpoint and a stop after the current step.

    A second one is a ``KeyboardInterrupt`` at once.

    Attributes:
        happened: whether Ctrl-C stopped the run.
    """

    def __init__(self) -> None:
        self.happened = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes over Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.happened = True
        self.restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint and an end."""
        if self.happened:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives Ctrl-C back."""
        self.restore()

    def restore(self) -> None:
        """Gives Ctrl-C back; also to be called when training ends in an exception."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class Bar(TrainerCallback):
    """A progress bar in place of Trainer's printed logs; in a file or a pipe, a line every so often.

    Args:
        title: what is training.
    """

    def __init__(self, title: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._task = self._progress.add_task(title, total=None, shown="")
        console = self._progress.console
        self._moves = console.is_interactive or console.is_jupyter
        self._line_due = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the bar."""
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
        self._progress.start()
        self._line_due = time.monotonic() + SECONDS_PER_LINE

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves it."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows loss and speed."""
        entry = state.log_history[-1]
        if "loss" in entry and entry.get("real_seconds"):
            speed = entry["real_tokens"] / entry["real_seconds"]
            shown = f"loss {float(entry['loss']):.3f}  {speed:,.0f} tok/s"
            self._progress.update(self._task, shown=shown)
            if not self._moves and time.monotonic() >= self._line_due:
                self._line_due = time.monotonic() + SECONDS_PER_LINE
                title = self._progress.tasks[0].description
                line = f"{title}: step {state.global_step:,} of {state.max_steps:,}  {shown}"
                self._progress.console.print(line, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves its last state on the screen."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back; also to be called when training ends in an exception."""
        self._progress.stop()
