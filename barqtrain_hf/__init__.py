"""Faster, smaller Hugging Face fine-tuning. Importing this changes nothing in transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barqtrain_hf.callbacks import BarqKernelsCallback
    from barqtrain_hf.config import BarqConfig, BarqTrainingArguments
    from barqtrain_hf.metrics_callback import BarqMetricsCallback
    from barqtrain_hf.patching import patch_model, unpatch_model
    from barqtrain_hf.samples_callback import BarqSamplesCallback
    from barqtrain_hf.sft import BarqSFTConfig as BarqSFTConfig
    from barqtrain_hf.sft import BarqSFTTrainer as BarqSFTTrainer
    from barqtrain_hf.trainer import BarqTrainer

__version__ = "0.1.0"
# Without those that need an extra: a star import must work without it.
__all__ = [
    "BarqConfig",
    "BarqKernelsCallback",
    "BarqMetricsCallback",
    "BarqSamplesCallback",
    "BarqTrainer",
    "BarqTrainingArguments",
    "patch_model",
    "unpatch_model",
]

_HOME = {
    "BarqConfig": "barqtrain_hf.config",
    "BarqKernelsCallback": "barqtrain_hf.callbacks",
    "BarqMetricsCallback": "barqtrain_hf.metrics_callback",
    "BarqSamplesCallback": "barqtrain_hf.samples_callback",
    "BarqSFTConfig": "barqtrain_hf.sft",
    "BarqSFTTrainer": "barqtrain_hf.sft",
    "BarqTrainer": "barqtrain_hf.trainer",
    "BarqTrainingArguments": "barqtrain_hf.config",
    "patch_model": "barqtrain_hf.patching",
    "unpatch_model": "barqtrain_hf.patching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'barqtrain_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
