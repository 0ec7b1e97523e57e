"""QLoRA: PEFT's LoRA around layers that bitsandbytes has quantised computes what PEFT computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import LORA_ONLY, assert_close, wrapped
from models import counts, tiny_model
from oracle import assert_as_accurate
from quantized_models import (
    dequantized,
    exact,
    quantize,
    quantized,
    quantized_layer,
    quantized_layers,
)
from side_by_side import assert_as_accurate as model_as_accurate
from side_by_side import assert_no_trace, batch, run
from test_lora_in_models import assert_same
from test_recompute import Products, products  # noqa: F401 (a fixture)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from barqtrain_hf import patch_model
from barqtrain_hf.ops._dropout import Masks
from barqtrain_hf.patching import lora, recompute

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

GROUPS = [3, 1, 2, 1] * 2  # query, key and value; output; gate and up; down; of two layers
ADAPTER = ("lora_A", "lora_B")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def weights(layer: Any) -> list[torch.Tensor]:
    return [getattr(layer, part)["default"].weight for part in ADAPTER]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_families(family: str, bits: int, path: str) -> None:
    """With and without biases; gpt_neox's and phi3's projections are wider."""
    model = quantized(family, bits=bits)
    stock = run(model, batch())
    report = patch_model(model, LORA_ONLY)
    names = list(quantized_layers(model))
    assert report.installed == {"lora": names} and len(names) == {"llama": 14}.get(family, 8)
    for _ in range(2):
        assert_same(run(model, batch()), stock, path)
    assert not report.fallbacks and not report.skipped
    assert_no_trace(model)
    assert torch.equal(run(model, batch()).logits, stock.logits)


def test_layers_of_one_input_are_computed_together(fused: list[int]) -> None:
    model = quantized("llama")
    patch_model(model, LORA_ONLY)
    for _ in range(2):
        fused.clear()
        run(model, batch())
        assert fused == GROUPS


def test_plain_and_quantised_layers_in_one_model(fused: list[int]) -> None:
    """As llm_int8_skip_modules leaves some."""
    base = tiny_model("llama")
    plain = [layer.self_attn.k_proj for layer in base.model.layers]
    quantize(base, FP32)
    for layer, linear in zip(base.model.layers, plain, strict=True):
        layer.self_attn.k_proj = linear
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    stock = run(model, batch())
    report = patch_model(model, LORA_ONLY)
    assert len(report.installed["lora"]) == 14
    for _ in range(2):
        assert_same(run(model, batch()), stock, "fused")
    assert not report.fallbacks


# The model's dtype, the adapters', autocast: the last is what `prepare_model_for_kbit_training` leaves.
REGIMES = {
    "bf16": (BF16, BF16, False),
    "fp16": (FP16, FP16, False),
    "bf16, fp32 adapters, autocast": (BF16, FP32, True),
    "fp32, autocast": (FP32, FP32, True),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_models_in_16_bits(family: str, regime: str, path: str) -> None:
    dtype, adapter_dtype, autocast = REGIMES[regime]
    model = quantized(family, dtype, adapter_dtype)
    truth = run(exact(model, family, dtype), batch())
    stock = run(model, batch(), autocast)
    report = patch_model(model, LORA_ONLY)
    for _ in range(2):
        ours = run(model, batch(), autocast)
        if path == "reference":
            assert_same(ours, stock, path)
        model_as_accurate(ours, stock, truth)
        for mine, theirs in zip(ours.gradients, stock.gradients, strict=True):
            assert mine.dtype is theirs.dtype
    assert not report.fallbacks


# Of one layer: the input, what the frozen layer computes in, the adapter, autocast.
LAYERS = {
    "fp32": (FP32, FP32, FP32, False),
    "fp32, in bf16": (FP32, BF16, FP32, False),
    "bf16": (BF16, BF16, BF16, False),
    "fp16": (FP16, FP16, FP16, False),
    "bf16, fp32 adapter, autocast": (BF16, BF16, FP32, True),
    "fp32, in bf16, autocast": (FP32, BF16, FP32, True),
}


def one_layer(regime: str, bits: int, device: str = "cpu") -> tuple[Any, Any, Any]:
    """PEFT's layer around one of 64 to 80 numbers, the same in fp64, and what draws inputs."""
    dtype, compute, adapter, _ = LAYERS[regime]
    torch.manual_seed(2)
    linear = nn.Linear(64, 80).to(compute).requires_grad_(False)
    model = nn.Sequential(quantized_layer(linear, compute, bits, device))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8  # type: ignore[assignment]
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    for part in ADAPTER:
        getattr(layer, part).to(adapter)
    weight, bias = dequantized(layer.base_layer).double(), linear.bias.double().to(device)

    def truth(x: Any, upstream: Any) -> list[torch.Tensor]:
        leaves = [t.detach().double().requires_grad_() for t in (x, *weights(layer))]
        x, a, b = leaves
        y = x @ weight.T + bias + layer.scaling["default"] * (x @ a.T @ b.T)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.double())]

    def draw() -> list[torch.Tensor]:
        return [torch.randn(3, 11, n, device=device).to(dtype) for n in (64, 80)]

    return layer, truth, draw


