"""What BarqMetricsCallback logs, what it leaves out, and that it leaves no trace."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from test_packed_training import documents
from test_parity import Rows, arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from barqtrain_hf import BarqMetricsCallback, BarqTrainer, timeline
from barqtrain_hf.data import BarqDataCollator, PackedDataset
from barqtrain_hf.timeline import DATA, PAUSE, WORK, Timeline


def train(
    path: Path,
    kind: type[Trainer] = Trainer,
    *,
    data: Any = None,
    given: dict[str, Any] | None = None,
    resume: str | None = None,
    **options: Any,
) -> Any:
    trainer = kind(
        tiny_model("llama"),
        TrainingArguments(**arguments(path, **options)),
        train_dataset=Rows(40, seed=1) if data is None else data,
        eval_dataset=Rows(7, seed=2),
        **(given or {"callbacks": [BarqMetricsCallback()]}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


ON_CPU = {"tokens_per_second", "peak_memory_gib", "data_wait_share"}


@pytest.mark.parametrize("kind", [Trainer, BarqTrainer])
def test_every_trainer_logs_the_same_names(kind: type[Trainer], tmp_path: Path) -> None:
    class Printed(TrainerCallback):
        names: list[set[str]] = []  # noqa: RUF012

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            self.names.append(set(logs))

    # The logger comes first, as those of report_to do.
    logger = Printed()
    packed = PackedDataset(documents(60), 64)
    given = {
        "callbacks": [logger, BarqMetricsCallback()],
        "data_collator": BarqDataCollator(),
    }
    trainer = train(tmp_path, kind, data=packed, given=given)
    logged = entries(trainer)
    assert len(logged) == 4
    for entry, names in zip(logged, logger.names, strict=False):
        assert ON_CPU | {"packing_fill"} <= names <= set(entry) | {"epoch"}
        assert not {"mfu", "host_bound_share", "reserved_memory_gib"} & names
        assert entry["packing_fill"] == packed.fill
        assert entry["tokens_per_second"] > 0 and 0 <= entry["data_wait_share"] <= 1
    assert "tokens_per_second" not in logger.names[-1]  # the summary
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(BarqMetricsCallback) == 1 and not any("_Last" in k.__name__ for k in kinds)


class Slow(torch.utils.data.Dataset):
    """Rows that take their time."""

    def __init__(self, seconds: float) -> None:
        self._rows, self._seconds = Rows(40, seed=1), seconds

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        time.sleep(self._seconds)
        return self._rows[index]


class Thinks(TrainerCallback):
    """Takes its time after each step, which is no fault of the data."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(self._seconds)


def test_waiting_for_data_is_told_from_work(tmp_path: Path) -> None:
    # Two rows in each of two micro-steps: 0.12 s for the data of a step.
    options = {"gradient_accumulation_steps": 2, "logging_steps": 3, "max_steps": 3}
    slow = train(tmp_path, data=Slow(0.03), **options)
    (entry,) = entries(slow)
    assert entry["data_wait_share"] > 0.5
    thinks = {"callbacks": [BarqMetricsCallback(), Thinks(0.1)]}
    (entry,) = entries(train(tmp_path, given=thinks, **options))
    assert entry["data_wait_share"] < 0.2


def test_evaluation_checkpoints_and_resume_do_not_count(tmp_path: Path) -> None:
    class Pauses(Trainer):
        def _save(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.4)
            super()._save(*args, **kwargs)

        def get_eval_dataloader(self, *args: Any) -> Any:
            time.sleep(0.4)
            return super().get_eval_dataloader(*args)

    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = train(tmp_path, Pauses, max_steps=2, **options, **evaluated)
    resumed = train(
        tmp_path,
        Trainer,
        data=Slow(0.15),  # 0.6 s for the rows of the first two steps
        resume=str(tmp_path / "checkpoint-2"),
        max_steps=3,
    )
    for entry in (entries(trainer)[1], entries(resumed)[2]):
        # A step has some thirty tokens, and takes milliseconds.
        assert entry["tokens_per_second"] > 120
    # The first step's own batch is read before anything is measured.
    assert entries(resumed)[2]["data_wait_share"] == 0


