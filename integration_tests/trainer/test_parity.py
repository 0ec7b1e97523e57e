"""BarqTrainer trains to stock Trainer's losses and gradient norms, in every supported combination.

Each case runs both for a few optimizer steps on the same batches: losses agree to 1e-5, gradient norms to
1e-4, evaluation losses to 1e-5 in fp32, to rounding in bf16. The data has natural lengths, prompts without
loss, and one micro-batch with no target at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny_model
from transformers import Trainer, TrainingArguments

from barqtrain_hf import BarqTrainer, BarqTrainingArguments

STEPS = 4


class Rows(torch.utils.data.Dataset):
    """Padded rows of random tokens; a third of the targets are ignored."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for i in range(count):
            length = int(torch.randint(4, 25, (1,), generator=generator))
            ids = torch.randint(3, VOCABULARY, (24,), generator=generator)
            labels = ids.clone()
            labels[: length // 3] = -100
            labels[length:] = -100
            ids[length:] = 0
            if i in (4, 5):  # a micro-batch in which nothing counts
                labels[:] = -100
            mask = (torch.arange(24) < length).long()
            self.rows.append({"input_ids": ids, "labels": labels, "attention_mask": mask})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def arguments(path: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        **options,
    }


def run(trainer_class: type[Trainer], model: Any, path: Path, **options: Any) -> dict[str, Any]:
    args_class = BarqTrainingArguments if trainer_class is BarqTrainer else TrainingArguments
    extra = {k: options.pop(k) for k in ("compute_metrics", "model_init") if k in options}
    trainer = trainer_class(
        model=None if "model_init" in extra else model,
        args=args_class(**arguments(path, **options)),
        train_dataset=Rows(40, seed=1),
        eval_dataset=Rows(7, seed=2),
        **extra,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    return {
        "trainer": trainer,
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [float(entry["grad_norm"]) for entry in logs],
        "eval": {k: v for k, v in metrics.items() if k == "eval_loss" or "accuracy" in k},
    }


def assert_equal_runs(
    model: Any, path: Path, fused: bool = True, tolerance: float = 1.0, **options: Any
) -> Any:
    """Runs stock and ours from the same weights; ``model()`` must build it anew."""
    stock = run(Trainer, model(), path / "stock", **options)
    ours = run(BarqTrainer, model(), path / "ours", **options)
    assert len(ours["loss"]) == options.get("max_steps", STEPS)
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5 * tolerance)
    assert ours["grad_norm"] == pytest.approx(stock["grad_norm"], rel=1e-4 * tolerance)
    assert ours["eval"] == pytest.approx(stock["eval"], rel=1e-5 * tolerance)
    trainer = ours["trainer"]
    if fused:
        assert "linear_cross_entropy" in trainer.barq_report.installed, str(trainer.barq_report)
        assert not trainer.barq_report.fallbacks, str(trainer.barq_report)
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    trainer = assert_equal_runs(lambda: tiny_model(family), tmp_path)
    assert ("rms_norm" in trainer.barq_report.installed) == (family != "gpt2")


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"label_smoothing_factor": 0.1},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3},
        {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 5, "max_grad_norm": 0.1},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_settings(options: dict[str, Any], tmp_path: Path) -> None:
    assert_equal_runs(lambda: tiny_model("llama"), tmp_path, **options)


def test_gemma2_label_smoothing(tmp_path: Path) -> None:
    assert_equal_runs(lambda: tiny_model("gemma2"), tmp_path, label_smoothing_factor=0.2)


def test_bf16_autocast(tmp_path: Path) -> None:
    # One bf16 unit in the last place is 2^-8 = 4e-3.
    assert_equal_runs(lambda: tiny_model("llama"), tmp_path, bf16=True, tolerance=400)


def test_bf16_weights(tmp_path: Path) -> None:
    model = lambda: tiny_model("llama", torch.bfloat16)  # noqa: E731
    assert_equal_runs(model, tmp_path, tolerance=1000, max_steps=2)


def test_small_memory_budget_changes_nothing(tmp_path: Path) -> None:
    config = {"max_extra_bytes": 5 * VOCABULARY * 4}  # five rows of logits at a time
    ours = run(BarqTrainer, tiny_model("llama"), tmp_path / "ours", barq_config=config)
    stock = run(Trainer, tiny_model("llama"), tmp_path / "stock")
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(stock["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("head", [None, ["lm_head"]], ids=["lora", "lora+head"])
def test_peft(head: list[str] | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> Any:
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=head
        )
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(tiny_model("llama"), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:  # zero at initialisation, which would hide the adapters
                torch.nn.init.normal_(parameter, std=0.1)
        return wrapped

    trainer = assert_equal_runs(model, tmp_path)
    saved = trainer.model.get_base_model().lm_head
    assert hasattr(saved, "modules_to_save") == (head is not None)


def test_lora_on_the_head_keeps_the_stock_loss(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(
            tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
        )

    trainer = assert_equal_runs(model, tmp_path, fused=False)
    assert "linear_cross_entropy" not in trainer.barq_report.installed
    assert "lora" in str(trainer.barq_report).lower()


def test_compute_metrics_gets_its_logits(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        logits, labels = prediction
        assert logits.shape[-1] == VOCABULARY
        hit = (logits.argmax(-1)[:, :-1] == labels[:, 1:])[labels[:, 1:] != -100]
        return {"accuracy": float(hit.mean())}

    trainer = assert_equal_runs(
        lambda: tiny_model("llama"), tmp_path, fused=False, compute_metrics=accuracy
    )
    ((op, reason),) = trainer.barq_report.fallbacks
    assert op == "linear_cross_entropy" and "compute_metrics" in reason


def test_model_init_and_second_train(tmp_path: Path) -> None:
    runs = []
    for trainer_class in (Trainer, BarqTrainer):
        init = lambda: tiny_model("qwen3")  # noqa: E731
        result = run(trainer_class, None, tmp_path / trainer_class.__name__, model_init=init)
        trainer = result["trainer"]
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_second_train_continues_the_same_model(tmp_path: Path) -> None:
    losses = []
    for trainer_class in (Trainer, BarqTrainer):
        result = run(trainer_class, tiny_model("llama"), tmp_path / trainer_class.__name__)
        result["trainer"].train()
        history = result["trainer"].state.log_history
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_plain_training_arguments_and_positional_ones(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path))
    trainer = BarqTrainer(tiny_model("llama"), args, None, Rows(8, seed=1))
    trainer.train()
    assert not trainer.barq_report.fallbacks
    assert "rms_norm" in trainer.barq_report.installed


def test_the_flag_turns_everything_off(tmp_path: Path) -> None:
    ours = run(BarqTrainer, tiny_model("llama"), tmp_path, use_barq_kernels=False)
    stock = run(Trainer, tiny_model("llama"), tmp_path)
    assert ours["loss"] == stock["loss"]
    assert not ours["trainer"].barq_report.installed