def graded(layer: Any, forward: Any, regime: str) -> Any:
    """The result, and the gradients of x, A and B."""
    *_, autocast = LAYERS[regime]

    def call(x: Any, upstream: Any) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, BF16, enabled=autocast):
            y = forward(x)
        return [y.detach(), *torch.autograd.grad(y, (x, *weights(layer)), upstream.to(y.dtype))]

    return call


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("regime", LAYERS)
def test_a_layer_is_as_accurate_as_pefts(regime: str, bits: int, fused: list[int]) -> None:
    """Against fp64 with the weight that bitsandbytes multiplies by."""
    layer, truth, draw = one_layer(regime, bits)
    stock = graded(layer, lambda x: type(layer).forward(layer, x), regime)
    report = patch_model(layer, LORA_ONLY)
    assert report.installed == {"lora": [""]}
    fused.clear()
    ours = graded(layer, layer, regime)
    if regime == "fp32":  # where the order decides in which a CPU adds
        given = draw()
        # Some of bitsandbytes' releases round x to 8 bits too.
        wanted = truth if bits == 4 else stock
        for mine, expected in zip(ours(*given), wanted(*given), strict=True):
            assert mine.dtype is FP32 and (mine - expected).norm() <= 1e-6 * expected.norm()
    else:
        assert_as_accurate(draw, ours, stock, truth)
    assert set(fused) == {1} and not report.fallbacks


class Results(TorchDispatchMode):
    """Where tensors of a size were made."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numel:
            self.made.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_adapter_s_part_is_added_where_the_result_lies(device: str, fused: list[int]) -> None:
    layer, _, draw = one_layer("bf16", 4, device=device)
    patch_model(layer, LORA_ONLY)
    x = draw()[0].requires_grad_()
    with Results(33 * 80) as results:
        y = layer(x)
        assert results.made == {y.data_ptr()}


@pytest.mark.parametrize("regime", ["bf16", "fp32, in bf16, autocast"])
def test_what_is_kept_for_the_backward_pass(regime: str, fused: list[int]) -> None:
    """The input, in what is computed in, and t of [N, rank]: nothing else has N rows."""
    layer, _, draw = one_layer(regime, 4)
    patch_model(layer, LORA_ONLY)
    x, kept = draw()[0].requires_grad_(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autocast("cpu", BF16, enabled=x.dtype is FP32),
        saved_tensors_hooks(pack, lambda t: t),
    ):
        layer(x)
    for weight in weights(layer):
        kept.pop(weight.untyped_storage().data_ptr())
    # x, t, A and B times the scaling, of rank 8.
    assert sorted(kept.values()) == sorted([2 * 33 * 64, 2 * 33 * 8, 2 * 64 * 8, 2 * 80 * 8])


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_groups_and_checkpointing(
    reentrant: bool, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "use_cuda", lambda op, backend, x, unsupported: True)
    model = quantized("llama", lora_dropout=0.4).train()
    model.enable_input_require_grads()
    report = patch_model(model, LORA_ONLY)
    fused.clear()
    first = gradients(model)
    assert fused == GROUPS
    assert not torch.equal(gradients(model, seed=4)[0], first[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(gradients(model), first)
    assert not report.fallbacks


def gradients(model: Any, seed: int = 3) -> list[torch.Tensor]:
    """By backward, as use_reentrant=True wants it."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(**batch(), use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def test_all_other_ops_beside_it(fused: list[int]) -> None:
    """Norms, gated MLPs and RoPE are called around quantised layers as around others."""
    stock, ours = (quantized("llama") for _ in range(2))
    wanted = run(stock, batch())
    report = patch_model(ours)
    assert counts(report) == {"rms_norm": 5, "glu": 2, "rope": 2, "lora": 14}, str(report)
    assert "linear_cross_entropy" in report.installed
    for _ in range(2):
        assert_same(run(ours, batch(), fused=True), wanted, "fused")
    assert not report.fallbacks, str(report)


def test_a_frozen_quantised_mlp_is_fused() -> None:
    """Without adapters on it."""
    stock, ours = (quantized("llama", target_modules=["q_proj"]) for _ in range(2))
    wanted = run(stock, batch())
    report = patch_model(ours)
    assert counts(report) == {"rms_norm": 5, "glu": 2, "rope": 2, "lora": 2}, str(report)
    assert_same(run(ours, batch()), wanted, "fused")
    assert not report.fallbacks


def test_the_product_of_a_gated_mlp_is_not_kept(
    fused: list[int],
    products: Products,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = quantized("llama", BF16, target_modules=["down_proj"])
    patch_model(model, {**LORA_ONLY, "glu": True})
    products.storages.clear()
    fused.clear()
    found = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(recompute, "applies", lambda *_: False)
        with torch.autocast("cpu", BF16):
            loss = model(**batch()).loss
        # The first layer's input asks for no gradient, and its product neither.
        assert products.alive()[-1] == kept
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(loss, trained))
    assert all(map(torch.equal, *found)) and fused == [1, 1] * 2


