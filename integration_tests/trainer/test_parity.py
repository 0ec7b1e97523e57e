"""BarqTrainer trains to stock Trainer's losses and gradient norms, in every supported combination.

Each case runs both for a few optimizer steps on the same batches: losses agree to 1e-5, gradient norms to
1e-4, evaluation losses to 1e-5 in fp32, to rounding in bf16. The data has natural lengths, prompts without
loss, and one micro-batch with no target at all.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from barqtrain_hf import BarqTrainer, BarqTrainingArguments, unpatch_model
from barqtrain_hf.ops import linear_cross_entropy
from barqtrain_hf.patching import attention_interface, head

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


class _FusedCalls:
    """How often the loss was computed in the head, by whichever trainer."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.count += 1
        return linear_cross_entropy(*args, **kwargs)


def run(trainer_class: type[Trainer], model: Any, path: Path, **options: Any) -> dict[str, Any]:
    args_class = BarqTrainingArguments if trainer_class is BarqTrainer else TrainingArguments
    functions = ("compute_metrics", "compute_loss_func", "model_init")
    extra = {k: options.pop(k) for k in functions if k in options}
    trainer = trainer_class(
        model=None if "model_init" in extra else model,
        args=args_class(**arguments(path, **options)),
        train_dataset=Rows(40, seed=1),
        eval_dataset=Rows(7, seed=2),
        **extra,
    )
    calls = _FusedCalls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "linear_cross_entropy", calls)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        trained = calls.count
        metrics = trainer.evaluate()
    return {
        "trainer": trainer,
        "fused": (trained, calls.count - trained),
        "flos": trainer.state.total_flos,
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [float(entry["grad_norm"]) for entry in logs],
        "eval": {k: v for k, v in metrics.items() if k == "eval_loss" or "accuracy" in k},
    }


def assert_equal_runs(
    model: Any,
    path: Path,
    fused: bool = True,
    tolerance: float = 1.0,
    fallbacks: Collection[tuple[str, str]] = (),
    **options: Any,
) -> Any:
    """Runs stock and ours from the same weights; ``model()`` must build it anew.

    ``fallbacks`` are those that the report must name, beside the ones that any run may have.
    """
    stock = run(Trainer, model(), path / "stock", **options)
    ours = run(BarqTrainer, model(), path / "ours", **options)
    assert len(ours["loss"]) == options.get("max_steps", STEPS)
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5 * tolerance)
    # In fp16 the first steps of both may overflow, until the loss is scaled down.
    expected = pytest.approx(stock["grad_norm"], rel=1e-4 * tolerance, nan_ok=True)
    assert ours["grad_norm"] == expected
    assert ours["eval"] == pytest.approx(stock["eval"], rel=1e-5 * tolerance)
    assert ours["flos"] == stock["flos"] > 0
    assert stock["fused"] == (0, 0)
    trainer = ours["trainer"]
    if fused:
        steps = options.get("max_steps", STEPS) * options.get("gradient_accumulation_steps", 1)
        assert ours["fused"] in ((steps, 3), (1, 3) if options.get("torch_compile") else None)
        assert "linear_cross_entropy" in trainer.barq_report.installed, str(trainer.barq_report)
        # Padded rows are left to stock attention, where ours runs: on a GPU.
        allowed = {("attention", attention_interface._PADDED)}
        found = set(trainer.barq_report.fallbacks)
        assert set(fallbacks) <= found <= {*fallbacks, *allowed}, str(trainer.barq_report)
    return trainer


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
    # One bf16 unit in the last place is 2^-8 = 4e-3. Two steps: AdamW divides a gradient by its own
    # size, so a component that is all rounding moves a weight as far as any other.
    assert_equal_runs(lambda: tiny_model("llama"), tmp_path, bf16=True, tolerance=400, max_steps=2)


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
        assert (result["fused"][0] > 0) == (trainer_class is BarqTrainer)
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


def test_compute_loss_func_gets_its_logits(tmp_path: Path) -> None:
    def loss_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        total = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        return total / num_items_in_batch

    trainer = assert_equal_runs(
        lambda: tiny_model("llama"), tmp_path, fused=False, compute_loss_func=loss_function
    )
    assert "compute_loss_func" in str(trainer.barq_report)


def test_shift_labels_are_taken_as_they_are(tmp_path: Path) -> None:
    class Shifted(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            # Not the shift of labels: a model that shifts labels itself would learn something else.
            return {**row, "shift_labels": row["labels"].roll(-2)}

    losses = []
    for trainer_class in (Trainer, BarqTrainer):
        trainer = trainer_class(
            tiny_model("llama"),
            TrainingArguments(**arguments(tmp_path, remove_unused_columns=False)),
            train_dataset=Shifted(40, seed=1),
        )
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert not trainer.barq_report.fallbacks


def test_a_subclass_that_reads_the_outputs_keeps_them(tmp_path: Path) -> None:
    class Reads(BarqTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **kw: Any
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kw)
            assert outputs.logits.shape[-1] == VOCABULARY
            return (loss, outputs) if return_outputs else loss

    trainer = Reads(
        tiny_model("llama"),
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=Rows(8, seed=1),
        eval_dataset=Rows(4, seed=2),
    )
    trainer.train()
    trainer.evaluate()


def test_unpatching_under_a_trainer_is_seen(tmp_path: Path) -> None:
    options = arguments(tmp_path, gradient_accumulation_steps=3, barq_config={"rms_norm": False})
    model = tiny_model("llama")
    trainer = BarqTrainer(model, BarqTrainingArguments(**options), train_dataset=Rows(40, seed=1))
    stock = run(Trainer, tiny_model("llama"), tmp_path, gradient_accumulation_steps=3)

    class Unpatch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            unpatch_model(model)

    trainer.add_callback(Unpatch())
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses == pytest.approx(stock["loss"], rel=1e-6)
    assert "has been unpatched" in str(trainer.barq_report)


def test_a_resized_head_is_fused_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    trainer = BarqTrainer(
        model, BarqTrainingArguments(**arguments(tmp_path)), train_dataset=Rows(40, seed=1)
    )
    model.resize_token_embeddings(VOCABULARY + 7)
    trainer.train()
    assert not trainer.barq_report.fallbacks, str(trainer.barq_report)
    assert trainer.barq_report.installed["linear_cross_entropy"] == ["the LM head"]


def test_a_model_is_freed_with_its_trainer(tmp_path: Path) -> None:
    alive = []

    def init() -> Any:
        model = tiny_model("llama")
        alive.append(weakref.ref(model))
        return model

    trainer = BarqTrainer(
        model_init=init,
        args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=Rows(8, seed=1),
    )
    for _ in range(3):
        trainer.train()
    gc.collect()
    assert len(alive) == 4 and sum(ref() is not None for ref in alive) == 1


def test_arguments_are_bound_as_by_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path))
    rows = Rows(4, seed=1)
    with pytest.raises(TypeError, match="train_dataset"):
        BarqTrainer(tiny_model("llama"), args, None, rows, train_dataset=rows)
    with pytest.raises(TypeError, match="no_such_argument"):
        BarqTrainer(tiny_model("llama"), args, no_such_argument=1)
