"""BarqMetricsCallback: speed, memory and waiting times in the logs of any Trainer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from barqtrain_hf.metrics import ThroughputMeter
from barqtrain_hf.reporting import go_before_loggers, handler_of
from barqtrain_hf.timeline import DATA, PAUSE, WORK

logger = logging.getLogger(__name__)


class BarqMetricsCallback(TrainerCallback):
    """Adds to every entry with a training loss, in ``state.log_history`` and in all loggers:

    - ``tokens_per_second``: tokens that are no padding, of all processes: what this one had, times their
      number;
    - ``mfu``: model FLOPs beside the GPU's peak, on known GPUs;
    - ``peak_memory_gib`` and ``reserved_memory_gib``: the most that tensors had, and that PyTorch's allocator
      held, since training began. Without a GPU, the peak resident memory of the process;
    - ``packing_fill``: the share of packed rows that holds tokens, of a `PackedDataset`;
    - ``data_wait_share``: the share of time in which a step had ended on the device and the batches of the
      next had not arrived (all of them, with gradient accumulation). On a GPU their copies are part of it,
      and time in which it still computed is not. CPU and CUDA;
    - ``host_bound_share``: the share of time, beside that, in which the GPU had no backlog and so went as
      fast as the host launched: it was idle for that long at the most. CUDA only. See `timeline.py`.

    They are means over the time since the last such entry or, for the first, since the first step began:
    loading a checkpoint and skipping data are before it. Evaluation, checkpoints and generated samples do not
    count. But for ``tokens_per_second`` all are of one process, in loggers of the main one; nothing is
    gathered. The device is waited for at the first step and when Trainer logs, never between.

    `BarqTrainer` and `BarqSFTTrainer` have one of their own. It prints nothing.
    """

    def __init__(self) -> None:
        self._meter: ThroughputMeter | None = None
        self._hooks: list[Any] = []
        self._last: _Last | None = None
        self._handler: CallbackHandler | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Goes before the loggers and starts to count what the model is fed."""
        self.close()  # of training that ended in an exception
        if model is None:
            return
        if args.n_gpu > 1:
            logger.warning(
                "BarqMetricsCallback measures nothing in nn.DataParallel (%d GPUs in one process): start one "
                "process per GPU with `accelerate launch` or `torchrun`.",
                args.n_gpu,
            )
            return
        watch = _Watch(self)
        self._hooks = [
            model.register_forward_pre_hook(watch.before, with_kwargs=True),
            model.register_forward_hook(watch.after),
        ]
        self._handler = handler_of(self)
        if self._handler is not None:
            go_before_loggers(self._handler, self)
            self._last = _Last(self)
            self._handler.callbacks.append(self._last)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """The batches of a step have arrived."""
        if self._meter is not None:
            self._meter.timeline.mark(DATA)
        elif self._hooks and model is not None:
            fill = getattr(getattr(train_dataloader, "dataset", None), "fill", None)
            self._meter = ThroughputMeter(model, args.device, args.world_size, fill)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Completes an entry with a training loss."""
        if self._meter is None or logs is None or "loss" not in logs:
            return
        if "tokens_per_second" in logs:  # by another of us
            return
        entries = self._meter.logs()
        logs.update(entries)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(entries)  # a copy of logs

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leaves the model as it was."""
        self.close()

    def close(self) -> None:
        """Takes the hooks off the model; also after training that ended in an exception."""
        for hook in self._hooks:
            hook.remove()
        if self._handler is not None and self._last in self._handler.callbacks:
            self._handler.callbacks.remove(self._last)
        self._hooks, self._meter, self._handler, self._last = [], None, None, None

    def mark(self, kind: str) -> None:
        """Ends an interval of the timeline."""
        if self._meter is not None:
            self._meter.timeline.mark(kind)

    def add(self, inputs: dict[str, Any]) -> None:
        """Counts what the model is fed."""
        if self._meter is not None:
            self._meter.add(inputs)

    @property
    def on_gpu(self) -> bool:
        """Whether marks within a step say anything."""
        return self._meter is not None and self._meter.timeline.on_gpu


class _Watch:
    """Hooks of the model that a copy of it, in memory or in a file, does without."""

    def __init__(self, callback: BarqMetricsCallback | None = None) -> None:
        self._callback = callback

    def __reduce__(self) -> Any:
        return _Watch, ()

    # A compiler that traced them would make one event at all, and compile again for every count.
    @torch.compiler.disable
    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Not in an evaluation, nor for a reference that shares its weights.
        if self._callback is not None and model.training and torch.is_grad_enabled():
            self._callback.add(kwargs)

    @torch.compiler.disable
    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        callback = self._callback
        if callback is None or not callback.on_gpu or not model.training:
            return
        loss = _with_gradient(output)
        if loss is None:
            return
        callback.mark(WORK)

        # Trainer waits for the device after the backward pass, and then there is no backlog any more.
        def at_the_end(gradient: torch.Tensor) -> None:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: callback.mark(WORK))

        loss.register_hook(at_the_end)


def _with_gradient(output: Any) -> torch.Tensor | None:
    """A tensor of a model's output from which a backward pass may begin: the loss if it is there."""
    values = list(output.values()) if hasattr(output, "values") else output
    values = [output.get("loss"), *values] if hasattr(output, "get") else values
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return value
    return None


class _Last(TrainerCallback):
    """Marks when all other callbacks have had their say, so that their time is not that of the data."""

    def __init__(self, owner: BarqMetricsCallback) -> None:
        self._owner = owner

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._owner.mark(WORK)

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._owner.mark(WORK)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._owner.mark(WORK)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._owner.mark(WORK)

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs is not None and "loss" in logs:  # others may be logged in the middle of a step
            self._owner.mark(WORK)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._owner.mark(PAUSE)

    def on_predict(self, *_: Any, **__: Any) -> None:
        self._owner.mark(PAUSE)

    def on_save(self, *_: Any, **__: Any) -> None:
        self._owner.mark(PAUSE)
