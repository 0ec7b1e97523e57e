"""BarqTrainer against stock Trainer on a GPU, where every op is our kernels, in every dtype."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LEAF_OPS, counts, tiny_model
from test_attention_in_training import losses
from test_lora_head import lora_on_the_head
from test_packed_training import documents
from test_parity import arguments, assert_equal_runs
from transformers import Trainer, TrainingArguments

from barqtrain_hf import BarqTrainer, BarqTrainingArguments, patch_model
from barqtrain_hf.data import BarqDataCollator, PackedDataset
from barqtrain_hf.ops import CountedTarget
from barqtrain_hf.runtime import Kernel

pytestmark = pytest.mark.gpu


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched, by source and name."""
    # Norms of inputs as small as these would be left to PyTorch.
    monkeypatch.setattr("barqtrain_hf.ops._backend.SMALL", 0)
    names: list[str] = []
    launch = Kernel._launch

    def counted(self: Kernel, *args: Any) -> None:
        names.append(f"{self.source.removesuffix('.cu')}.{self.name.split('<')[0]}")
        launch(self, *args)

    monkeypatch.setattr(Kernel, "_launch", counted)
    return names


KERNELS = {
    "rms_norm": {"rms_norm.norm_forward", "rms_norm.norm_backward", "rms_norm.column_sum"},
    "layer_norm": {"layer_norm.norm_forward", "layer_norm.norm_backward", "layer_norm.column_sum"},
    "glu": {"glu.glu_forward", "glu.glu_backward"},
    "rope": {"rope.rope"},
}
LOSS = {
    "cross_entropy.cross_entropy_rows",
    "cross_entropy.cross_entropy_gradient",
    "targets.count_targets",
}


# fp32 to the last digits; bf16 and fp16 to a few units in the last place. Two steps there: AdamW divides
# a gradient by its own size, so a component that is all rounding moves a weight as far as any other.
REGIMES: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "fp32": (torch.float32, {}, 2.0),
    "bf16 autocast, fp32 weights": (torch.float32, {"bf16": True, "max_steps": 2}, 400),
    "fp16 autocast, fp32 weights": (torch.float32, {"fp16": True, "max_steps": 2}, 100),
    "bf16 autocast, bf16 weights": (torch.bfloat16, {"bf16": True, "max_steps": 2}, 1000),
    "bf16 weights": (torch.bfloat16, {"max_steps": 2}, 1000),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, regime: str, launches: list[str], tmp_path: Path) -> None:
    dtype, options, tolerance = REGIMES[regime]
    trainer = assert_equal_runs(
        lambda: tiny_model(family, dtype),
        tmp_path,
        tolerance=tolerance,
        **{"use_cpu": False, **options},
    )
    expected = {**LEAF_OPS[family], "attention": 2}
    if family == "gemma2" and trainer.model._supports_sdpa:
        del expected["attention"]  # in some releases sdpa leaves the softcap out, unsaid
    assert counts(trainer.barq_report) == expected, str(trainer.barq_report)
    for op in LEAF_OPS[family]:
        assert set(launches) >= KERNELS[op], op
    assert set(launches) >= LOSS


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 3, "label_smoothing_factor": 0.1},
        {"torch_compile": True},
        {"optim": "adamw_torch_fused"},
    ],
    ids=str,
)
def test_settings(options: dict[str, Any], launches: list[str], tmp_path: Path) -> None:
    # Inductor fuses and reorders fp32 sums of its own.
    tolerance = 20.0 if "torch_compile" in options else 2.0
    assert_equal_runs(
        lambda: tiny_model("llama"), tmp_path, use_cpu=False, tolerance=tolerance, **options
    )
    assert {*KERNELS["rms_norm"], *KERNELS["glu"], *KERNELS["rope"], *LOSS} <= set(launches)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_rows(family: str, launches: list[str], tmp_path: Path) -> None:
    """Attention's kernels keep documents apart as stock attention's mask does."""
    options = arguments(tmp_path, use_cpu=False, bf16=True)
    stock = Trainer(
        tiny_model(family),
        TrainingArguments(**options),
        train_dataset=PackedDataset(documents(200), 64),
        data_collator=BarqDataCollator(),
    )
    ours = BarqTrainer(
        tiny_model(family),
        BarqTrainingArguments(**options),
        train_dataset=PackedDataset(documents(200), 64),
    )
    expected = losses(stock)
    launches.clear()
    assert losses(ours) == pytest.approx(expected, rel=2e-2)
    assert not ours.barq_report.fallbacks, str(ours.barq_report)
    kernels = {name.split(".")[1].removesuffix("_hopper") for name in launches}
    assert kernels >= {"flash_attention", "attention_statistics", "flash_attention_backward"}


def test_lora(launches: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]
        )
        return peft.get_peft_model(tiny_model("llama", torch.bfloat16), config)

    patch_model(model().to("cuda"))  # what the probe launches is not launched again
    launches.clear()
    assert_equal_runs(model, tmp_path, use_cpu=False, bf16=True, tolerance=1000, max_steps=2)
    # Frozen norm weights: their gradient is not computed.
    assert "rms_norm.column_sum" not in launches and "rms_norm.norm_backward" in launches


def test_lora_on_the_head(launches: list[str], tmp_path: Path) -> None:
    def model() -> Any:
        return lora_on_the_head("llama").to(torch.bfloat16)

    assert_equal_runs(model, tmp_path, use_cpu=False, bf16=True, tolerance=1000, max_steps=2)
    assert "cross_entropy.cross_entropy_rows" in launches


def test_the_loop_waits_for_no_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The number of targets is asked for before the layers are queued: the loss waits for nothing."""
    waited: list[bool] = []
    numbers = CountedTarget.numbers

    def watched(self: CountedTarget) -> tuple[int, int, int]:
        if self._event is not None and len(waited) < 3:
            torch.cuda._sleep(200_000_000)  # stands for layers that are queued and not done
            start = time.perf_counter()
            found = numbers(self)
            waited.append(time.perf_counter() - start > 0.02)
            return found
        return numbers(self)

    monkeypatch.setattr(CountedTarget, "numbers", watched)
    assert_equal_runs(lambda: tiny_model("llama"), tmp_path, use_cpu=False, tolerance=2.0)
    assert waited == [False] * 3
