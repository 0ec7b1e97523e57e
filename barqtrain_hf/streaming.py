"""Training on a `PackedStream`: batches without end, and the stream's place in every checkpoint."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from barqtrain_hf.checkpoints import read_stream_state, write_stream_state
from barqtrain_hf.data import PackedStream
from barqtrain_hf.data.batch import PackedBatch
from barqtrain_hf.data.window import Place
from barqtrain_hf.errors import ArgumentError, UnsupportedError

logger = logging.getLogger(__name__)


class StreamLoader:
    """Hands out the batches of a stream, one epoch after the other, on the device of the model.

    It takes the place of a DataLoader that accelerate prepared: that would collate batches again, deal
    those of one rank to all, and read one batch ahead of what is trained on.

    On a GPU batches go through pinned memory and are copied while the GPU works. torch hands such memory
    out again only when its copies are done.

    Args:
        stream: deals its own rows to the ranks.
        device: where batches are wanted.
        pin_memory: whether they go through pinned memory, if that is a GPU.

    Attributes:
        dataset: the stream.
        trained: where it is after the last batch that was trained on.
        finished: whether to hand out no more batches.
    """

    def __init__(self, stream: PackedStream, device: torch.device, pin_memory: bool) -> None:
        self.dataset = stream
        self.trained = stream.beginning
        self.finished = False
        self._device = device
        self._pin = pin_memory and device.type == "cuda"
        self._ahead: deque[Place] = deque()
        self._batches: Iterator[PackedBatch] = iter(())

    def __iter__(self) -> Iterator[PackedBatch]:
        while not self.finished:
            self._batches = iter(self.dataset)
            for batch in self._batches:
                self._ahead.append(self.dataset.place)
                pinned = batch.pin_memory() if self._pin else batch
                yield pinned.to(self._device, non_blocking=self._pin)

    def count_trained(self) -> None:
        """The next of the batches that were handed out is trained on."""
        if self._ahead:  # not if somebody else trains on batches of their own
            self.trained = self._ahead.popleft()

    def close(self) -> None:
        """Stops the threads of the stream."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


class StreamTraining(TrainerCallback):
    """What a Trainer does for its ``train_dataset`` if that is a `PackedStream`.

    Trainer counts one epoch of ``max_steps``, in which the stream begins its own as often as needed; a step
    may have the last batches of one and the first of the next. Where the ``"epoch"`` strategies are set,
    Trainer logs, evaluates and saves after the step in which an epoch of the stream ends.

    Args:
        stream: from where it stands every training without a checkpoint begins.
        args: given to the Trainer, or None.

    Raises:
        ArgumentError: ``max_steps`` is not set.
        UnsupportedError: workers of a DataLoader, or batches that accelerate shall deal or split.
    """

    def __init__(self, stream: PackedStream, args: TrainingArguments | None) -> None:
        _check(args)
        self._stream = stream
        self._first = self._begin = stream.beginning
        self._loader: StreamLoader | None = None
        self._epoch = 0
        self._skips: bool | None = None

    def begin(self, args: TrainingArguments, checkpoint: str | None) -> None:
        """Goes to where the stream was when ``checkpoint`` was saved, without reading anything again.

        With ``ignore_data_skip`` it begins anew there too.

        Raises:
            DataError: the checkpoint holds no state of a stream, or a damaged one.
            ArgumentError: the state is of a stream with other arguments, or of other documents.
        """
        self._stream.seek(self._first)
        if checkpoint is not None and not args.ignore_data_skip:
            self._stream.load_state_dict(read_stream_state(checkpoint))
        self._begin = self._stream.beginning
        # Until the first step: Trainer would take from the loader, and throw away, what was trained on.
        self._skips, args.ignore_data_skip = args.ignore_data_skip, True

    def end(self, args: TrainingArguments) -> None:
        """Stops the threads, and logs what was trained on; also after training that ended in an exception."""
        self._restore(args)
        if self._loader is not None:
            self._loader.close()
            if self._loader.trained is not self._begin:
                # Within an epoch; the end of one was logged when it came.
                self._stream.log(self._loader.trained)

    def loader(self, trainer: Trainer) -> StreamLoader:
        """The batches of this rank, from where training begins."""
        args, accelerator = trainer.args, trainer.accelerator
        parallelism = getattr(accelerator, "parallelism_config", None)
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise UnsupportedError(
                "PackedStream deals other rows to every process, and with tensor, context or sequence "
                "parallelism several of them need the same.",
                "Pass a PackedDataset, or train with data parallelism alone.",
            )
        # Not that of args: auto_find_batch_size makes it smaller.
        batch_size = trainer._train_batch_size
        self._stream.deal(batch_size, accelerator.process_index, accelerator.num_processes)
        self._stream.seek(self._begin)
        self._loader = StreamLoader(self._stream, args.device, args.dataloader_pin_memory)
        self._epoch = self._begin.epoch
        return self._loader

    def save(self, folder: Path) -> None:
        """Writes where the stream is after what was trained on.

        It is the same on every rank, and good for another number of them.
        """
        if self._loader is not None:
            write_stream_state(folder, self._stream.state_dict(self._loader.trained))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._loader is not None:
            # Resumed from its last step, a training would take one more.
            self._loader.finished = state.global_step >= state.max_steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore(args)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._loader is not None:
            self._loader.count_trained()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        if self._loader is None:
            return None
        self._loader.count_trained()
        # What it is in a run that was not resumed.
        state.epoch = state.global_step / state.max_steps
        epoch = self._loader.trained.epoch
        ended, self._epoch = epoch > self._epoch, epoch
        if not ended or state.global_step >= state.max_steps:  # Trainer's own epoch ends there
            return None
        of_the_stream = copy.copy(state)
        of_the_stream.epoch = epoch
        return DefaultFlowCallback().on_epoch_end(args, of_the_stream, control)

    def _restore(self, args: TrainingArguments) -> None:
        if self._skips is not None:
            args.ignore_data_skip, self._skips = self._skips, None


def _check(args: TrainingArguments | None) -> None:
    if args is None or args.max_steps <= 0:
        raise ArgumentError(
            f"max_steps is {-1 if args is None else args.max_steps}: pass how many steps to train on the "
            "PackedStream. How many rows its documents make is known only when they are read, so "
            "num_train_epochs tells no end, nor the course of the learning rate."
        )
    if args.dataloader_num_workers:
        raise UnsupportedError(
            f"dataloader_num_workers is {args.dataloader_num_workers}: PackedStream runs threads of its own, "
            "and every worker would read every document.",
            "Pass dataloader_num_workers=0.",
        )
    config = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(config, name, None):
            raise UnsupportedError(
                f"accelerator_config has {name}=True: PackedStream deals its rows to the ranks itself, and a "
                "batch cannot be cut between documents.",
                f"Leave {name} out.",
            )
