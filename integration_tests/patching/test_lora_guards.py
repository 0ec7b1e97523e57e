"""LoRA layers that are more than plain ones keep PEFT's forward, call by call, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lora_models import LORA_ONLY, adapted, assert_close, fill, lora_layers
from side_by_side import batch
from torch import nn

from barqtrain_hf import patch_model
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError

peft = pytest.importorskip("peft")

NAME = "model.layers.1.self_attn.q_proj"  # whose input has a gradient
ALONE = "model.layers.1.self_attn.o_proj"  # shares its input with no other
HOOKS = "there are hooks inside (offloading, ZeRO-3, or the user's)"
PARTS = "its weights are in parts (FSDP, tensor parallelism or ZeRO-3)"
TRAINED = "its own weight is trained too"


class Other(torch.Tensor):
    """A tensor subclass; what is computed of it is plain."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func is torch.Tensor.detach else result


class OtherLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


def _hook(part: str, kind: str) -> Callable[[Any], None]:
    """Registers a hook that doubles what it is given."""

    def double(module: Any, *given: Any) -> Any:
        last = given[-1]
        return tuple(2.0 * x for x in last) if isinstance(last, tuple) else 2.0 * last

    def hook(module: Any, gradients: Any, *_: Any) -> Any:
        return tuple(2.0 * gradient for gradient in gradients)

    def register(layer: Any) -> None:
        module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
        getattr(module, f"register_{kind}_hook")(hook if "backward" in kind else double)

    return register


def _bind(layer: Any) -> None:
    base = layer.base_layer
    base.forward = lambda x: 3.0 * type(base).forward(base, x)


