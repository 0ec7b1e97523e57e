"""BarqTrainer trains adapters beside 4-bit weights as stock Trainer does, from a checkpoint to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lora_models import force_fused, wrapped
from models import counts, tiny_model
from quantized_models import never_repacked, quantized_layers
from test_parity import Rows, arguments, assert_equal_runs

from barqtrain_hf import BarqTrainer, BarqTrainingArguments

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

STEPS = 6
ALL = {"rms_norm": 5, "glu": 2, "rope": 2, "lora": 14}


def loaded(path: Path, compute: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """As users load one: `BitsAndBytesConfig`, and norms and head in fp32."""
    if not path.exists():
        tiny_model("llama").save_pretrained(path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map={"": device}, dtype=compute
    )
    never_repacked(model)
    return wrapped(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["accumulation", "checkpointing", "reentrant checkpointing"],
)
def test_losses_are_those_of_trainer(
    options: dict[str, Any], fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = force_fused(monkeypatch) if fused else []
    base = tmp_path / "base"
    trainer = assert_equal_runs(lambda: loaded(base), tmp_path, max_steps=STEPS, **options)
    assert counts(trainer.barq_report) == ALL
    assert sum(calls) >= 14 * STEPS * options.get("gradient_accumulation_steps", 1) * fused
    assert not any("forward" in m.__dict__ for m in quantized_layers(trainer.model).values())


def test_bf16_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and residual stream in fp32, products in bf16, fp32 adapters."""
    calls = force_fused(monkeypatch)
    model = lambda: loaded(tmp_path / "base", torch.bfloat16)  # noqa: E731
    assert_equal_runs(model, tmp_path, bf16=True, tolerance=1000, max_steps=2)
    assert sum(calls) >= 2 * 14


def test_checkpoints_are_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They resume exactly, and PEFT loads them beside the same weights."""
    force_fused(monkeypatch)

    def train(name: str, checkpoint: str | None = None) -> tuple[list[float], Any]:
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        args = BarqTrainingArguments(**arguments(tmp_path / name, **options))
        model = loaded(tmp_path / "base")
        trainer = BarqTrainer(model, args, train_dataset=Rows(40, seed=1))
        trainer.train(resume_from_checkpoint=checkpoint)
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer.model

    losses, whole = train("whole")
    again, resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert again == losses and len(losses) == 4
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    last = tmp_path / "whole" / "checkpoint-4"
    assert sorted(path.name for path in last.glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fresh = loaded(tmp_path / "base")
    fresh.load_adapter(last, "saved")
    fresh.set_adapter("saved")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(fresh(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.gpu
def test_a_gpu_trains_to_the_losses_of_trainer(tmp_path: Path) -> None:
    model = lambda: loaded(tmp_path / "base", torch.bfloat16, "cuda:0")  # noqa: E731
    # Of AdamW's steps the first two: it divides a gradient by its own size, rounding too.
    options = {"use_cpu": False, "bf16": True, "max_steps": 2, "gradient_checkpointing": True}
    trainer = assert_equal_runs(model, tmp_path, tolerance=2000, **options)
    assert counts(trainer.barq_report)["lora"] == 14
