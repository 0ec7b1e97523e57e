"""What the tests of BarqSFTTrainer share: data of every kind, a tokenizer, and two runs side by side."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from small_tokenizers import small_tokenizer
from transformers import Trainer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from barqtrain_hf import BarqSFTConfig, BarqSFTTrainer  # noqa: E402
from barqtrain_hf.ops import linear_cross_entropy  # noqa: E402
from barqtrain_hf.patching import head  # noqa: E402

datasets.disable_progress_bars()
STEPS = 4
# The assistant's turns are marked for assistant_only_loss.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>\n{% endgeneration %}{% else %}{{ m['content'] }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> Any:
    made = small_tokenizer()
    made.model_max_length = 4096
    made.chat_template = TEMPLATE
    return made


def text(number: int) -> str:
    return f"number {number} and more of it " * (1 + number % 4)


@functools.cache
def data(kind: str) -> Any:
    """24 examples as texts, chats, prompts, or tokens of which some rows have no target."""
    if kind == "texts":
        rows: list[Any] = [{"text": text(number)} for number in range(24)]
    elif kind == "prompts":
        rows = [{"prompt": f"ask {n} ", "completion": text(n)} for n in range(24)]
    elif kind == "chats":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"ask {number}"},
                    {"role": "assistant", "content": text(number)},
                ]
            }
            for number in range(24)
        ]
    else:
        tokens = [tokenizer()(text(number))["input_ids"] for number in range(24)]
        rows = [
            {"input_ids": ids, "labels": [-100] * len(ids) if n in (2, 3) else ids}
            for n, ids in enumerate(tokens)
        ]
    return datasets.Dataset.from_list(rows)


def model(family: str = "llama", **overrides: Any) -> Any:
    return tiny_model(family, vocab_size=len(tokenizer()), **overrides)


def arguments(path: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": STEPS,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        **options,
    }


class Calls:
    """How often the loss was computed in our head and in TRL's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ours = self.trls = 0
        utils = trl.trainer.utils
        stock = utils._ChunkedLogProbFunction

        class Watched:
            @staticmethod
            def apply(*args: Any) -> Any:
                self.trls += 1
                return stock.apply(*args)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.ours += 1
            return linear_cross_entropy(*args, **kwargs)

        patch.setattr(utils, "_ChunkedLogProbFunction", Watched)
        patch.setattr(head, "linear_cross_entropy", watched)


def train(
    trainer_class: type[Trainer],
    path: Path,
    kind: str = "texts",
    family: str = "llama",
    *,
    resume: str | None = None,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer that has trained; ``given`` goes to its constructor and ``options`` to its config."""
    ours = issubclass(trainer_class, BarqSFTTrainer)
    config_class = BarqSFTConfig if ours else trl.SFTConfig
    if not ours:
        options.pop("barq_config", None)
    train_dataset, eval_dataset = data(kind), data(kind).select(range(7))
    trainer = trainer_class(
        model(family),
        config_class(**arguments(path, **options)),
        **{
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": tokenizer(),
            **(given or {}),
        },
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_logs(
    stock: Trainer,
    ours: Trainer,
    tolerance: float = 1e-5,
    absolute: float = 1e-7,
    but: str = "none",
) -> None:
    """Every number that stock has logged, ours has too, but one; what else it logs are its own."""
    entries = [trainer.state.log_history for trainer in (stock, ours)]
    assert len(entries[0]) == len(entries[1]) > 0
    for theirs, mine in zip(*entries, strict=True):
        for name, value in theirs.items():
            if not name.endswith(("_runtime", "_per_second", but)):
                assert mine[name] == pytest.approx(value, rel=tolerance, abs=absolute), name