def _train(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_()


def _another_class(layer: Any) -> None:
    layer.lora_A["default"].__class__ = OtherLinear


def _another_tensor(layer: Any) -> None:
    weight = layer.lora_B["default"].weight
    layer.lora_B["default"].weight = nn.Parameter(weight.detach().as_subclass(Other))


def _fan(layer: Any) -> None:
    layer.fan_in_fan_out = True


# What is done to one layer of a patched model, and why it is left to PEFT from then on.
ONE_LAYER: dict[str, tuple[Callable[[Any], Any], str]] = {
    **{
        f"{kind} hook of {part}": (_hook(part, kind), HOOKS)
        for part in ("base_layer", "lora_A", "lora_B")
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
    },
    "forward bound on the base layer": (_bind, HOOKS),
    "trained base weight": (_train, TRAINED),
    "another class": (_another_class, "there is a OtherLinear inside"),
    "another kind of tensor": (_another_tensor, PARTS),
    "fan_in_fan_out": (_fan, "its adapter has fan_in_fan_out"),
}


def outcome(model: Any, inputs: dict[str, Any] | None = None, seed: int = 3) -> list[torch.Tensor]:
    """Logits, loss and every gradient, with the same dropout every time."""
    torch.manual_seed(seed)
    outputs = model(**(inputs or batch()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not outputs.logits.requires_grad:
        return [outputs.logits, outputs.loss]
    return [outputs.logits, outputs.loss, *torch.autograd.grad(outputs.loss, trained)]


def assert_equal(ours: list[torch.Tensor], stock: list[torch.Tensor]) -> None:
    assert len(ours) == len(stock) and all(map(torch.equal, ours, stock))


@pytest.mark.parametrize("case", ONE_LAYER)
def test_one_layer_is_left_to_peft(case: str, fused: list[int]) -> None:
    change, reason = ONE_LAYER[case]
    models = stock, ours = adapted("llama"), adapted("llama")
    report = patch_model(ours, LORA_ONLY)
    unchanged = outcome(stock)
    assert_close(outcome(ours), unchanged)
    for model in models:
        change(lora_layers(model)[NAME])
    fused.clear()
    wanted = outcome(stock)
    # The case is one: what the layer's module does now shows in the result (or is read by PEFT only).
    if case not in ("trained base weight", "another kind of tensor", "fan_in_fan_out"):
        assert not all(map(torch.equal, wanted, unchanged))
    assert_close(outcome(ours), wanted)
    assert report.fallbacks == {("lora", reason): 1} and sum(fused) == 13


# What holds for all layers: options of the adapter, what is done to the model, and the reason.
ALL_LAYERS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "its adapters are disabled"),
    "merged": ({}, lambda m: m.merge_adapter(), "its adapters are merged"),
    "DoRA": ({"use_dora": True}, lambda m: None, "adapter 'default' is not plain LoRA"),
    "bias": ({"lora_bias": True}, lambda m: None, "its adapter has a bias"),
    "dropout": ({"lora_dropout": 0.4}, lambda m: m.train(), "its adapter has dropout"),
}


@pytest.mark.parametrize("case", ALL_LAYERS)
def test_all_layers_are_left_to_peft(case: str, fused: list[int]) -> None:
    options, change, reason = ALL_LAYERS[case]
    models = stock, ours = adapted("llama", **options).eval(), adapted("llama", **options).eval()
    report = patch_model(ours, LORA_ONLY)
    for model in models:
        change(model)
    fused.clear()
    for _ in range(2):
        assert_equal(outcome(ours), outcome(stock))
    assert report.fallbacks == {("lora", reason): 2 * 14} and not fused
    assert f"lora: 28 calls took the stock forward: {reason}" in str(report)


def test_dropout_in_evaluation_is_fused(fused: list[int]) -> None:
    stock, ours = adapted("llama", lora_dropout=0.4), adapted("llama", lora_dropout=0.4)
    report = patch_model(ours, LORA_ONLY)
    for training in (False, True, False):
        fused.clear()
        calls = sum(report.fallbacks.values())
        assert_close(outcome(ours.train(training)), outcome(stock.train(training)))
        assert sum(fused) == (0 if training else 14)
        assert sum(report.fallbacks.values()) - calls == (14 if training else 0)


def test_adapters_that_are_out_for_a_while(fused: list[int]) -> None:
    stock, ours = adapted("llama"), adapted("llama")
    report = patch_model(ours, LORA_ONLY)
    for disabled in (False, True, False):
        fused.clear()
        with stock.disable_adapter() if disabled else nullcontext():
            wanted = outcome(stock)
        with ours.disable_adapter() if disabled else nullcontext():
            assert_close(outcome(ours), wanted)
        assert sum(fused) == (0 if disabled else 14)
    for model in (stock, ours):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_close(outcome(ours), outcome(stock))
    # The adapters that are merged come out of the weights for a call without them.
    for model in (stock, ours):
        model.merge_adapter()
        model.base_model.disable_adapter_layers()
    assert_equal(outcome(ours), outcome(stock))
    assert not any(layer.merged for layer in lora_layers(ours).values())
    assert report.fallbacks == {("lora", "its adapters are disabled"): 28}


def test_two_adapters_at_once(fused: list[int]) -> None:
    models = stock, ours = adapted("llama"), adapted("llama")
    report = patch_model(ours, LORA_ONLY)
    for model in models:
        torch.manual_seed(8)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
        fill(model, "second")
        model.base_model.set_adapter(["default", "second"])
    assert_equal(outcome(ours), outcome(stock))
    assert report.fallbacks == {("lora", "2 adapters are active"): 14}
    for model in models:
        model.set_adapter("second")
    fused.clear()
    assert_close(outcome(ours), outcome(stock))
    assert sum(fused) == sum(report.fallbacks.values()) == 14


def test_a_layer_without_the_active_adapter() -> None:
    models = stock, ours = adapted("llama"), adapted("llama")
    report = patch_model(ours, LORA_ONLY)
    for model in models:
        torch.manual_seed(8)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
        fill(model, "second")
        model.set_adapter("second")
    assert_close(outcome(ours), outcome(stock))
    assert report.fallbacks == {("lora", "it has no adapter 'second'"): 12}


def test_biases_that_are_trained(fused: list[int]) -> None:
    options: dict[str, Any] = {"bias": "lora_only", "overrides": {"attention_bias": True}}
    stock, ours = adapted("llama", **options), adapted("llama", **options)
    report = patch_model(ours, LORA_ONLY)
    fused.clear()
    assert_close(outcome(ours), outcome(stock))
    assert report.fallbacks == {("lora", TRAINED): 8} and sum(fused) == 6  # its MLP has no bias
    with torch.no_grad():
        assert_close(outcome(ours), outcome(stock))


def test_adapters_of_a_mixed_batch(fused: list[int]) -> None:
    stock, ours = adapted("llama").eval(), adapted("llama").eval()
    report = patch_model(ours, LORA_ONLY)
    fused.clear()
    inputs = {**batch(), "adapter_names": ["__base__", "default"]}
    with torch.no_grad():
        assert_equal(outcome(ours, inputs), outcome(stock, inputs))
        assert report.fallbacks == {("lora", "called with more than its input"): 14} and not fused
        assert_close(outcome(ours), outcome(stock))
    assert sum(fused) == 14


def test_other_inputs(fused: list[int]) -> None:
    model = adapted("llama")
    report = patch_model(model, LORA_ONLY)
    layer, x = lora_layers(model)[NAME], torch.randn(2, 3, 32)
    fused.clear()
    assert torch.equal(layer(x.as_subclass(Other)), type(layer).forward(layer, x))
    assert torch.equal(layer(nn.Parameter(x)), type(layer).forward(layer, x))
    reasons = [reason for _, reason in report.fallbacks]
    assert reasons == ["called with a Other", "called with a Parameter"] and not fused
    model.double()
    assert torch.equal(layer(x.double()), type(layer).forward(layer, x.double()))
    assert ("lora", "not probed, or not equal, for torch.float64") in report.fallbacks


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 0, 32), (1, 32), (2, 3, 2, 32)], ids=str)
def test_shapes(shape: tuple[int, ...], fused: list[int]) -> None:
    model = adapted("llama")
    layer = lora_layers(model)[ALONE]
    patch_model(model, LORA_ONLY)
    fused.clear()
    x = torch.randn(shape, requires_grad=True)
    adapter = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    results = []
    for y in (layer(x), type(layer).forward(layer, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapter])])
    assert_close(*results)
    assert fused == [1] and results[0][0].shape == results[1][0].shape


