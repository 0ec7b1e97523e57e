"""LoRA layers of one input are computed together, and never give another answer for it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from lora_models import adapted, assert_close

from barqtrain_hf import patch_model, unpatch_model
from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.patching import lora_together

QKV = ["q_proj", "k_proj", "v_proj"]


def results(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Loss and the gradients of the adapters."""
    loss = model(input_ids=ids, labels=ids).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


IDS = torch.arange(22).view(2, 11)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_query_key_value_and_gate_up_are_groups(family: str, fused: list[int]) -> None:
    model = adapted(family)
    expected = results(model, IDS)
    patch_model(model)
    for _ in range(2):
        fused.clear()
        assert_close(results(model, IDS), expected)
        assert fused == [3, 1, 2, 1] * 2
    unpatch_model(model)
    assert_close(results(model, IDS), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant: bool, fused: list[int]) -> None:
    model = adapted("llama")
    model.enable_input_require_grads()
    expected = results(model, IDS)
    patch_model(model)
    fused.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for _ in range(3):
        if reentrant:
            model.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            mine = [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
        else:
            mine = results(model, IDS)
        assert_close(mine, expected)
    assert fused == [3, 1, 2, 1] * 12


class Calls:
    """One attention block's projections, called by hand."""

    def __init__(self) -> None:
        self.model = adapted("llama")
        patch_model(self.model)
        self.stock = copy.deepcopy(self.model)
        unpatch_model(self.stock)
        self.x = torch.randn(2, 3, 32)

    def layer(self, name: str, stock: bool = False) -> Any:
        model = self.stock if stock else self.model
        return getattr(model.base_model.model.model.layers[0].self_attn, name)

    def __call__(self, name: str, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(name)(self.x if x is None else x)

    def expected(self, name: str, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(name, stock=True)(self.x if x is None else x)


@pytest.fixture
def calls(fused: list[int]) -> Calls:
    made = Calls()
    fused.clear()
    made("q_proj")
    assert fused == [3]
    return made


def test_the_others_are_answered_with_what_is_there(calls: Calls, fused: list[int]) -> None:
    for name in QKV[1:]:
        torch.testing.assert_close(calls(name), calls.expected(name))
    assert fused == [3]
    assert calls("v_proj").requires_grad  # asked for again, it is computed again
    assert fused == [3, 1]


def test_another_input_is_computed(calls: Calls, fused: list[int]) -> None:
    other = calls.x.clone()
    torch.testing.assert_close(calls("k_proj", other), calls.expected("k_proj", other))
    assert fused == [3, 1]


def test_an_input_that_was_written_to_is_computed(calls: Calls) -> None:
    calls.x.add_(1.0)
    torch.testing.assert_close(calls("k_proj"), calls.expected("k_proj"))


def test_a_scaling_that_was_changed_counts(calls: Calls) -> None:
    for stock in (True, False):
        calls.layer("k_proj", stock).set_scale("default", 3.0)
    torch.testing.assert_close(calls("k_proj"), calls.expected("k_proj"))


def test_weights_that_were_changed_count(calls: Calls) -> None:
    for stock in (True, False):
        with torch.no_grad():
            calls.layer("k_proj", stock).lora_B["default"].weight.fill_(0.3)
    torch.testing.assert_close(calls("k_proj"), calls.expected("k_proj"))


def test_gradients_that_are_wanted_later_are_there(calls: Calls) -> None:
    calls("k_proj"), calls("v_proj")
    with torch.no_grad():
        assert not calls("q_proj").requires_grad
    assert calls("k_proj").requires_grad


def test_autocast_that_begins_later_counts(calls: Calls) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert calls("k_proj").dtype is torch.bfloat16


def test_disabled_adapters_are_never_answered_from_before(calls: Calls) -> None:
    with calls.model.disable_adapter():
        layer = calls.layer("k_proj")
        torch.testing.assert_close(calls("k_proj"), layer.base_layer(calls.x))


def test_hooks_of_each_layer_fire(calls: Calls) -> None:
    seen: list[Any] = []
    layer = calls.layer("k_proj")
    layer.register_forward_hook(lambda module, args, y: seen.append(y))
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    y = calls("k_proj")
    assert seen[0] is y
    torch.testing.assert_close(y, calls.expected("k_proj", 2 * calls.x))


@pytest.mark.parametrize("part", ["base_layer", "lora_A"])
def test_a_hook_that_was_put_inside_counts(part: str, calls: Calls) -> None:
    for stock in (True, False):
        module = getattr(calls.layer("k_proj", stock), part)
        module = module["default"] if part == "lora_A" else module
        module.register_forward_hook(lambda module, args, y: 2.0 * y)
    torch.testing.assert_close(calls("k_proj"), calls.expected("k_proj"))


def test_a_layer_that_was_not_called_is_computed_anew(calls: Calls, fused: list[int]) -> None:
    for _ in range(2):
        torch.testing.assert_close(calls("q_proj"), calls.expected("q_proj"))
        torch.testing.assert_close(calls("k_proj"), calls.expected("k_proj"))
    assert fused == [3] * 3
    torch.testing.assert_close(calls("v_proj", 2 * calls.x), calls.expected("v_proj", 2 * calls.x))


def test_an_answer_that_nobody_takes_is_let_go(calls: Calls) -> None:
    """By the next call of any layer: x, what was computed of it and its graph."""
    x = weakref.ref(calls.x)
    calls.x = torch.randn(2, 3, 32)
    assert x() is not None
    calls("o_proj")
    gc.collect()
    assert x() is None


def test_what_inference_mode_does_not_count_is_not_grouped(calls: Calls, fused: list[int]) -> None:
    with torch.inference_mode():
        x = torch.randn(2, 3, 32)
        calls("q_proj", x)
        x.zero_()
        torch.testing.assert_close(calls("k_proj", x), calls.expected("k_proj", x))
    assert fused == [3, 1, 1]


@pytest.mark.parametrize("name", ["base_layer", "lora_B"])
def test_data_that_was_exchanged_counts(name: str, calls: Calls) -> None:
    for stock in (True, False):
        layer = getattr(calls.layer("k_proj", stock), name)
        weight = (layer["default"] if name == "lora_B" else layer).weight
        weight.data = torch.full_like(weight, 0.3)
    torch.testing.assert_close(calls("k_proj"), calls.expected("k_proj"))


def test_adapters_that_were_frozen_count(calls: Calls) -> None:
    calls.layer("k_proj").lora_A.requires_grad_(False)
    calls.layer("k_proj").lora_B.requires_grad_(False)
    assert not calls("k_proj").requires_grad


def test_a_layer_with_a_forward_of_somebody_else_is_not_computed_for_it(
    calls: Calls, fused: list[int]
) -> None:
    calls.layer("k_proj").forward = lambda x: x + 1
    fused.clear()
    calls("q_proj")
    assert torch.equal(calls("k_proj"), calls.x + 1)
    assert fused == [1]


def test_an_error_is_said_by_the_layer_that_makes_it(calls: Calls, fused: list[int]) -> None:
    calls.layer("k_proj").lora_B["default"].to("meta")
    torch.testing.assert_close(calls("q_proj"), calls.expected("q_proj"))
    with pytest.raises(ArgumentError, match=r"0.self_attn.k_proj: lora_linear: lora_b is on meta"):
        calls("k_proj")


def test_a_copy_uses_its_own_weights(fused: list[int]) -> None:
    model = adapted("llama")
    patch_model(model)
    results(model, IDS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    stock = copy.deepcopy(twin)
    unpatch_model(stock)
    expected = results(stock, IDS)
    for _ in range(3):
        results(model, IDS)
        assert_close(results(twin, IDS), expected)
    # No layer of a copy is known to belong to another.
    assert fused[-14:] == [1] * 14


def test_two_threads(fused: list[int]) -> None:
    model = adapted("llama")
    inputs = [(IDS + i) % 50 for i in range(2)]
    expected = [model(input_ids=ids).logits for ids in inputs]
    patch_model(model)
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(20):
            if not torch.allclose(model(input_ids=inputs[i]).logits, expected[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_forward_calls_alike() -> None:
    class Block:
        def forward(self: Any, x: Any, context: Any) -> Any:
            q = self.norm(self.q(x).view(3))
            k, v = self.k(context), self.v(context)
            twice = self.o(self.o(x))
            h = self.up(x)
            h = self.middle(h)
            h = self.down(h)
            for x in twice:
                h = self.last(x)
            return q, k, v, twice, self.gate(h), self.more(x, x), self.drop(h + 1), self.none(p=x)

    assert lora_together._called_alike(Block.forward) == [["q", "up"], ["k", "v"]]
    assert lora_together._called_alike(len) == []
