"""BarqTrainer: a `transformers.Trainer` whose loss never holds all logits and whose leaves are ours."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from barqtrain_hf.callbacks import BarqKernelsCallback
from barqtrain_hf.checkpoints import (
    begin_checkpoint,
    checkpoint_folder,
    last_whole_checkpoint,
    read_stream_state,
)
from barqtrain_hf.config import BarqConfig, check_liger
from barqtrain_hf.data import BarqDataCollator, PackedDataset, PackedStream, TokenStore
from barqtrain_hf.data.batch import PackedBatch
from barqtrain_hf.data.ranks import LINEAR_COST, BalancedBatches
from barqtrain_hf.errors import ArgumentTypeError, DataError, UnsupportedError
from barqtrain_hf.loss_filter import LossFilter
from barqtrain_hf.metrics_callback import BarqMetricsCallback
from barqtrain_hf.patching import (
    FusedLoss,
    PatchReport,
    check_module,
    head_unsupported,
    raise_bad_target,
    unwrap,
)
from barqtrain_hf.patching.head import OP as FUSED_HEAD
from barqtrain_hf.patching.known_documents import remember
from barqtrain_hf.streaming import StreamTraining

logger = logging.getLogger(__name__)


class BarqTrainer(Trainer):
    """Takes exactly what `Trainer` takes and trains the same model to the same loss.

    With `BarqTrainingArguments` the flags `use_barq_kernels` and `barq_config` choose what is installed;
    with plain `TrainingArguments` everything is. A `PackedDataset` brings its own collator and is packed
    anew for every epoch, except with ``dataloader_persistent_workers``. A `PackedStream` as train_dataset
    hands out whole batches, which no collator sees; its place is in every checkpoint. Logs gain what
    `BarqMetricsCallback` says, of which every BarqTrainer has one.

    Raises:
        UnsupportedError: `use_liger_kernel` with its fused cross-entropy, several GPUs in one process
            (nn.DataParallel); a `PackedStream` as eval_dataset, or with workers of a DataLoader.
        ArgumentError: a `PackedStream` without max_steps.
        DataError: an empty train_dataset.
        ArgumentTypeError: a name in place of a model or a data set, or other arguments of the wrong type.
    """

    # Of the stock trainer whose place this takes; a subclass may take another's.
    _stock_signature = inspect.signature(Trainer.__init__)
    _loads_models = False  # by their names, as TRL's trainers do
    _loading = "Pass PackedDataset(tokenize(files, tokenizer, path), max_length)."

    @functools.wraps(Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self._stock_signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        training_args = given.get("args")
        self._check_types(given)
        self._kernels = _kernels_callback(training_args)
        if self._kernels is not None:
            # Among the callbacks it is told of the model as soon as there is one.
            given["callbacks"] = [*(given.get("callbacks") or ()), self._kernels]
        self._loss_only = False
        datasets = [given.get("train_dataset"), *_each(given.get("eval_dataset"))]
        if hasattr(datasets[0], "__len__") and len(datasets[0]) == 0:
            raise DataError("train_dataset is empty: there is nothing to train on.")
        self._stream: StreamTraining | None = None
        if isinstance(datasets[0], PackedStream):
            self._stream = StreamTraining(datasets[0], training_args)
        if any(isinstance(dataset, PackedStream) for dataset in datasets[1:]):
            raise UnsupportedError(
                "eval_dataset is a PackedStream, whose batches would be collated again, and begin with "
                "another epoch each time.",
                "Pass PackedDataset(tokenize(dataset, tokenizer, path), max_length).",
            )
        if given.get("data_collator") is None and any(
            isinstance(d, (PackedDataset, PackedStream)) for d in datasets
        ):
            given["data_collator"] = BarqDataCollator()  # it takes rows that are not packed too
        super().__init__(**given)
        if self.args.n_gpu > 1:
            raise UnsupportedError(
                f"BarqTrainer does not run in nn.DataParallel ({self.args.n_gpu} GPUs in one process).",
                "Start one process per GPU with `accelerate launch` or `torchrun`, or set "
                "CUDA_VISIBLE_DEVICES=0.",
            )
        if self._kernels is not None:
            check_liger(self.args, self._kernels.config)
            self._kernels.install_head(self.model)
        self._loss_filter = LossFilter(self)
        self._start = _Start()
        self.add_callback(self._start)
        if not self._metrics_callbacks():
            self.add_callback(BarqMetricsCallback())
        if isinstance(self.train_dataset, PackedDataset):
            self.add_callback(_Repack(self.train_dataset))
        elif isinstance(self.train_dataset, PackedStream):
            # Also one that a subclass made of what it was given.
            self._stream = self._stream or StreamTraining(self.train_dataset, self.args)
            self.add_callback(self._stream)

    def _check_types(self, given: dict[str, Any]) -> None:
        """What Trainer would fail on later, in words that name no argument."""
        model, args = given.get("model"), given.get("args")
        if model is not None and not (self._loads_models and isinstance(model, str)):
            check_module("model", model)
        if args is not None and not isinstance(args, TrainingArguments):
            raise ArgumentTypeError(
                f"args is of type {type(args).__name__}: pass BarqTrainingArguments(output_dir=…)."
            )
        for name in ("train_dataset", "eval_dataset"):
            if isinstance(given.get(name), (str, os.PathLike)):
                raise ArgumentTypeError(
                    f"{name} is {given[name]!r}, a name: load it first. {self._loading}"
                )
            if isinstance(given.get(name), TokenStore):
                raise ArgumentTypeError(
                    f"{name} is a TokenStore, whose documents are in no batches yet: pass "
                    f"PackedDataset({name}, max_length)."
                )

    @property
    def barq_report(self) -> PatchReport:
        """What is installed in the model, what is not and why; print it to read it."""
        if self._kernels is None or self._kernels.report is None:
            return PatchReport()
        return self._kernels.report

    @property
    def steps_trained(self) -> int:
        """Optimizer steps of the last training: 0 where the checkpoint that it resumed from was the last."""
        return max(0, self.state.global_step - self._start.step)

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; batches in pinned memory are copied while the device works, not after it."""
        super().create_accelerator_and_postprocess()
        if self.args.dataloader_pin_memory and self.args.device.type == "cuda":
            self.accelerator.dataloader_config.non_blocking = True

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in Trainer; the new model gets the head path too."""
        model = super().call_model_init(trial)
        if self._kernels is not None and hasattr(self, "accelerator"):
            self._kernels.install_head(model)
        self.__dict__.pop("_matrix_parameters", None)
        return model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Trainer; the stock forwards of the layers are back afterwards, whatever happened.

        That of the LM head stays for `evaluate`, and is the stock one unless it is asked for the loss.

        With ``resume_from_checkpoint=True`` checkpoints that a killed run did not finish are passed over.

        Raises:
            DataError: there is none to resume from, or it does not say where the `PackedStream` was.
            ArgumentError: it is one of another `PackedStream`.
        """
        if resume_from_checkpoint is True:
            check = (lambda folder: None) if self._stream is None else read_stream_state
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, check)
        try:
            if self._stream is not None:
                self._stream.begin(self.args, resume_from_checkpoint or None)
            if self._kernels is not None and self.model is not None:
                self._kernels.install_head(self.model)  # the head may have been replaced since
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if not self.steps_trained:
                logger.warning(
                    "There was nothing left to train: the checkpoint is of step %d of %d. Raise "
                    "num_train_epochs or max_steps to go on.",
                    self.state.global_step,
                    self.state.max_steps,
                )
            return result
        finally:
            for metrics in self._metrics_callbacks():
                metrics.close()
            self._loss_filter.restore()
            if self._stream is not None:
                self._stream.end(self.args)
            if self._kernels is not None:
                self._kernels.restore()

    def get_train_dataloader(self) -> Any:
        """As in Trainer, with rows of a `PackedDataset` dealt so that the ranks of a step take equally long.

        A `PackedStream` hands out its batches itself.
        """
        if self._stream is not None:
            return self._stream.loader(self)
        loader = super().get_train_dataloader()
        shard = getattr(loader, "batch_sampler", None)
        if (
            isinstance(self.train_dataset, PackedDataset)
            and isinstance(shard, BatchSamplerShard)
            and shard.num_processes > 1
            and not shard.split_batches
        ):
            size = getattr(getattr(unwrap(self.model), "config", None), "hidden_size", None)
            shard.batch_sampler = BalancedBatches(
                shard.batch_sampler,
                self.train_dataset,
                shard.num_processes,
                self.args.gradient_accumulation_steps,
                6 * size if isinstance(size, int) else LINEAR_COST,
            )
        return loader

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in Trainer; what is known of a packed batch on the host goes on with it."""
        # Before they are moved: it may be that they are still on the host.
        boundaries = inputs.boundaries if isinstance(inputs, PackedBatch) else None
        prepared = super()._prepare_inputs(inputs)
        if boundaries is not None:
            remember(prepared["position_ids"], prepared["cu_seq_lens_q"], boundaries)
        return prepared

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; but resumed from its last step, training takes no step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The stock loss, computed in the head without logits wherever nobody needs them."""
        if not self._fuses(model, inputs, return_outputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        takes_count = _smoother_takes_count() if smoothing else self.model_accepts_loss_kwargs
        count = num_items_in_batch if takes_count else None
        factor = 1
        if (
            self.args.average_tokens_across_devices
            and self.model_accepts_loss_kwargs
            and num_items_in_batch is not None
        ):
            # The Trainer counts targets over all ranks while DDP averages gradients over them.
            parallel = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
            factor = self.accelerator.num_processes // parallel
        if count is not None and factor != 1:
            # In the divisor the factor costs nothing; on the loss, a pass over the head's gradient.
            count, factor = count / factor, 1
        fused = FusedLoss(
            count,
            smoothing,
            self._kernels.config.max_extra_bytes if self._kernels else None,
        )
        outputs = model(**inputs, fused_loss=fused)
        if "logits" in outputs:
            raise UnsupportedError(
                f"{type(model).__name__} did not pass fused_loss on to the model it wraps, so its loss "
                "would be divided wrongly.",
                'Pass barq_config={"linear_cross_entropy": False}.',
            )
        loss = outputs["loss"] * factor if factor != 1 else outputs["loss"]
        return (loss, {"loss": loss}) if return_outputs else loss

    def _fuses(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> bool:
        """Whether this loss can be computed in the head; a reason against it is put in the report."""
        if self._kernels is None or not self._kernels.config.linear_cross_entropy:
            return False
        base = unwrap(model)
        reason = None
        if return_outputs and not self._loss_only:
            reason = "the logits are needed (compute_metrics, or a subclass that asks for outputs)"
        elif self.compute_loss_func is not None:
            reason = "compute_loss_func needs the logits"
        elif self.label_smoother is not None and (
            type(base).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        ):
            reason = "Trainer smooths this model's labels without a shift"
        elif getattr(getattr(self.accelerator, "parallelism_config", None), "sp_enabled", False):
            reason = "sequence parallelism computes its own loss"
        elif FUSED_HEAD in self.barq_report.installed:
            reason = head_unsupported(base, inputs)
        else:
            return False  # never installed, which the report says already
        if reason is not None:
            self.barq_report.fall_back(FUSED_HEAD, reason)
        return reason is None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in Trainer; where only the loss is wanted, no logits are made."""
        # A subclass's compute_loss may read the outputs it asks for.
        self._loss_only = (
            prediction_loss_only and type(self).compute_loss is BarqTrainer.compute_loss
        )
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in Trainer, without waiting for the device afterwards."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        # A subclass's step may go on with the loss; then Trainer asks as ever.
        last = type(self).training_step is BarqTrainer.training_step
        return self._loss_filter.finite(self, loss) if last else loss

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            folder = self._get_output_dir(trial=trial)
            folder = checkpoint_folder(folder, self.state.global_step)
            begin_checkpoint(folder)
            if self._stream is not None and not self.args.save_only_model:
                self._stream.save(folder)
        super()._save_checkpoint(model, trial, *args, **kwargs)

    def _metrics_callbacks(self) -> list[BarqMetricsCallback]:
        callbacks = self.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, BarqMetricsCallback)]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Trainer.

        Raises:
            ArgumentError: a label outside the vocabulary in a step of a compiled model since the last call.
        """
        raise_bad_target()
        if "train_loss" in logs and not self.steps_trained:
            del logs["train_loss"]  # the mean of no steps, which Trainer says is 0
        super().log(logs, *args, **kwargs)

    @functools.cached_property
    def _matrix_parameters(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in Trainer, without walking all parameters at every micro-step."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        return 6 * int(inputs[name].numel()) * self._matrix_parameters


class _Start(TrainerCallback):
    """Remembers the step that training began at."""

    step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step


class _Repack(TrainerCallback):
    """Packs anew for every epoch, also for one that is resumed in its middle."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset
        self._epoch = 0
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = len(kwargs["train_dataloader"])
        # As Trainer counts them: state.epoch is a fraction, and not exact.
        self._epoch = state.global_step // max(1, -(-batches // args.gradient_accumulation_steps))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Workers that outlive an epoch have copies of their own, out of reach.
        if not args.dataloader_persistent_workers:
            self._dataset.repack(self._epoch)
        elif not self._warned:
            self._warned = True
            logger.warning(
                "dataloader_persistent_workers=True keeps the rows of PackedDataset those of the first "
                "epoch: pass False to have documents packed anew for every epoch."
            )
        self._epoch += 1


def _kernels_callback(args: TrainingArguments | None) -> BarqKernelsCallback | None:
    if not getattr(args, "use_barq_kernels", True):
        return None
    kernels = BarqKernelsCallback(BarqConfig.load(getattr(args, "barq_config", None)))
    kernels.of_our_trainer = True
    return kernels


def _each(dataset: Any) -> list[Any]:
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


@functools.cache
def _smoother_takes_count() -> bool:
    """Later releases of transformers divide the smoothed loss by num_items_in_batch too."""
    return "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
