"""Callbacks for any Trainer."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from barqtrain_hf.config import BarqConfig
from barqtrain_hf.patching import PatchReport, asks_for_trl_head, patch_model, unpatch_model
from barqtrain_hf.patching.head import OP as HEAD

logger = logging.getLogger(__name__)

_UNDER_STOCK = "a stock Trainer asks for logits; BarqTrainer for the loss without them"
_UNDER_TRL = (
    "fused_lm_head: for supervised fine-tuning, BarqSFTTrainer also takes the loss's gradient in the "
    "forward pass, waits for metrics only when it logs, and packs"
)


class BarqKernelsCallback(TrainerCallback):
    """Puts barqtrain_hf's leaf ops into the model while it trains and takes them out afterwards.

    With a stock `Trainer` this gives every op but the fused loss, which needs `BarqTrainer` to ask for
    it; its forward is put in place at construction, before accelerate wraps the model, and is inert.
    TRL's trainers with a fused head of their own (SFTTrainer, DPOTrainer and others) ask TRL's for the
    log-probabilities of labels; while they train, ours answers.

    Args:
        config: which ops; see `BarqConfig.load`.

    Attributes:
        report: what was installed, what was not and why, and what only our trainers give.
    """

    def __init__(self, config: BarqConfig | dict[str, Any] | str | None = None) -> None:
        self.config = BarqConfig.load(config)
        self.report: PatchReport | None = None
        self.of_our_trainer = False  # which asks for everything
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
        """Installs the leaf ops, and over TRL's fused head what answers in its place."""
        if model is None:
            return
        self._model = model
        config, attention = self.config, _brings_attention(args)
        if attention is not None:
            config = replace(config, attention=False)
        trl = asks_for_trl_head(model)
        kept = _keeps_trl_head(args) if trl else None
        self.report = patch_model(model, config, fused_head=trl and kept is None)
        for op, wanted, reason in (
            ("attention", self.config.attention, attention),
            ("fused_lm_head", self.config.linear_cross_entropy, kept),
        ):
            if wanted and reason is not None:
                self.report.forget(op)
                self.report.skip(op, "", reason)
        self._say_what_is_missing(self.report, trl)
        logger.info("%s", self.report)

    def _say_what_is_missing(self, report: PatchReport, trl: bool) -> None:
        """What a BarqTrainer or BarqSFTTrainer would do beyond what a trainer does with the callback."""
        report.unused.pop(HEAD, None)
        if self.of_our_trainer:
            return
        if not trl:
            report.unused[HEAD] = _UNDER_STOCK
        elif _UNDER_TRL not in report.notes:
            report.notes.append(_UNDER_TRL)

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


def _keeps_trl_head(args: TrainingArguments) -> str | None:
    """Why TRL's fused head must answer itself in this run, or None."""
    if getattr(args, "entropy_coef", 0.0) or getattr(args, "use_adaptive_entropy", False):
        return "the loss has an entropy bonus, and ours gives the entropy without a gradient"
    if getattr(args, "cast_lm_head_to_fp32", False):
        return "cast_lm_head_to_fp32=True wants its product in fp32"
    return None