def test_strides(fused: list[int]) -> None:
    model = adapted("llama")
    layer = lora_layers(model)[NAME]
    patch_model(model, LORA_ONLY)
    for x in (
        torch.randn(32, 6).T,
        torch.randn(1, 32).expand(6, 32),
        torch.randn(4, 3, 32).transpose(0, 1),
        torch.randn(5, 64)[:, ::2],
    ):
        x = x.detach().requires_grad_()
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        found = []
        for y in (layer(x), type(layer).forward(layer, x)):
            # Gradients that are not contiguous either, as those of a sum.
            found.append([y, *torch.autograd.grad(y.sum(), [x, *weights])])
        assert_close(*found)


def test_hooks_of_the_layer_itself_fire(fused: list[int]) -> None:
    model = adapted("llama")
    layer, seen = lora_layers(model)[NAME], []
    report = patch_model(model, LORA_ONLY)
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    for name in ("lora_A", "lora_B"):
        getattr(layer, name)["default"].weight.register_post_accumulate_grad_hook(
            lambda _, name=name: seen.append(name)
        )
    outputs = model(**batch())
    outputs.loss.backward()
    assert seen[:2] == ["before", "after"]
    assert sorted(seen[2:]) == ["backward", "lora_A", "lora_B"]
    assert not report.fallbacks


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.ones(3, 32, dtype=torch.long), ArgumentTypeError, "x is torch.int64; cast it to"),
        (
            torch.ones(3, 31),
            ArgumentError,
            r"x of shape \(3, 31\) does not fit weight of \(32, 32\)",
        ),
        (torch.ones(()), ArgumentError, r"x of shape \(\) does not fit weight"),
        (torch.ones(3, 32).bfloat16(), ArgumentError, "x is torch.bfloat16, weight torch.float32"),
    ],
    ids=["integers", "width", "scalar", "dtype"],
)
def test_errors_name_the_layer(
    x: torch.Tensor, kind: type[Exception], message: str, path: str
) -> None:
    model = adapted("llama")
    patch_model(model, LORA_ONLY)
    layer = lora_layers(model)[NAME]
    with pytest.raises(kind, match=f"^{NAME}: lora_linear: {message}"):
        layer(x)
    layer(torch.ones(3, 32))  # and it goes on


def test_an_adapter_on_another_device(path: str) -> None:
    model = adapted("llama")
    patch_model(model, LORA_ONLY)
    layer = lora_layers(model)[NAME]
    layer.lora_B["default"].to("meta")
    with pytest.raises(
        ArgumentError, match=f"^{NAME}: lora_linear: lora_b is on meta and x on cpu"
    ):
        layer(torch.ones(3, 32))


@pytest.mark.parametrize("layer_trains", [True, False])
def test_a_dropout_is_asked_whether_it_trains_not_its_layer(
    layer_trains: bool, fused: list[int]
) -> None:
    """Monte Carlo dropout: the model in evaluation, its dropouts not; and the reverse."""
    model = adapted("llama", lora_dropout=0.4).train(layer_trains)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(not layer_trains)
    torch.manual_seed(0)
    expected = model(**batch()).logits
    report = patch_model(model, LORA_ONLY)
    fused.clear()
    torch.manual_seed(0)
    assert_close([model(**batch()).logits], [expected])
    assert sum(fused) == (14 if layer_trains else 0)
    assert report.fallbacks == ({} if layer_trains else {("lora", "its adapter has dropout"): 14})


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_hooks_on_a_dropout_are_called(dropout: float, fused: list[int]) -> None:
    model = adapted("llama", lora_dropout=dropout).eval()
    layer = lora_layers(model)[ALONE]
    layer.lora_dropout["default"].register_forward_hook(lambda module, given, x: 3.0 * x)
    expected = model(**batch()).logits
    report = patch_model(model, LORA_ONLY)
    assert_close([model(**batch()).logits], [expected])
    assert report.fallbacks == {("lora", HOOKS): 1}


def test_layers_that_are_wrapped_later_are_found_by_patching_again(fused: list[int]) -> None:
    model = adapted("llama", target_modules=["q_proj"])
    patch_model(model, LORA_ONLY)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    report = patch_model(model, LORA_ONLY)
    assert len(report.installed["lora"]) == 4
    assert report.skipped == {}


def test_a_model_that_was_moved_to_meta_is_left_to_peft() -> None:
    model = adapted("llama")
    patch_model(model, LORA_ONLY)
    layer = lora_layers(model.to("meta"))[ALONE]
    assert layer(torch.empty(2, 3, 32, device="meta")).shape == (2, 3, 32)
