"""One training run of the demo, with `BarqTrainer` or with the stock `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from barqtrain_hf import BarqTrainer, BarqTrainingArguments
from barqtrain_hf.cli.demo.callbacks import Bar, CountingCollator, Interrupt, Meter
from barqtrain_hf.cli.demo.memory import PeakMemory
from barqtrain_hf.cli.demo.scale import uses_gpu
from barqtrain_hf.cli.demo.tokenizer import Tokens, split_long
from barqtrain_hf.cli.demo.workload import Workload
from barqtrain_hf.data import BarqDataCollator, PackedDataset

TrainerName = Literal["barq", "stock"]
TITLES: dict[TrainerName, str] = {"barq": "BarqTrainer, packed", "stock": "Trainer, padded"}
LOGS_PER_RUN = 60
SAVES_PER_RUN = 3


@dataclass
class RunResult:
    """What a training run cost.

    Attributes:
        title: which trainer, and how the data was laid out.
        steps: optimizer steps.
        documents_per_step: documents in an average batch.
        tokens: real tokens trained on, padding not counted.
        seconds: time spent training them, from the first step on.
        tokens_per_second: tokens over time once both are running; see `_speed`.
        peak_bytes: see `PeakMemory`; None where it cannot be measured.
        padding: share of the computed positions that is padding.
        packing: what `PackedDataset` says about its rows, or empty.
        report: what `BarqTrainer` installed, or empty.
        curve: logged entries with ``step``, ``loss``, ``real_tokens`` and ``real_seconds``.
    """

    title: str
    steps: int
    documents_per_step: float
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    padding: float
    packing: str
    report: str
    curve: list[dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def training_arguments(
    workload: Workload, folder: Path, *, seed: int, device: str, max_steps: int
) -> dict[str, Any]:
    """What both runs have in common; batch size and logging are still to come."""
    gpu = uses_gpu(device)
    # Before Ampere bf16 is emulated, which torch counts as supported by default.
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "output_dir": str(folder),
        "num_train_epochs": workload.plan.epochs,
        "max_steps": max_steps,
        "learning_rate": workload.plan.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "bf16": bf16,
        "fp16": gpu and not bf16,
        "use_cpu": not gpu,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "steps",
        "save_total_limit": 1,
        "logging_strategy": "steps",
    }


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, or None."""
    # Trainer writes its state last: a checkpoint without it was cut short.
    states = folder.glob("checkpoint-*/trainer_state.json")
    checkpoints = sorted((state.parent for state in states), key=lambda c: int(c.name[11:]))
    return str(checkpoints[-1]) if checkpoints else None


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def train(
    name: TrainerName,
    model: Any,
    workload: Workload,
    folder: Path,
    *,
    seed: int,
    device: str,
    max_steps: int = -1,
    resume: bool = False,
) -> RunResult | None:
    """Trains a model in place.

    Both trainers get the same documents for the same number of epochs, so the same number of real
    tokens, and the same schedule; the stock one gets as many documents per batch as a packed batch
    holds on average, so that it takes as many optimizer steps as its batches allow.

    Returns:
        What it cost, or None if Ctrl-C stopped it, in which case a checkpoint lies in ``folder``.
    """
    plan = workload.plan
    with _without_warnings("barqtrain_hf.data"):  # the demo says itself what was split
        packed = PackedDataset(workload.train, plan.row_length, overflow="split", seed=seed)
    pieces = split_long(workload.train, plan.row_length)
    documents_per_row = len(pieces) / len(packed)
    common = training_arguments(workload, folder, seed=seed, device=device, max_steps=max_steps)
    memory = PeakMemory(gpu=uses_gpu(device))
    dataset: PackedDataset | list[Tokens]
    if name == "barq":
        batch_size, dataset = plan.rows_per_step, packed
        collator = CountingCollator(BarqDataCollator())
    else:
        batch_size, dataset = max(1, round(documents_per_row * plan.rows_per_step)), pieces
        collator = CountingCollator(
            DataCollatorForSeq2Seq(workload.tokenizer, padding="longest", return_tensors="pt")
        )
    per_epoch = -(-len(dataset) // batch_size)
    total = max_steps if max_steps > 0 else per_epoch * plan.epochs
    every = max(1, total // LOGS_PER_RUN)
    common.update(
        per_device_train_batch_size=batch_size,
        logging_steps=every,
        # After a log, so that the time of the save is easy to leave out.
        save_steps=every * max(1, total // every // SAVES_PER_RUN),
    )
    if name == "barq":
        trainer = BarqTrainer(
            model, BarqTrainingArguments(**common), data_collator=collator, train_dataset=dataset
        )
    else:
        trainer = Trainer(
            model, TrainingArguments(**common), data_collator=collator, train_dataset=dataset
        )
    interrupt, bar = Interrupt(), Bar(TITLES[name])
    trainer.remove_callback(PrinterCallback)
    for callback in (Meter(collator), interrupt, bar):
        trainer.add_callback(callback)
    checkpoint = last_checkpoint(folder) if resume else None
    try:
        if checkpoint is None or not _load_finished(trainer, checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.close()
        interrupt.restore()
    if interrupt.happened and trainer.state.global_step < trainer.state.max_steps:
        return None
    curve = [entry for entry in trainer.state.log_history if "real_seconds" in entry]
    tokens = sum(entry["real_tokens"] for entry in curve)
    slots = sum(entry["slots"] for entry in curve)
    seconds = sum(entry["real_seconds"] for entry in curve)
    return RunResult(
        title=TITLES[name],
        steps=trainer.state.global_step,
        documents_per_step=documents_per_row * batch_size if name == "barq" else batch_size,
        tokens=int(tokens),
        seconds=seconds,
        tokens_per_second=_speed(curve),
        peak_bytes=memory.read(),
        padding=1 - tokens / slots,
        packing=packed.summary() if name == "barq" else "",
        report=str(trainer.barq_report) if name == "barq" else "",
        curve=curve,
    )


def _load_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Takes model and logs from a checkpoint of the last step; Trainer would take one step more."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    print(f"All {state.global_step:,} steps were trained before: there is nothing left to train.")
    trainer.state = state
    load_model(trainer.model, Path(checkpoint) / "model.safetensors")
    return True


def _speed(curve: list[dict[str, float]]) -> float:
    """Real tokens per second between the first log and the last.

    Up to the first, CUDA loads its libraries and ours compiles its kernels; the run that comes second
    in a process would get the former for nothing. After the last come a save and the end of training.
    """
    steady = [entry for entry in curve if "loss" in entry][1:] or curve
    return sum(e["real_tokens"] for e in steady) / sum(e["real_seconds"] for e in steady)
