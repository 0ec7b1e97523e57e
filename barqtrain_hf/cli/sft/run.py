"""A whole run, from the options to the saved model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoProcessor
from trl import SFTTrainer, get_peft_config, get_quantization_config

from barqtrain_hf.cli.sft import checks, data, summary
from barqtrain_hf.cli.sft.arguments import Options, explains, one_line
from barqtrain_hf.errors import ArgumentError, UnsupportedError
from barqtrain_hf.patching import register_attention
from barqtrain_hf.sft import BarqSFTTrainer

_WIDTH = 100  # where there is no terminal
# Where options are checked: by SFTTrainer, and by PEFT, which looks for lora_target_modules.
_CHECKING = (SFTTrainer.__module__, "peft.tuners.tuners_utils")


def run(options: Options) -> int:
    """Trains, saves, pushes if asked to, and says what came of it; returns the exit code."""
    register_attention()  # --attn_implementation barq is then one of transformers' own
    checks.check(options)
    train, evaluation = data.load(options)
    training, model = options.training, options.model
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    tokenizer = _tokenizer(model, training)
    with _mistakes_told():
        trainer = BarqSFTTrainer(
            model=model.model_name_or_path,
            args=training,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    try:
        result = trainer.train(resume_from_checkpoint=_checkpoint(training.resume_from_checkpoint))
    except KeyboardInterrupt:
        if any(Path(training.output_dir).glob("checkpoint-*/trainer_state.json")):
            hint = "To go on from the last checkpoint, add --resume_from_checkpoint true."
            print(f"\n{hint}", file=sys.stderr)
        raise
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=options.script.dataset_name)
    if trainer.is_world_process_zero():
        # What a message quotes may hold brackets: nothing in it is markup.
        width = None if sys.stdout.isatty() else _WIDTH
        console = Console(width=width, markup=False, emoji=False, highlight=False)
        console.print(f"\n{trainer.barq_report}", soft_wrap=True)
        console.print()
        console.print(summary.table(trainer, result))
        if not trainer.steps_trained:
            console.print(
                f"There was nothing left to train: the checkpoint is of step {result.global_step:,} of "
                f"{trainer.state.max_steps:,}. Raise --num_train_epochs or --max_steps to go on.",
                soft_wrap=True,
            )
        console.print(f"Model saved to {training.output_dir}.", soft_wrap=True)
        if training.push_to_hub:
            where = f"https://huggingface.co/{trainer.hub_model_id}"
            console.print(f"Model pushed to {where}.", soft_wrap=True)
    if hasattr(trainer, "end"):  # transformers 5.18: the loggers, and the process group
        trainer.end()
    return 0


def _tokenizer(model: Any, training: Any) -> Any:
    """The processing class that SFTTrainer would load; it may be missing from a folder."""
    name = model.model_name_or_path
    try:
        return AutoProcessor.from_pretrained(
            name,
            revision=model.model_revision,
            trust_remote_code=training.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        where = "in this folder" if Path(name).is_dir() else "of that name"
        raise ArgumentError(
            f"--model_name_or_path {name}: there is no tokenizer {where} that can be loaded; save one "
            f"there with tokenizer.save_pretrained. {one_line(error)}"
        ) from None


@contextmanager
def _mistakes_told() -> Iterator[None]:
    """What the constructor itself refuses is the user's mistake, and told as such.

    Errors from elsewhere, in a model or a data set, keep their traceback.
    """
    try:
        yield
    except ImportError as error:
        if not explains(error):
            raise
        raise UnsupportedError(one_line(error)) from None
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is None or trace.tb_frame.f_globals["__name__"] not in _CHECKING:
            raise
        raise ArgumentError(one_line(error)) from None


def _checkpoint(value: str | None) -> str | bool | None:
    """What ``--resume_from_checkpoint`` says: a folder, or whether to take the last one."""
    words = {"true": True, "false": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value
