"""Callbacks for any Trainer."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from barqtrain_hf.config import BarqConfig
from barqtrain_hf.patching import PatchReport, patch_model, unpatch_model

logger = logging.getLogger(__name__)


class BarqKernelsCallback(TrainerCallback):
    """Puts barqtrain_hf's leaf ops into the model while it trains and takes them out afterwards.

    With a stock `Trainer` this gives every op but the fused loss, which needs `BarqTrainer` to ask for
    it; its forward is put in place at construction, before accelerate wraps the model, and is inert.

    Args:
        config: which ops; see `BarqConfig.load`.
    """

    def __init__(self, config: BarqConfig | dict[str, Any] | str | None = None) -> None:
        self.config = BarqConfig.load(config)
        self.report: PatchReport | None = None
        self._model: nn.Module | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts the inert head path in place."""
        if model is not None:
            self.install_head(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Installs the leaf ops."""
        if model is not None:
            self._model = model
            config, reason = self.config, _brings_attention(args)
            if reason is not None:
                config = replace(config, attention=False)
            self.report = patch_model(model, config, fused_head=False)
            if self.config.attention and reason is not None:
                self.report.forget("attention")
                self.report.skip("attention", "", reason)
            logger.info("%s", self.report)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Restores the stock forwards of the leaves."""
        self.restore()

    def install_head(self, model: nn.Module) -> None:
        """Puts the inert head path into a model that accelerate has not wrapped yet."""
        self.report = patch_model(model, self.config, leaves=False)

    def restore(self) -> None:
        """Restores the leaves; also after training that ended in an exception."""
        if self._model is not None:
            unpatch_model(self._model, fused_head=False)
            self._model = None


def _brings_attention(args: TrainingArguments) -> str | None:
    """Why the model's attention is not to be replaced in this run, or None."""
    parallelism = getattr(args, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        return "context or sequence parallelism splits rows over ranks and needs its own attention"
    return None
