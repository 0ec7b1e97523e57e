"""Trainer's `logging_nan_inf_filter` on the device.

After every micro-step Trainer asks on the host whether the loss is finite, and so waits for the device: what
comes next (clipping, the optimizer, the next batch) is launched while the device has nothing to do. The same
choice made on the device waits for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import is_torch_xla_available


class LossFilter(TrainerCallback):
    """Replaces losses that are not finite, while Trainer's own question is switched off.

    It is off from the end of a micro-step to the next event only: evaluation asks it too, and checkpoints
    save the arguments.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._args = trainer.args
        self._off = False
        trainer.callback_handler.callbacks.insert(0, self)  # no other sees it switched off

    def finite(self, trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
        """The loss, or where it is not finite the mean of those since the last log, as Trainer takes it.

        For the last word on a micro-step's loss: nobody may change it between this and Trainer.
        """
        so_far = getattr(trainer, "_tr_loss", None)  # not in an older Trainer
        wanted = self._off or self._args.logging_nan_inf_filter
        if not wanted or not trainer.is_in_train or is_torch_xla_available():
            return loss
        if so_far is None or loss.device != so_far.device:
            return loss
        self._args.logging_nan_inf_filter, self._off = False, True
        steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
        return torch.where(torch.isfinite(loss), loss, so_far / steps)

    def restore(self) -> None:
        """Lets Trainer ask again."""
        if self._off:
            self._args.logging_nan_inf_filter, self._off = True, False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.restore()  # Trainer begins again when a batch was too large

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.restore()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.restore()
