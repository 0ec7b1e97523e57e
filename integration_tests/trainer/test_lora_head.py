"""LoRA on the LM head itself: through the fused loss wherever it is plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from test_parity import Rows, assert_equal_runs

from barqtrain_hf import patch_model
from barqtrain_hf.patching import FusedLoss, head_unsupported


def lora_on_the_head(family: str, **options: Any) -> Any:
    """A model whose head has a LoRA adapter that is not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], **options)
    model = peft.get_peft_model(tiny_model(family), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_lora_on_the_head(family: str, tmp_path: Path) -> None:
    trainer = assert_equal_runs(lambda: lora_on_the_head(family, use_rslora=True), tmp_path)
    start = lora_on_the_head(family, use_rslora=True).get_output_embeddings().state_dict()
    trained = trainer.model.get_base_model().get_output_embeddings().state_dict()
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert moved == {"lora_A.default.weight", "lora_B.default.weight"}


def test_dropout_of_the_adapter(tmp_path: Path) -> None:
    """The same random numbers give the same masks as in PEFT's own forward."""
    fallbacks = [("lora", "its adapter has dropout")]  # of q_proj
    model = lambda: lora_on_the_head("llama", lora_dropout=0.3)  # noqa: E731
    assert_equal_runs(model, tmp_path, fallbacks=fallbacks)


def test_bf16_base_with_fp32_adapters(tmp_path: Path) -> None:
    """PEFT's default: no autocast reaches the adapters, they compute in their own dtype."""

    def model() -> Any:
        made = lora_on_the_head("llama").to(torch.bfloat16)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        return made

    assert_equal_runs(model, tmp_path, tolerance=1000, max_steps=2)


def test_adapter_states_of_the_head() -> None:
    """Two adapters at once, disabled, merged: the fused loss follows PEFT's own forward."""
    model = lora_on_the_head("llama")
    model.add_adapter("second", model.peft_config["default"])
    torch.nn.init.normal_(model.get_output_embeddings().lora_B["second"].weight, std=0.1)
    report = patch_model(model)
    rows = Rows(2, seed=1).rows
    batch = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "labels")}
    base = model.get_base_model()

    def both() -> list[float]:
        assert head_unsupported(base, batch) is None
        stock = model(**batch, num_items_in_batch=7).loss
        ours = model(**batch, fused_loss=FusedLoss(num_items=7)).loss
        assert ours.item() == pytest.approx(stock.item(), rel=1e-5)
        return round(ours.item(), 4)

    losses = [both()]
    model.base_model.set_adapter(["default", "second"])
    losses.append(both())
    with model.disable_adapter():
        losses.append(both())
    model.merge_adapter()
    losses.append(both())
    assert losses[1] == losses[3] and len(set(losses)) == 3, losses
    with model.disable_adapter():
        assert "merged" in str(head_unsupported(base, batch))
    assert report.installed["linear_cross_entropy"]


@pytest.mark.parametrize("option", ["use_dora", "lora_bias", "hook"])
def test_what_the_head_leaves_to_peft(option: str, tmp_path: Path) -> None:
    def model() -> Any:
        made = lora_on_the_head("llama", **({} if option == "hook" else {option: True}))
        if option == "hook":
            base_layer = made.get_output_embeddings().base_layer
            base_layer.register_forward_hook(lambda module, args, output: None)
        return made

    trainer = assert_equal_runs(model, tmp_path, fused=False)
    assert "linear_cross_entropy" in str(trainer.barq_report.fallbacks) + str(
        trainer.barq_report.skipped
    )
