"""What is more than a plain adapter beside quantised weights keeps PEFT's forward, and PEFT's ways go on."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import LORA_ONLY, adapted, assert_close, fill
from models import tiny_model
from quantized_models import (
    never_repacked,
    quantized,
    quantized_layer,
    quantized_layers,
)
from side_by_side import assert_no_trace, batch, run
from test_lora_guards import ALL_LAYERS, HOOKS, TRAINED, OtherLinear, _hook, outcome
from test_lora_guards import assert_equal as same_bits
from test_lora_in_models import assert_same
from test_qlora import BF16, FP32, one_layer, weights
from torch import nn

from barqtrain_hf import patch_model
from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.patching import lora_quantized

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

NAME = "model.layers.1.self_attn.q_proj"  # whose input has a gradient
ALONE = "model.layers.1.mlp.down_proj"  # shares its input with no other


def test_pefts_dropout_off_a_gpu(fused: list[int]) -> None:
    stock, ours = (quantized("llama", lora_dropout=0.4).train() for _ in range(2))
    report = patch_model(ours, LORA_ONLY)
    fused.clear()
    same_bits(outcome(ours), outcome(stock))
    assert report.fallbacks == {("lora", "its adapter has dropout"): 14} and not fused


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ALL_LAYERS)
def test_all_layers_are_left_to_peft(case: str, bits: int, fused: list[int]) -> None:
    options, change, reason = ALL_LAYERS[case]
    if bits == 8 and case in ("merged", "DoRA"):
        pytest.skip("PEFT dequantises in 8 bits as in 4; once is enough")
    models = stock, ours = [quantized("llama", bits=bits, **options).eval() for _ in range(2)]
    report = patch_model(ours, LORA_ONLY)
    for model in models:
        change(model)
    fused.clear()
    for _ in range(2):
        same_bits(outcome(ours), outcome(stock))
    assert report.fallbacks == {("lora", reason): 2 * 14} and not fused


def _global_hook(layer: Any) -> Any:
    return nn.modules.module.register_module_forward_hook(lambda module, given, y: None)


ONE_LAYER = {
    "hook of the frozen layer": (_hook("base_layer", "forward"), HOOKS, 1),
    "backward hook of it": (_hook("base_layer", "full_backward"), HOOKS, 1),
    "hook of lora_A": (_hook("lora_A", "forward"), HOOKS, 1),
    "hook on all modules": (_global_hook, "there are hooks on all modules", 14),
}


@pytest.mark.parametrize("case", ONE_LAYER)
def test_one_layer_is_left_to_peft(case: str, fused: list[int]) -> None:
    change, reason, number = ONE_LAYER[case]
    models = stock, ours = [quantized("llama") for _ in range(2)]
    report = patch_model(ours, LORA_ONLY)
    handles = [change(quantized_layers(model)[NAME]) for model in models]
    try:
        wanted = outcome(stock)
        fused.clear()
        assert_close(outcome(ours), wanted)
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()
    assert report.fallbacks == {("lora", reason): number} and sum(fused) == 14 - number


def test_a_bias_that_is_trained(fused: list[int]) -> None:
    layer, x = one_layer("fp32", 4)[0], torch.randn(5, 64)
    report = patch_model(layer, LORA_ONLY)
    layer.base_layer.bias.requires_grad_()
    fused.clear()
    found, wanted = (forward(x) for forward in (layer, partial(type(layer).forward, layer)))
    assert torch.equal(found, wanted) and not fused
    gradient, expected = (
        torch.autograd.grad(y.sum(), layer.base_layer.bias) for y in (found, wanted)
    )
    assert torch.equal(*gradient, *expected)
    assert report.fallbacks == {("lora", TRAINED): 1}


def test_other_dtypes_under_autocast() -> None:
    """PEFT adds bf16 to fp16, and the sum is in fp32 on a GPU."""
    layer, _, draw = one_layer("fp16", 4)
    report = patch_model(layer, LORA_ONLY)
    x = draw()[0]
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer(x), type(layer).forward(layer, x))
    reason = "called with torch.float16 under autocast in torch.bfloat16"
    assert report.fallbacks == {("lora", reason): 1}


def test_adapters_come_and_go(path: str) -> None:
    models = stock, ours = [quantized("llama").eval() for _ in range(2)]
    report = patch_model(ours, LORA_ONLY)

    def same(fallbacks: int = 0) -> torch.Tensor:
        wanted = run(stock, batch())
        before = sum(report.fallbacks.values())
        assert_same(run(ours, batch()), wanted, "fused" if path == "fused" else "reference")
        assert sum(report.fallbacks.values()) == before + fallbacks
        return wanted.logits

    first = same()
    for model in models:
        torch.manual_seed(8)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
        fill(model, "second")
        model.base_model.set_adapter(["default", "second"])
    same(fallbacks=14)
    for model in models:
        model.set_adapter("second")
    assert not torch.equal(same(), first)
    for model in models:
        model.delete_adapter("second")
        model.set_adapter("default")
        quantized_layers(model)[NAME].scale_layer(2.0)
    assert not torch.equal(same(), first)
    for model in models:
        quantized_layers(model)[NAME].unscale_layer()
    same()
    with stock.disable_adapter(), ours.disable_adapter(), torch.no_grad():
        assert torch.equal(ours(**batch()).logits, stock(**batch()).logits)


def test_merging_and_unmerging(fused: list[int]) -> None:
    """PEFT quantises the merged weight anew, and what it takes out again as well."""
    models = stock, ours = [quantized("llama").eval() for _ in range(2)]
    report = patch_model(ours, LORA_ONLY)
    before = run(ours, batch()).logits
    for model in models:
        model.merge_adapter()
        never_repacked(model)
    with torch.no_grad():
        assert torch.equal(ours(**batch()).logits, stock(**batch()).logits)
    assert report.fallbacks == {("lora", "its adapters are merged"): 14}
    for model in models:
        model.unmerge_adapter()
    wanted = run(stock, batch())
    assert_same(run(ours, batch()), wanted, "fused")
    assert sum(report.fallbacks.values()) == 14 and not torch.equal(wanted.logits, before)
    merged = [model.merge_and_unload() for model in models]
    assert_no_trace(merged[1])
    for mine, theirs in zip(*(m.state_dict().values() for m in merged), strict=True):
        assert torch.equal(mine, theirs)


def test_saved_adapters_are_peft_s(tmp_path: Path) -> None:
    stock, ours = (quantized("llama") for _ in range(2))
    patch_model(ours)
    for get in (lambda model: model.state_dict(), peft.get_peft_model_state_dict):
        mine, theirs = get(ours), get(stock)
        assert list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)
    ours.save_pretrained(tmp_path)
    patched = quantized("llama", init_lora_weights=False)
    patch_model(patched, LORA_ONLY)
    patched.load_adapter(tmp_path, "saved")
    patched.set_adapter("saved")
    assert torch.equal(patched(**batch()).logits, stock(**batch()).logits)


def test_a_copy_stands_alone(path: str) -> None:
    model = quantized("llama")
    patch_model(model, LORA_ONLY)
    expected = run(model, batch())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            for weight in weights(layer):
                weight.zero_()
            layer.base_layer.weight.data.zero_()
    for _ in range(2):
        assert_same(run(twin, batch()), expected, "fused" if path == "fused" else "reference")


class OtherQuantized(nn.Linear):
    """A layer of another quantiser, under a layer of PEFT's for it."""