def test_training_and_the_model_are_left_as_they_were(tmp_path: Path) -> None:
    class Copies(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            self.copy = copy.deepcopy(model)
            self.file = pickle.dumps(model)

    copies = Copies()
    given = {"callbacks": [BarqMetricsCallback(), copies]}
    plain = train(tmp_path, given={"callbacks": []})
    measured = train(tmp_path, given=given)
    assert [e["loss"] for e in entries(plain)] == [e["loss"] for e in entries(measured)]
    model = measured.model
    assert not model._forward_hooks and not model._forward_pre_hooks
    # Copies that were made during training count nothing.
    for other in (copies.copy, pickle.loads(copies.file)):
        other.train()
        other(input_ids=torch.tensor([[3, 4, 5]]))
    measured.train()  # and once more
    assert set(entries(measured)[-1]) >= ON_CPU


def test_an_error_in_training_leaves_no_hooks(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("on purpose")

    model = tiny_model("llama")
    trainer = BarqTrainer(
        model,
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=Rows(8, seed=1),
        callbacks=[Broken()],
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert not model._forward_hooks
    # A stock Trainer says nothing when it fails; the next training puts that right.
    metrics = BarqMetricsCallback()
    stock = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=Rows(8, seed=1),
        callbacks=[metrics, Broken()],
    )
    with pytest.raises(RuntimeError, match="on purpose"):
        stock.train()
    stock.remove_callback(Broken)
    stock.train()
    assert set(entries(stock)[-1]) >= ON_CPU and not model._forward_hooks


def test_a_model_without_a_trainer_is_not_counted() -> None:
    metrics = BarqMetricsCallback()
    metrics.on_step_begin(None, None, None)  # type: ignore[arg-type]
    metrics.on_log(None, None, None, logs={"loss": 1.0})  # type: ignore[arg-type]
    metrics.close()


def test_data_parallel_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args, model = TrainingArguments(**arguments(tmp_path)), tiny_model("llama")
    args._n_gpu = 2
    BarqMetricsCallback().on_train_begin(args, None, None, model=model)  # type: ignore[arg-type]
    assert "nn.DataParallel (2 GPUs in one process)" in caplog.text and not model._forward_hooks


class Device:
    """A GPU as the timeline sees it: what is launched takes its time one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.done = 0.0  # seconds
        self.waits = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                self.time = device.done = max(device.done, device.host)

            def query(self) -> bool:
                return self.time <= device.host

            def synchronize(self) -> None:
                device.waits += 1
                device.host = max(device.host, self.time)

            def elapsed_time(self, other: Event) -> float:
                assert self.query() and other.query()
                return (other.time - self.time) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(timeline.time, "perf_counter", lambda: self.host)

    def launch(self, host: float, device: float) -> None:
        """Work of so many seconds on the host, which launches so much for the device as it goes."""
        self.done = max(self.done, self.host) + device
        self.host += host
        self.done = max(self.done, self.host)  # the last kernel is launched at the end


def test_who_sets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    marks = Timeline(torch.device("cuda"))
    # The host is ahead from the first step on: 10 ms to launch what takes 100.
    for _ in range(10):
        marks.mark(DATA)
        device.launch(0.01, 0.1)
        marks.mark(WORK)
    span = marks.read()
    assert span.seconds == pytest.approx(1.0) and span.data_wait == 0
    assert span.host_bound == pytest.approx(0.01)  # until the first kernels were there
    # The device is done when the host is: nobody can say how long it worked.
    for _ in range(10):
        marks.mark(DATA)
        device.launch(0.1, 0.03)
        marks.mark(WORK)
    span = marks.read()
    assert span.seconds == pytest.approx(1.0) and span.host_bound == pytest.approx(1.0)
    # Data that arrives late, in part while the device still works; an evaluation in between.
    for number in range(10):
        device.launch(0.01, 0.1)
        marks.mark(WORK)
        if number == 4:
            device.launch(5.0, 5.0)
            marks.mark(PAUSE)
        device.host += 0.29
        marks.mark(DATA)
    span = marks.read()
    assert span.seconds == pytest.approx(3.0) and device.waits == 3
    assert span.data_wait == pytest.approx(2 / 3)
    assert span.host_bound == pytest.approx(0.1 / 3)


def test_marks_that_nobody_reads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    marks = Timeline(torch.device("cuda"))
    for _ in range(1000):
        device.launch(0.1, 0.1)
        marks.mark(WORK)
    assert len(marks._marks) <= timeline._KEPT and device.waits == 0
    assert marks.read().seconds == pytest.approx(100)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Trainer, BarqTrainer])
def test_on_a_gpu(kind: type[Trainer], tmp_path: Path) -> None:
    options = {"use_cpu": False, "max_steps": 8, "logging_steps": 4, "bf16": True}
    evaluated = {"eval_strategy": "steps", "eval_steps": 3}
    first, last = entries(train(tmp_path, kind, **options, **evaluated))
    for entry in (first, last):
        assert entry["reserved_memory_gib"] >= entry["peak_memory_gib"] > 0
        assert entry["data_wait_share"] + entry["host_bound_share"] <= 1 + 1e-6
    # A model as small as this is never behind the host.
    assert last["data_wait_share"] + last["host_bound_share"] > 0.5
    slow = entries(train(tmp_path, kind, data=Slow(0.05), **options))[-1]
    assert slow["data_wait_share"] > 0.5


@pytest.mark.gpu
def test_the_timeline_of_a_gpu() -> None:
    device = torch.device("cuda", 0)
    layer = torch.nn.Linear(8192, 8192, device=device, dtype=torch.bfloat16)
    rows = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    small = torch.ones(8, device=device)

    def behind() -> None:  # a launch is microseconds, a product more than a millisecond
        for _ in range(30):
            layer(rows)

    def ahead() -> None:  # of kernels that are shorter than their launch
        for _ in range(3000):
            small.add_(1)

    with torch.no_grad():
        behind(), ahead()
        marks = Timeline(device)

        def span(work: Any, gap: float = 0.0) -> timeline.Span:
            marks.read()
            for _ in range(5):
                marks.mark(DATA)
                work()
                marks.mark(WORK)
                time.sleep(gap)
            marks.mark(DATA)
            return marks.read()

        assert (span(behind).host_bound or 0) < 0.05
        assert (span(ahead).host_bound or 0) > 0.8
        late = span(behind, 0.2)  # a fifth of which, or less, the device still computes
        assert late.data_wait == pytest.approx(1 - 5 * 0.045 / late.seconds, abs=0.15)
