"""PEFT's LoRA layers: every family computes what it did, and all that PEFT does to adapters goes on."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import LORA_ONLY, adapted, fill, lora_layers
from models import tiny_model
from side_by_side import (
    Run,
    assert_as_accurate,
    assert_equal,
    assert_no_trace,
    batch,
    bound,
    run,
)

from barqtrain_hf import BarqConfig, patch_model, unpatch_model
from barqtrain_hf.patching import FusedLoss

peft = pytest.importorskip("peft")

# In how many modules the op must be: seven projections in each of two layers, or what a family has.
INSTALLED = {"llama": 14, "phi3": 8, "gemma2": 14, "gpt_neox": 8, "qwen3": 14, "mixtral": 8}
ROUNDING = 2e-6  # in fp32, of a whole model


def assert_same(ours: Run, stock: Run, path: str) -> None:
    """The reference is PEFT's own formula: the same bits."""
    if path == "fused":
        assert_equal(ours, stock, ROUNDING)
    else:
        assert torch.equal(ours.logits, stock.logits) and torch.equal(ours.loss, stock.loss)
        assert all(map(torch.equal, ours.gradients, stock.gradients))


@pytest.mark.parametrize("family", INSTALLED)
def test_families(family: str, path: str) -> None:
    model = adapted(family)
    stock = run(model, batch())
    report = patch_model(model, LORA_ONLY)
    names = list(lora_layers(model))
    assert report.installed == {"lora": names} and len(names) == INSTALLED[family]
    for _ in range(2):
        assert_same(run(model, batch()), stock, path)
    assert not report.fallbacks
    # Router and experts hold bare parameters, which PEFT adapts with another layer.
    assert bool(report.skipped) == (family == "mixtral")
    assert all("ParamWrapper around" in reason for _, reason in report.skipped)
    assert_no_trace(model)
    assert torch.equal(run(model, batch()).logits, stock.logits)


@pytest.mark.parametrize("family", INSTALLED)
def test_every_layer_is_computed_once(family: str, fused: list[int]) -> None:
    model = adapted(family)
    patch_model(model, LORA_ONLY)
    for _ in range(2):
        fused.clear()
        run(model, batch())
        assert sum(fused) == INSTALLED[family]


# Base, adapters, autocast: PEFT's adapters are in fp32 unless it is told otherwise.
REGIMES = {
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32, False),
    "bf16, fp32 adapters, autocast": (torch.bfloat16, torch.float32, True),
    "fp32, autocast": (torch.float32, torch.float32, True),
    "fp16": (torch.float16, torch.float16, False),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_models_in_16_bits(family: str, regime: str, path: str) -> None:
    dtype, adapter_dtype, autocast = REGIMES[regime]
    model = adapted(family, dtype, adapter_dtype)
    truth = run(copy.deepcopy(model).float(), batch())
    stock = run(model, batch(), autocast)
    report = patch_model(model, LORA_ONLY)
    for _ in range(2):
        ours = run(model, batch(), autocast)
        if path == "reference":
            assert_same(ours, stock, path)
        assert_as_accurate(ours, stock, truth)
        for mine, theirs in zip(ours.gradients, stock.gradients, strict=True):
            assert mine.dtype is theirs.dtype
    assert not report.fallbacks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_layer_in_16_bits(regime: str, training: bool, fused: list[int]) -> None:
    """A frozen adapter, or one that is not asked for gradients, gives the same dtype and numbers too."""
    dtype, adapter_dtype, autocast = REGIMES[regime]
    model = adapted("gpt_neox", dtype, adapter_dtype)  # its layers have a bias
    layer = lora_layers(model)["gpt_neox.layers.0.mlp.dense_4h_to_h"]
    model.train(training).requires_grad_(False)
    layer.lora_A.requires_grad_(training)
    patch_model(model, LORA_ONLY)
    fused.clear()
    x = torch.randn(2, 7, 48).to(dtype)
    exact = type(layer).forward(copy.deepcopy(layer).double(), x.double())
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock, ours = type(layer).forward(layer, x), layer(x)
    assert fused == [1]
    assert ours.dtype is stock.dtype and ours.requires_grad == stock.requires_grad == training
    # Stock in fp32 adapters rounds once less: a sum of two roundings against one.
    limit = 1.25 if adapter_dtype is dtype or autocast else 2**0.5
    assert (ours - exact).norm() <= limit * (stock - exact).norm()


