"""Patched LoRA layers under checkpointing, torch.compile and inference, and what they keep in memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from lora_models import LORA_ONLY, adapted, assert_close, lora_layers
from side_by_side import batch, run
from test_recompute import MLP, Products, products  # noqa: F401 (a fixture)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from barqtrain_hf import patch_model
from barqtrain_hf.patching import recompute

peft = pytest.importorskip("peft")

NAME = "model.layers.1.mlp.down_proj"  # which no other layer shares its input with


def gradients(model: Any) -> list[torch.Tensor]:
    """By backward, as use_reentrant=True wants it."""
    model.zero_grad()
    model(**batch(), use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_gradient_checkpointing(family: str, reentrant: bool, path: str) -> None:
    stock, ours = adapted(family).train(), adapted(family).train()
    wanted = gradients(stock)
    report = patch_model(ours, LORA_ONLY)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    for _ in range(2):
        assert_close(gradients(ours), wanted)
    assert not report.fallbacks


def test_torch_compile(path: str) -> None:
    torch._dynamo.reset()
    model = adapted("llama", overrides={"num_hidden_layers": 1})
    wanted = run(model, batch())
    report = patch_model(model, LORA_ONLY)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**batch(), use_cache=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = list(torch.autograd.grad(outputs.loss, trained))
    assert_close([outputs.logits, outputs.loss, *found], [*wanted[:2], *wanted.gradients])
    assert not report.fallbacks


def test_torch_compile_of_a_call_that_falls_back(path: str) -> None:
    torch._dynamo.reset()
    model = adapted("llama").eval()
    layer = lora_layers(model)[NAME]
    report = patch_model(model, LORA_ONLY)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(5, 48)
    torch.testing.assert_close(compiled(x), type(layer).forward(layer, x))
    assert not report.fallbacks
    with model.disable_adapter():  # is seen: the graph is compiled anew
        torch.testing.assert_close(compiled(x), layer.base_layer(x))
    layer.scale_layer(3.0)
    torch.testing.assert_close(compiled(x), type(layer).forward(layer, x))


REGIMES = {
    "fp32": (torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32, False),
    "bf16, fp32 adapters, autocast": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_kept_for_the_backward_pass(regime: str, fused: list[int]) -> None:
    """The input, t of [N, rank], the weights and copies of the adapter's at most: nothing else has N rows."""
    dtype, adapter_dtype, autocast = REGIMES[regime]
    model = adapted("llama", dtype, adapter_dtype)
    layer = lora_layers(model)[NAME]
    patch_model(model, LORA_ONLY)
    x = torch.randn(2, 30, 48).to(dtype).requires_grad_()
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    fused.clear()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        saved_tensors_hooks(pack, lambda t: t),
    ):
        y = layer(x)
    assert fused == [1] and y.dtype is dtype
    storages = {address: t.untyped_storage().nbytes() for address, t in kept.items()}
    size = dtype.itemsize
    for given, number in ((x, 60 * 48), (layer.base_layer.weight, 32 * 48)):
        assert storages.pop(given.untyped_storage().data_ptr()) == number * size
    for linear in (layer.lora_A["default"], layer.lora_B["default"]):
        weight = linear.weight  # alive in any case
        assert storages.pop(weight.untyped_storage().data_ptr()) == weight.nbytes
    # t, and A and B, scaled, in what is computed in: of rank 4, or 8 in 16 bits.
    rank = 4 if dtype is torch.float32 else 8
    assert sorted(storages.values()) == sorted(rank * n * size for n in (60, 32, 48))


READERS = ("q_proj", "gate_proj", "query_key_value", "dense_h_to_4h")  # of norms


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_output_of_a_norm_is_not_kept(
    family: str, autocast: bool, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA layers read norms, and nothing else keeps what they read."""
    monkeypatch.setattr(recompute, "SMALL", 0)
    model = adapted(family)
    report = patch_model(model, {**LORA_ONLY, "rms_norm": True, "layer_norm": True})
    assert not report.fallbacks
    outputs: dict[str, StorageWeakRef] = {}
    for name, module in model.named_modules():
        # The first layer's input asks for no gradient, so that nothing else keeps it.
        if "layers.1." in name and name.split(".")[-1] in READERS:
            module.register_forward_pre_hook(
                lambda _, args, name=name: outputs.update(
                    {name: StorageWeakRef(args[0].untyped_storage())}
                )
            )
    ids = torch.randint(3, 60, (2, 9))
    trained = [p for p in model.parameters() if p.requires_grad]
    gc.disable()  # what is freed must not need the collector
    found = []
    for noted in (True, False):
        monkeypatch.setattr(recompute.Noted, "wanted", True)
        if not noted:
            monkeypatch.setattr(recompute, "note", lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        # An fp32 norm's output is cast for bf16 layers: then the cast is what would be kept.
        expired = [storage.expired() for storage in outputs.values()]
        assert len(expired) == 2 and all(expired) == (noted or autocast)
        found.append(torch.autograd.grad(loss, trained))
    gc.enable()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_of_a_gated_mlp_is_not_kept(
    dtype: torch.dtype,
    autocast: bool,
    fused: list[int],
    products: Products,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its down projection saves it through our op as well as through PEFT's layer."""
    mlp = MLP().to(dtype).requires_grad_(False)
    config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(mlp, config)
    report = patch_model(mlp)
    assert report.installed == {"glu": [""], "lora": ["down_proj"]}
    products.storages.clear()
    fused.clear()
    x = torch.randn(2, 7, 32).to(dtype).requires_grad_()
    weights = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(recompute, "applies", lambda *_: False)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        assert products.alive()[-1] == kept
        found.append(torch.autograd.grad(y.float().square().sum(), weights))
    assert all(map(torch.equal, *found)) and fused == [1, 1]
    assert not report.fallbacks


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any, path: str) -> None:
    model = adapted("llama").eval()
    report = patch_model(model, LORA_ONLY)
    with context():
        for _ in range(3):
            ours = model(**batch()).logits
            assert ours.grad_fn is None
    torch.testing.assert_close(
        ours, adapted("llama").eval()(**batch()).logits, rtol=1e-5, atol=1e-5
    )
    # And in training again, where nothing of that may be left over.
    assert_close(gradients(model), gradients(adapted("llama")))
    assert not report.fallbacks


def test_functional_call_uses_the_weights_it_is_given(path: str) -> None:
    model = adapted("llama")
    patch_model(model, LORA_ONLY)
    for _ in range(2):
        model(**batch())
    other = {name: 0.5 * p.detach() for name, p in model.named_parameters()}
    stock = torch.func.functional_call(adapted("llama"), other, (), batch())
    ours = torch.func.functional_call(model, other, (), batch())
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-5, atol=1e-5)


def test_an_input_written_to_before_the_backward_pass(fused: list[int]) -> None:
    model = adapted("llama")
    layer = lora_layers(model)[NAME]
    patch_model(model, LORA_ONLY)
    x = torch.randn(3, 48)
    y = layer(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_may_be_written_to(path: str) -> None:
    model = adapted("llama")
    patch_model(model, LORA_ONLY)
    stock = adapted("llama")

    class Doubles(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).mul_(2.0).relu_()

    for one in (model, stock):
        for name in ("q_proj", "k_proj", "v_proj"):
            attention = one.get_base_model().model.layers[0].self_attn
            setattr(attention, name, Doubles(getattr(attention, name)))
    for _ in range(3):
        assert_close(gradients(model), gradients(stock))
