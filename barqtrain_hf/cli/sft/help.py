"""What ``barqtrain sft`` says of its options: the ones most used at once, all of them when asked.

The trainer's options are those of transformers' TrainingArguments, whose import takes seconds; the short help
does without it.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

_USAGE = """\
usage: barqtrain sft --model_name_or_path MODEL --dataset_name DATA [OPTIONS]
       barqtrain sft --config FILE.yaml [OPTIONS]

Fine-tunes a causal language model as `trl sft` does, with the same options, by BarqSFTTrainer. For example,
LoRA on packed rows, from a model and a data set that are folders or files here or names on the hub:

  barqtrain sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name chats.jsonl --output_dir out \\
    --packing --max_length 4096 --use_peft --lora_target_modules all-linear --learning_rate 2e-4

A data set has a column `text`, `messages`, or `prompt` and `completion`. It is a .jsonl, .json, .parquet,
.csv or .txt file, a glob of such, a folder (with train.jsonl and test.jsonl, say), or a name on the hub."""
_ENDING = """\
Exit codes: 0 done; 1 a failure, with its traceback; 2 a mistake in the options or the data, in one sentence;
130 after Ctrl-C. Options of `accelerate launch` (--num_processes 4) and --accelerate_config start several
processes; with several GPUs that is so by itself."""
# Name, value, what it does. Ours are repeated from BarqSFTConfig, whose import this cannot wait for.
OURS = (
    ("use_barq_kernels", "BOOL", "Train with barqtrain_hf's ops, loss and packing. Default: true."),
    (
        "barq_config",
        "JSON|FILE",
        "A JSON object such as '{\"rope\": false}', or the path of a JSON or YAML file. Its keys: "
        "rms_norm, layer_norm, glu, rope, attention, lora, linear_cross_entropy and packing, true or false "
        "each, and max_extra_bytes, an integer.",
    ),
)
CONFIG = ("config", "FILE", "A YAML file with options; those of the command line come first.")
MOST_USED = (
    ("output_dir", "DIR", "Where the model and its checkpoints go. Default: trainer_output."),
    ("packing", "BOOL", "Put several documents into each row of --max_length tokens."),
    (
        "max_length",
        "INT",
        "Tokens in a row; with packing, longer documents are split. Default: 1024.",
    ),
    ("per_device_train_batch_size", "INT", "Rows in a batch. Default: 8."),
    ("gradient_accumulation_steps", "INT", "Batches in an optimizer step. Default: 1."),
    ("learning_rate", "FLOAT", "Its peak. Default: 2e-5; ten times that is usual for LoRA."),
    ("num_train_epochs", "FLOAT", "Passes over the data. Default: 3."),
    ("max_steps", "INT", "Optimizer steps, in place of epochs."),
    ("gradient_checkpointing", "BOOL", "Less memory, more time. Default: true."),
    ("bf16", "BOOL", "Mixed precision, unless --fp16 is given. Default: true."),
    ("completion_only_loss", "BOOL", "No loss on prompts. Default: true with `completion`."),
    ("assistant_only_loss", "BOOL", "Of a chat, a loss on what the assistant says only."),
    ("eval_strategy", "no|steps|epoch", "When to evaluate, on --dataset_test_split."),
    ("logging_steps", "FLOAT", "Steps between logs. Default: 10."),
    ("report_to", "NAME", "A logger: wandb, tensorboard, trackio and others. Default: none."),
    ("save_strategy", "no|steps|epoch", "When to write checkpoints. Default: steps."),
    ("resume_from_checkpoint", "DIR|true", "Go on from a checkpoint, or from the last one."),
    ("push_to_hub", "BOOL", "Upload the model when it is done."),
    ("seed", "INT", "Of the order of the data and of new weights. Default: 42."),
    ("use_cpu", "BOOL", "Do without a GPU that is there."),
)
Row = Sequence[str]


def short() -> str:
    """Ours, the data's and the model's options, and the trainer's most used."""
    width = _width()
    all_of = "training, most used (all of them: barqtrain sft --help_all)"
    return "\n\n".join(
        [
            _USAGE,
            _section("barqtrain_hf", (*OURS, CONFIG), width),
            _section("data", _rows(ScriptArguments, DatasetMixtureConfig), width),
            _section("model, LoRA and quantisation", _rows(ModelConfig), width),
            _section(all_of, MOST_USED, width),
            _ENDING,
        ]
    )


def whole() -> str:
    """Every option, in groups."""
    from transformers import TrainingArguments
    from trl import SFTConfig

    from barqtrain_hf.sft import BarqSFTConfig

    width = _width()
    of_trainer = {field.name for field in fields(TrainingArguments)}
    of_trl = {field.name for field in fields(SFTConfig)}
    every = list(zip(fields(BarqSFTConfig), _rows(BarqSFTConfig), strict=True))
    ours = [row for field, row in every if field.name not in of_trl]
    sft = [row for field, row in every if field.name in of_trl - of_trainer]
    trainer = [row for field, row in every if field.name in of_trainer]
    return "\n\n".join(
        [
            _USAGE,
            _section("barqtrain_hf", (*ours, CONFIG), width),
            _section("data", _rows(ScriptArguments, DatasetMixtureConfig), width),
            _section("model, LoRA and quantisation", _rows(ModelConfig), width),
            _section("supervised fine-tuning (trl.SFTConfig)", sft, width),
            _section("training (transformers.TrainingArguments)", trainer, width),
            _ENDING,
        ]
    )


def _rows(*classes: Any) -> list[Row]:
    """Name, value and help of each field."""
    found: list[Row] = []
    for cls in classes:
        types = get_type_hints(cls)
        for field in fields(cls):
            text = inspect.cleandoc(str(field.metadata.get("help", ""))).replace("%%", "%")
            found.append((field.name, _value(field, types[field.name]), text + _default(field)))
    return found


def _value(field: Field[Any], hint: Any) -> str:
    choices = field.metadata.get("choices")
    if choices:
        return "|".join(map(str, choices))
    kinds = [kind for kind in _members(hint) if kind is not type(None)]
    # In the parser's order: of a type that may be a text, too, it takes one word.
    names = {bool: "BOOL", dict: "JSON", str: "TEXT", list: "TEXT ...", int: "INT", float: "FLOAT"}
    kinds = [get_origin(kind) or kind for kind in kinds]
    return next((name for kind, name in names.items() if kind in kinds), "TEXT")


def _members(hint: Any) -> tuple[Any, ...]:
    origin = get_origin(hint)
    is_union = origin is Union or type(hint).__name__ == "UnionType"
    return get_args(hint) if is_union else (hint,)


def _default(field: Field[Any]) -> str:
    value = field.default
    if value is MISSING or value is None or value == "":
        return ""
    return f" Default: {str(value).lower() if isinstance(value, bool) else value}."


def _section(title: str, rows: Iterable[Row], width: int) -> str:
    lines = [f"{title}:"]
    for name, value, text in rows:
        lines.append(f"  --{name} {value}")
        lines += textwrap.wrap(
            text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines)


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