def test_with_all_other_ops(fused: list[int]) -> None:
    for family in INSTALLED:
        model = adapted(family)
        stock = run(model, batch())
        report = patch_model(model)
        assert len(report.installed["lora"]) == INSTALLED[family]
        for _ in range(2):
            assert_equal(run(model, batch(), fused=True), stock)
        assert not report.fallbacks, str(report)
        assert_no_trace(model)


def test_other_layers_are_named() -> None:
    model = adapted("gpt2", fan_in_fan_out=True)
    stock = run(model, batch())
    report = patch_model(model, LORA_ONLY)
    ((op, reason),) = report.skipped
    assert op == "lora" and reason.startswith("Linear around Conv1D: only linear layers, plain or ")
    assert not report.installed and len(report.skipped["lora", reason]) == 8
    assert_same(run(model, batch()), stock, "reference")
    report = patch_model(adapted("llama", target_modules=["embed_tokens", "q_proj"]), LORA_ONLY)
    assert list(report.skipped.values()) == [["model.embed_tokens"]]
    assert "lora: not in model.embed_tokens: Embedding around Embedding" in str(report)


@pytest.mark.parametrize("head", [True, False])
def test_the_head_is_left_to_the_loss(head: bool, fused: list[int]) -> None:
    model = adapted("llama", target_modules=["q_proj", "lm_head"])
    stock = run(model, batch())
    report = patch_model(model, {**LORA_ONLY, "linear_cross_entropy": head})
    assert report.installed["lora"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert ("linear_cross_entropy" in report.installed) == head and not report.skipped
    assert_equal(run(model, batch(), fused=head), stock, ROUNDING)
    assert not report.fallbacks


def test_config_and_report() -> None:
    model = adapted("llama")
    report = patch_model(model, BarqConfig(lora=False))
    assert "lora" not in report.installed and not any(op == "lora" for op, _ in report.skipped)
    assert not any("forward" in layer.__dict__ for layer in lora_layers(model).values())
    assert patch_model(model) is report  # what is missing comes in
    names = "model.layers.0.self_attn.q_proj, …, model.layers.1.mlp.down_proj"
    assert f"lora: installed in 14 modules ({names})" in str(report)
    with torch.device("meta"):
        report = patch_model(adapted("llama"), LORA_ONLY)
    assert not report.installed and "not on a device yet" in str(report)


def test_a_layer_somebody_else_patched_is_left_alone() -> None:
    model = adapted("llama", target_modules=["q_proj", "v_proj"])
    layer = lora_layers(model)["model.layers.1.self_attn.v_proj"]
    theirs = layer.forward = layer.forward
    report = patch_model(model, LORA_ONLY)
    assert len(report.installed["lora"]) == 3 and "its forward is already patched" in str(report)
    unpatch_model(model)
    assert layer.forward is theirs


def test_scaling_is_read_when_it_is_used(path: str) -> None:
    stock, ours = adapted("llama", use_rslora=True), adapted("llama", use_rslora=True)
    report = patch_model(ours, LORA_ONLY)
    losses = []
    for method, argument in (
        ("scale_layer", 1.0),
        ("scale_layer", 1.5),
        ("unscale_layer", 1.25),
        ("unscale_layer", None),
    ):
        for model in (stock, ours):
            for layer in lora_layers(model).values():
                getattr(layer, method)(argument)
        wanted = run(stock, batch())
        assert_same(run(ours, batch()), wanted, path)
        losses.append(wanted.loss.item())
    for model in (stock, ours):
        lora_layers(model)["model.layers.0.self_attn.k_proj"].set_scale("default", 5.0)
    wanted = run(stock, batch())
    assert_same(run(ours, batch()), wanted, path)
    losses.append(wanted.loss.item())
    assert losses[0] == losses[3] and len(set(losses)) == 4
    assert not report.fallbacks


def test_adapters_come_and_go(path: str) -> None:
    models = stock, ours = adapted("llama"), adapted("llama")
    report = patch_model(ours, LORA_ONLY)
    losses = []

    def same() -> None:
        wanted = run(stock, batch())
        assert_same(run(ours, batch()), wanted, path)
        losses.append(round(wanted.loss.item(), 5))

    same()
    second = peft.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear")
    for model in models:
        torch.manual_seed(8)
        model.add_adapter("second", second)
        fill(model, "second")
    same()
    for adapter in ("second", "default", "second"):
        for model in models:
            model.set_adapter(adapter)
        same()
    for model in models:
        model.delete_adapter("second")
        model.set_adapter("default")
    same()
    one, two = losses[0], losses[2]
    assert losses == [one, one, two, one, two, one] and one != two
    assert not report.fallbacks


def test_merging_and_unloading(path: str) -> None:
    ours, stock = adapted("llama"), adapted("llama")
    patch_model(ours, LORA_ONLY)
    expected = run(ours, batch())
    merged, wanted = ours.merge_and_unload(), stock.merge_and_unload()
    assert merged.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name])
    torch.testing.assert_close(merged(**batch()).logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert_no_trace(merged)


def test_saved_adapters_are_peft_s(tmp_path: Path) -> None:
    stock, ours = adapted("llama"), adapted("llama")
    patch_model(ours)
    for get in (lambda model: model.state_dict(), peft.get_peft_model_state_dict):
        mine, theirs = get(ours), get(stock)
        assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(loaded(**batch()).logits, stock(**batch()).logits)
    # And into a model that is patched already.
    patched = adapted("llama")
    patch_model(patched, LORA_ONLY)
    patched.load_adapter(tmp_path, "saved")
    patched.set_adapter("saved")
    assert torch.equal(patched(**batch()).logits, stock(**batch()).logits)


def test_unpatching_restores_the_class_s_forward() -> None:
    model = adapted("llama")
    layers = lora_layers(model).values()
    patch_model(model)
    assert all("forward" in layer.__dict__ for layer in layers)
    unpatch_model(model)
    for layer in layers:
        assert "forward" not in layer.__dict__ and layer.forward.__func__ is type(layer).forward
    assert bound(model) == []


def test_a_copy_stands_alone(path: str) -> None:
    model = adapted("llama")
    patch_model(model, LORA_ONLY)
    expected = [run(model, batch()) for _ in range(2)][1]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for _ in range(2):
        assert_same(run(twin, batch()), expected, path)
    unpatch_model(twin)
    assert bound(twin) == [] and len(bound(model)) == 14


def test_a_pickled_model_computes_the_same() -> None:
    model, file = adapted("llama"), io.BytesIO()
    patch_model(model)
    expected = run(model, batch())
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_equal(run(loaded, batch()), expected)
    assert_no_trace(loaded)


def test_a_generating_model(fused: list[int]) -> None:
    model, ids = adapted("llama").eval(), torch.arange(3, 12)[None]
    options = {"input_ids": ids, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**options)
    patch_model(model, LORA_ONLY)
    fused.clear()
    assert torch.equal(model.generate(**options), expected)
    assert sum(fused) == 10 * 14


def test_the_fused_loss_and_label_smoothing(fused: list[int]) -> None:
    model = adapted("gemma2")
    patch_model(model, {**LORA_ONLY, "linear_cross_entropy": True})
    stock = adapted("gemma2")(**batch(), num_items_in_batch=11).loss
    ours: Any = model(**batch(), fused_loss=FusedLoss(num_items=11)).loss
    torch.testing.assert_close(ours, stock)
