"""Mistakes that SFTTrainer would report from deep inside, or not at all, in one sentence each."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

from barqtrain_hf.errors import DataError, UnsupportedError


def check_model(model: Any, args: Any) -> None:
    """Refuses a model without an LM head; of a name or path only the config is read.

    Raises:
        UnsupportedError: the model, or the class that its config names, predicts no tokens.
    """
    if isinstance(model, str):
        options = getattr(args, "model_init_kwargs", None) or {}
        config, _ = PreTrainedConfig.get_config_dict(model, revision=options.get("revision"))
        names = [name for name in config.get("architectures") or () if hasattr(transformers, name)]
        if not names or any(getattr(transformers, name).can_generate() for name in names):
            return
        name = names[0]
    else:
        head = getattr(model, "get_output_embeddings", None)
        if head is None or head() is not None:
            return
        name = type(model).__name__
    raise UnsupportedError(
        f"{name} has no LM head to train.",
        "Load the model with AutoModelForCausalLM.from_pretrained and pass that.",
    )


def check_not_empty(dataset: Any, name: str) -> None:
    """Refuses a data set without rows.

    Raises:
        DataError: it has none.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(f"the {name} data set is empty: pass at least one example.")


def check_columns(dataset: Any, args: Any, formatting_func: Any, name: str) -> None:
    """Refuses a data set that SFTTrainer finds nothing to train on in.

    Raises:
        DataError: it lacks the columns, or that of the text holds something else.
    """
    columns = getattr(dataset, "column_names", None)
    if not columns or formatting_func is not None:
        return
    wanted = ("input_ids", "messages", "conversations")
    if {"prompt", "completion"} <= set(columns) or any(column in columns for column in wanted):
        return
    if args.dataset_text_field in columns:
        _check_text(dataset, args.dataset_text_field, name)
        return
    missing = {"prompt": "completion", "completion": "prompt"}
    for column, other in missing.items():
        if column in columns:
            raise DataError(
                f"the {name} data set has a column {column!r} and none {other!r}, only "
                f"{', '.join(columns)}: rename a column to {other!r}."
            )
    raise DataError(
        f"the {name} data set has no column {args.dataset_text_field!r}, 'messages', 'prompt' with "
        f"'completion' or 'input_ids', only {', '.join(columns)}: pass dataset_text_field=, or rename a "
        "column."
    )


def _check_text(dataset: Any, column: str, name: str) -> None:
    kind = (getattr(dataset, "features", None) or {}).get(column)  # a stream may not know
    found = getattr(kind, "dtype", kind)
    if kind is not None and found not in ("string", "large_string", "string_view"):
        raise DataError(
            f"the {name} data set's column {column!r} holds {found}, not strings: pass "
            "dataset_text_field=, or convert the column."
        )