def test_other_quantisers_are_named() -> None:
    """GPTQ's, AWQ's, HQQ's and torchao's layers are other classes of PEFT's."""
    stock, ours = adapted("llama"), adapted("llama")
    wanted = run(stock, batch())
    linear = peft.tuners.lora.Linear
    theirs = type("GPTQLoraLinear", (linear,), {"__module__": "peft.tuners.lora.gptq"})
    for module in ours.modules():
        if type(module) is linear:
            module.__class__ = theirs
            module.base_layer.__class__ = OtherQuantized
    report = patch_model(ours, LORA_ONLY)
    ((op, reason),) = report.skipped
    assert op == "lora" and len(report.skipped[op, reason]) == 14 and not report.installed
    assert reason == (
        "GPTQLoraLinear around OtherQuantized: only linear layers, plain or quantised by "
        "bitsandbytes, are fused"
    )
    assert_same(run(ours, batch()), wanted, "reference")


def test_a_quantised_layer_of_somebody_s_own_is_named() -> None:
    model = quantized("llama", target_modules=["q_proj"])
    layers = list(quantized_layers(model).values())
    kind = type(layers[0].base_layer)
    layers[0].base_layer.__class__ = type("Mine", (kind,), {"forward": OtherLinear.forward})
    layers[1].base_layer.__class__ = type("LinearNF4", (kind,), {})  # such as bitsandbytes' own
    report = patch_model(model, LORA_ONLY)
    assert report.installed["lora"] == [NAME]
    assert "Linear4bit around Mine: only linear layers" in str(report)
    assert not lora_quantized.is_lora_quantized(layers[0])


def test_a_quantised_head_keeps_stock_s_forward() -> None:
    def model() -> Any:
        base = tiny_model("llama", vocab_size=128)  # a multiple of what shares a scale
        base.lm_head = quantized_layer(base.lm_head, FP32)
        base.is_loaded_in_4bit = True
        config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        torch.manual_seed(5)
        return peft.get_peft_model(base, config)

    stock, ours = model(), model()
    report = patch_model(ours)
    assert "linear_cross_entropy" not in report.installed and len(report.installed["lora"]) == 2
    assert any(op == "linear_cross_entropy" for op, _ in report.skipped), str(report)
    assert_same(run(ours, batch()), run(stock, batch()), "fused")


def test_errors_name_the_layer(fused: list[int]) -> None:
    model = quantized("llama")
    patch_model(model, LORA_ONLY)
    layer = quantized_layers(model)[ALONE]
    message = f"^{ALONE}: lora_layer: x of shape \\(3, 31\\) does not fit lora_a"
    with pytest.raises(ArgumentError, match=message):
        layer(torch.ones(3, 31))
    layer(torch.ones(3, 48))


def test_weights_that_were_exchanged_in_between_count(fused: list[int]) -> None:
    model = quantized("llama")
    patch_model(model, LORA_ONLY)
    attention = model.base_model.model.model.layers[1].self_attn
    x = torch.randn(2, 3, 32)
    fused.clear()
    attention.q_proj(x)
    attention.v_proj.base_layer.weight = attention.k_proj.base_layer.weight
    kept, changed = attention.k_proj(x), attention.v_proj(x)
    assert fused == [3, 1]
    stock = [type(layer).forward(layer, x) for layer in (attention.k_proj, attention.v_proj)]
    torch.testing.assert_close([kept, changed], stock)
