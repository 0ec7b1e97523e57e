"""BarqSFTTrainer: TRL's SFTTrainer with our loss, kernels and packing."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from barqtrain_hf.config import BarqConfig, check_liger
from barqtrain_hf.data import PackedDataset
from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.patching import (
    FusedLoss,
    PatchReport,
    TokenOutput,
    head_unsupported,
    unwrap,
)
from barqtrain_hf.patching.head import OP as FUSED_HEAD
from barqtrain_hf.sft.checks import check_columns, check_model, check_not_empty
from barqtrain_hf.sft.config import sft_arguments
from barqtrain_hf.sft.metrics import TokenMetrics
from barqtrain_hf.sft.packing import Packer, SFTCollator
from barqtrain_hf.trainer import BarqTrainer

# What the report calls SFTTrainer's loss and metrics, where they are computed here.
_LOSS = "sft_loss"


class BarqSFTTrainer(BarqTrainer, SFTTrainer):  # type: ignore[misc]
    """Takes exactly what `SFTTrainer` takes and trains the same model to the same loss and metrics.

    With `BarqSFTConfig` the flags `use_barq_kernels` and `barq_config` choose what is installed; with
    `SFTConfig` and `TrainingArguments` everything is. The losses (nll and DFT), metrics, evaluation,
    checkpoints and model cards are SFTTrainer's. The loss takes its gradient in the forward pass where the
    rows allow it, and metrics wait on the device until they are logged. Logs gain what `BarqTrainer`'s do.

    With ``packing=True`` and best-fit packing (the default) a map-style data set becomes a `PackedDataset`,
    packed anew for every epoch. Documents longer than ``max_length`` are split, where TRL's ``"bfd"`` cuts
    off what is too long. The report says where SFTTrainer prepares data itself, and why.

    Raises:
        UnsupportedError: a model without an LM head, or `use_liger_kernel` with its fused cross-entropy.
        DataError: a data set is empty, or has no column to train on.
    """

    _tag_names = [*SFTTrainer._tag_names, "barq"]  # noqa: RUF012
    _stock_signature = inspect.signature(SFTTrainer.__init__)
    _loads_models = True
    _loading = "Pass datasets.load_dataset(…, split='train')."

    @functools.wraps(SFTTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self._stock_signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        given["args"] = training_args = sft_arguments(given.get("args"))
        self._tokens = TokenMetrics()
        self._packer = Packer()
        check_model(given["model"], training_args)
        if isinstance(given["model"], str):
            self._check_columns_first(given)
        if getattr(training_args, "use_barq_kernels", True):
            # Here already, for SFTTrainer leaves Liger's loss out and says nothing.
            check_liger(training_args, BarqConfig.load(getattr(training_args, "barq_config", None)))
        super().__init__(**given)
        if self._packs and self.padding_free and not self._skip_prepare_dataset:
            self.data_collator = SFTCollator(
                self.args.pad_to_multiple_of, self._tokenizer.pad_token_id
            )

    @staticmethod
    def _check_columns_first(given: dict[str, Any]) -> None:
        """Before a model is loaded, where it is certain that SFTTrainer would prepare the data set."""
        args = given["args"]
        if not isinstance(args, SFTConfig) or (args.dataset_kwargs or {}).get(
            "skip_prepare_dataset"
        ):
            return
        for name in ("train", "eval"):
            dataset = given.get(f"{name}_dataset")
            columns = getattr(dataset, "column_names", None)
            if isinstance(columns, list) and not {"image", "images"} & set(columns):
                check_columns(dataset, args, given.get("formatting_func"), name)

    @property
    def barq_report(self) -> PatchReport:
        """What is installed in the model and in the data, what is not and why; print it to read it."""
        report = super().barq_report
        self._packer.tell(report)
        return report

    @property
    def _packs(self) -> bool:
        return self._kernels is not None and self._kernels.config.packing

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        if isinstance(dataset, PackedDataset):  # prepared before, and now given to evaluate()
            return dataset
        check_not_empty(dataset, dataset_name)
        check_columns(dataset, args, formatting_func, dataset_name)
        prepare = super()._prepare_dataset

        def by_trl(args: Any, packing: bool) -> Any:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)

        if not packing or not self._packs:
            return by_trl(args, packing)
        return self._packer.prepare(
            dataset,
            processing_class,
            args,
            formatting_func,
            dataset_name,
            self.completion_only_loss,
            by_trl,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """SFTTrainer's loss and metrics; its own code computes them where more than these is wanted."""
        if not self._fuses(model, inputs, return_outputs):
            return super(BarqTrainer, self).compute_loss(
                model, inputs, return_outputs, num_items_in_batch
            )
        assert self._kernels is not None
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        count, factor = num_items_in_batch, 1
        if self.args.average_tokens_across_devices and count is not None:
            # The Trainer counts targets over all ranks while DDP averages gradients over them.
            factor = self.accelerator.num_processes // self.get_tp_size()
        dft = self.args.loss_type == "dft"
        fused = FusedLoss(
            # In the divisor the factor costs nothing; on the loss, a pass over the head's gradient.
            count if count is None or dft or factor == 1 else count / factor,
            max_extra_bytes=self._kernels.config.max_extra_bytes,
            tokens="gradient" if dft else "statistics",
        )
        outputs = model(**inputs, fused_loss=fused)
        if "label_mask" not in outputs:
            raise UnsupportedError(
                f"{type(model).__name__} did not pass fused_loss on to the model it wraps, so its loss "
                "would be divided wrongly.",
                'Pass barq_config={"linear_cross_entropy": False}.',
            )
        loss = factor * _dft(outputs, count) if dft else outputs["loss"]
        if self.aux_loss_enabled:
            # A mean over a micro-batch, in a loss that Trainer does not divide by their number.
            accumulated = num_items_in_batch is not None
            steps = self.current_gradient_accumulation_steps if accumulated else 1
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"] / steps
        mode = "train" if self.model.training else "eval"
        with torch.no_grad():
            self._tokens.add(mode, outputs, inputs, self.accelerator)
        return loss

    def _fuses(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> bool:
        report = super().barq_report
        if FUSED_HEAD not in report.installed:
            return False
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        reason = None
        if return_outputs:
            reason = "the logits are needed (compute_metrics, or a subclass that asks for outputs)"
        elif self.compute_loss_func is not None:
            reason = "compute_loss_func needs the logits"
        elif self.label_smoother is not None and self.args.loss_type == "nll":
            reason = "label smoothing needs the logits"
        elif getattr(parallelism, "sp_enabled", False):
            reason = "sequence parallelism reduces its own loss"
        elif self._is_vision_dataset:
            reason = "SFTTrainer explains what goes wrong with images"
        else:
            reason = head_unsupported(unwrap(model), inputs, tokens=True)
        if reason is not None:
            report.fall_back(_LOSS, reason)
        return reason is None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in SFTTrainer, whose metrics are read from the device now, and as in BarqTrainer."""
        for mode, (batches, means, tokens) in self._tokens.read().items():
            metrics = self._metrics[mode]
            for name, mean in means.items():
                metrics[name].extend([mean] * batches)
            if mode == "train":
                self._total_train_tokens += tokens // self._tp_size
            metrics["num_tokens"] = [self._total_train_tokens]
        super().log(logs, *args, **kwargs)


def _dft(outputs: TokenOutput, count: torch.Tensor | float | None) -> torch.Tensor:
    """The loss of Dynamic Fine-Tuning (arXiv:2508.05629): each token's weighted by its probability."""
    log_probs = outputs["log_probs"]
    losses = -log_probs * log_probs.exp().detach()
    divisor = torch.as_tensor(outputs["label_mask"].sum() if count is None else count)
    return losses.sum() / divisor.clamp(min=1).to(losses.device)  # type: ignore[no-any-return]
