"""BarqSamplesCallback: what the model writes, beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.reporting import go_before_loggers, handler_of, loggers
from barqtrain_hf.samples import (
    EncodedPrompt,
    Prompt,
    Sampling,
    check_prompts,
    check_tokenizer,
    encode,
    generate,
)

COLUMNS = ["step", "prompt", "sample"]


class BarqSamplesCallback(TrainerCallback):
    """Generates from fixed prompts at every evaluation, and when training ends if there was none.

    With wandb the samples since training began are logged as the table ``samples``, with the columns step,
    prompt and sample; with TensorBoard as texts ``samples/0`` and so on, one for each prompt. They are also
    printed, on the main process. Without any logger nothing is generated, unless ``show`` asks for it.

    Training goes on as it would without: the model's modes and the states of PyTorch's random number
    generators are put back. Of several processes the main one generates while the others wait.

    Args:
        prompts: texts, or chats as lists of messages with "role" and "content", for the chat template.
        processing_class: a tokenizer, or a processor that has one; None for the Trainer's.
        max_new_tokens: length of a sample, in tokens, unless it ends before.
        do_sample: whether to draw; False for the most probable token every time (greedy).
        temperature: divides the logits before tokens are drawn; 0 for greedy too.
        top_k: draw from this many most probable tokens; None for all.
        top_p: draw from the most probable tokens that have this probability together; None for all.
        seed: for drawing, the same at every evaluation.
        show: whether to print samples; None for: if a logger is on.

    Raises:
        ArgumentError: no prompts, a value out of range, or chats and a tokenizer without a chat template.
        ArgumentTypeError: an argument of another type.
        UnsupportedError: when training begins: weights in parts on several processes (FSDP, ZeRO-3, tensor
            parallelism), or a model that does not generate.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        processing_class: Any = None,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        show: bool | None = None,
    ) -> None:
        self._prompts = check_prompts(prompts)
        self._processing_class = processing_class
        if processing_class is not None:
            check_tokenizer(self._prompts, processing_class)
        self._sampling = Sampling(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        self._show = show
        self._rows: list[list[Any]] = []
        self._step: int | None = None  # of the last samples
        self._ready: tuple[Any, list[EncodedPrompt]] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Reads the prompts, so that what is wrong with them is an error now."""
        self._step, self._rows, self._ready = None, [], None
        handler = handler_of(self)
        if handler is not None:
            go_before_loggers(handler, self)  # TensorBoard's closes its file when training ends
        if self._wanted(handler):
            self._prepare(args, model, processing_class)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Generates, once in a step."""
        if self._step != state.global_step:
            self._sample(handler_of(self), args, state, model, processing_class)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Generates if no evaluation did."""
        if self._step is None:
            self._sample(handler_of(self), args, state, model, processing_class)

    def _wanted(self, handler: CallbackHandler | None) -> bool:
        return bool(self._show or loggers(handler))

    def _prepare(
        self, args: TrainingArguments, model: Any, processing_class: Any
    ) -> tuple[Any, list[EncodedPrompt]]:
        if self._ready is None:
            _check_model(model, args)
            given = self._processing_class
            tokenizer = check_tokenizer(self._prompts, processing_class if given is None else given)
            self._ready = tokenizer, encode(self._prompts, tokenizer)
        return self._ready

    def _sample(
        self,
        handler: CallbackHandler | None,
        args: TrainingArguments,
        state: TrainerState,
        model: Any,
        processing_class: Any,
    ) -> None:
        if not self._wanted(handler):
            return
        tokenizer, prompts = self._prepare(args, model, processing_class)
        self._step = state.global_step
        if not state.is_world_process_zero:
            return
        samples = generate(
            model, tokenizer, prompts, self._sampling, args.per_device_eval_batch_size
        )
        rows = [
            [state.global_step, prompt.text, sample]
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        self._rows += rows
        on = loggers(handler)
        if "wandb" in on:
            _log_to_wandb(self._rows, state.global_step)
        if "tensorboard" in on:
            _log_to_tensorboard(on["tensorboard"], rows)
        if self._show or self._show is None:
            _print(rows)


def _check_model(model: Any, args: TrainingArguments) -> None:
    if not hasattr(model, "generate"):
        raise UnsupportedError(
            f"{type(model).__name__} has no generate(), so BarqSamplesCallback cannot sample from it.",
            "Drop the callback.",
        )
    parallelism = getattr(args, "parallelism_config", None)
    reason = None
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        reason = "DeepSpeed ZeRO-3 splits the weights over processes"
    elif any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        reason = "FSDP2 or tensor parallelism splits the weights over processes"
    elif "FullyShardedDataParallel" in {type(module).__name__ for module in model.modules()}:
        reason = "FSDP splits the weights over processes"
    elif parallelism is not None and parallelism.non_data_parallel_size > 1:
        reason = "context or sequence parallelism splits rows over processes"
    if reason is not None:
        raise UnsupportedError(
            f"BarqSamplesCallback generates on the main process alone, and {reason}.",
            "Drop the callback and sample from a checkpoint, or train with DDP.",
        )


def _log_to_wandb(rows: list[list[Any]], step: int) -> None:
    import wandb

    if wandb.run is None:  # finished, or never begun
        return
    table = wandb.Table(columns=COLUMNS, data=rows)
    wandb.run.log(
        {"samples": table, "train/global_step": step}
    )  # the axis of Trainer's own entries


def _log_to_tensorboard(logger: Any, rows: list[list[Any]]) -> None:
    if logger.tb_writer is None:  # evaluation after training
        return
    for number, (step, prompt, sample) in enumerate(rows):
        # Indented, for it is shown as Markdown.
        text = "".join(f"    {line}\n" for line in f"{prompt}\n\n{sample}".split("\n"))
        logger.tb_writer.add_text(f"samples/{number}", text, step)


def _print(rows: list[list[Any]]) -> None:
    table = Table(title=f"samples at step {rows[0][0]}", show_lines=True)
    for column in COLUMNS[1:]:
        table.add_column(column)
    for _, prompt, sample in rows:
        table.add_row(Text(prompt), Text(sample))  # brackets are no markup here
    Console().print(table)