def test_frozen_weights_stay_as_they_are(fused: list[int]) -> None:
    model = quantized("llama")
    patch_model(model)
    layers = [layer.base_layer for layer in quantized_layers(model).values()]
    before = [layer.weight.detach().clone() for layer in layers]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert layer.weight.grad is None and not layer.weight.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Any, path: str) -> None:
    stock, ours = (quantized("llama").eval() for _ in range(2))
    report = patch_model(ours, LORA_ONLY)
    with context():
        wanted = stock(**batch()).logits
        for _ in range(2):
            found = ours(**batch()).logits
            assert found.grad_fn is None
            assert_close([found], [wanted])
    assert_close(gradients(ours), gradients(stock))
    assert not report.fallbacks


def test_a_generating_model(fused: list[int]) -> None:
    model, ids = quantized("llama").eval(), torch.arange(3, 12)[None]
    options = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**options)
    patch_model(model, LORA_ONLY)
    fused.clear()
    assert torch.equal(model.generate(**options), expected)
    assert sum(fused) == 5 * 14


def test_torch_compile(fused: list[int]) -> None:
    """The adapter's part is PyTorch's there, and the graph is one as far as bitsandbytes' is."""
    torch._dynamo.reset()
    layer, x = one_layer("fp32", 4)[0], torch.ones(1, 11, 64)
    expected = type(layer).forward(layer, x)
    report = patch_model(layer, LORA_ONLY)
    fused.clear()
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert not fused and not report.fallbacks


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_prepared_for_kbit_training(autocast: bool, fused: list[int]) -> None:
    """Norms in fp32, and checkpointing that is switched on by PEFT."""
    models = []
    for _ in range(2):
        base = tiny_model("llama", BF16)
        quantize(base, BF16 if autocast else FP32)
        prepared = peft.prepare_model_for_kbit_training(
            base, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        models.append(wrapped(prepared).train())
    stock, ours = models
    assert stock.get_base_model().model.norm.weight.dtype is FP32
    assert stock.get_base_model().is_gradient_checkpointing
    truth = gradients(exact(stock, "llama", BF16))
    report = patch_model(ours)
    fused.clear()
    with torch.autocast("cpu", BF16, enabled=autocast):
        mine, theirs = gradients(ours), gradients(stock)
    assert sum(fused) == 2 * 14 and not report.fallbacks, str(report)
    assert all(gradient.dtype is FP32 for gradient in mine)
    if not autocast:
        assert_close(mine, theirs, 1e-5)
    mine, theirs, truth = (
        torch.cat([g.flatten() for g in found]) for found in (mine, theirs, truth)
    )
    assert (mine - truth).norm() <= 1.25 * (theirs - truth).norm() + 1e-5 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("regime", [regime for regime in LAYERS if regime != "fp32"])
def test_a_layer_on_a_gpu_is_as_accurate_as_pefts(regime: str, bits: int) -> None:
    layer, truth, draw = one_layer(regime, bits, device="cuda")
    stock = graded(layer, lambda x: type(layer).forward(layer, x), regime)
    report = patch_model(layer, LORA_ONLY)
    assert report.installed == {"lora": [""]}, str(report)
    assert_as_accurate(draw, graded(layer, layer, regime), stock, truth)
    assert not report.fallbacks
    with torch.autocast("cuda", BF16, enabled=LAYERS[regime][3]):
        y = layer(draw()[0].requires_grad_())
        assert y.dtype is type(layer).forward(layer, draw()[0]).dtype
    assert y.grad_fn.name() == "_AddedBackward"


@pytest.mark.gpu
@pytest.mark.parametrize("regime", ["bf16", "bf16, fp32 adapters, autocast"])
def test_a_model_trains_on_a_gpu(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, adapter_dtype, autocast = REGIMES[regime]
    models = []
    for dropout in (0.0, 0.0, 0.1):
        base = tiny_model("llama", dtype).cuda()
        quantize(base, dtype, device="cuda")
        models.append(wrapped(base, adapter_dtype, lora_dropout=dropout).train())
        models[-1].enable_input_require_grads()
    stock, ours, dropped = models
    report = patch_model(ours, LORA_ONLY)
    inputs = {k: v.cuda() for k, v in batch().items()}

    def outcome(model: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        with torch.autocast("cuda", BF16, enabled=autocast):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    theirs, mine = (torch.cat([t.float().flatten() for t in outcome(m)]) for m in (stock, ours))
    assert (mine - theirs).norm() <= 0.05 * theirs.norm() and not report.fallbacks
    drawn: list[int] = []
    draw = Masks.draw
    monkeypatch.setattr(Masks, "draw", lambda p, device: drawn.append(len(p)) or draw(p, device))
    for model in (ours, dropped):
        drawn.clear()
        report = patch_model(model, LORA_ONLY)
        first = outcome(model)
        assert drawn == (GROUPS if model is dropped else [])
        for reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # Stock attention may add up in another order; another mask would be far off.
            assert_close(outcome(model), first, 0.03)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        losses = []
        for _ in range(20):
            losses.append(outcome(model)[0].item())
            optimizer.step()
        assert losses[-1] < losses[0] and not report.fallbacks
