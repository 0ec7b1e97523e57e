"""PEFT's LoRA layers with dropout: by the op on a GPU, and by PEFT's own forward wherever the op is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import LORA_ONLY, adapted, assert_close, lora_layers
from side_by_side import batch
from torch import nn

from barqtrain_hf import patch_model
from barqtrain_hf.ops._dropout import Masks
from barqtrain_hf.patching import lora

FALLBACK = ("lora", "its adapter has dropout")


@pytest.fixture
def taken(fused: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Dropout is taken on a CPU too; how many layers each call of the fused path had."""
    monkeypatch.setattr(lora, "use_cuda", lambda op, backend, x, unsupported: True)
    return fused


class ByMask(nn.Module):
    """Dropout as the op has it of a layer that is computed alone."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Masks.draw((self.p,), x.device).differentiable(x, 0)


def outcome(model: Any, seed: int = 3, device: str = "cpu") -> list[torch.Tensor]:
    """Logits and gradients, by backward, as use_reentrant=True wants it."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model(**{k: v.to(device) for k, v in batch().items()}, use_cache=False)
    outputs.loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [outputs.logits.detach(), *trained]


def test_it_is_pefts_forward_under_the_op_s_masks(taken: list[int]) -> None:
    options: dict[str, Any] = {"target_modules": ["o_proj", "down_proj"], "lora_dropout": 0.4}
    stock, ours = adapted("llama", **options).train(), adapted("llama", **options).train()
    for layer in lora_layers(stock).values():
        layer.lora_dropout["default"] = ByMask(0.4)
    report = patch_model(ours, LORA_ONLY)
    taken.clear()
    for seed in (3, 4):
        assert_close(outcome(ours, seed), outcome(stock, seed))
    assert taken == [1] * 8 and not report.fallbacks
    ours.eval()
    assert_close(outcome(ours), outcome(adapted("llama", **options).eval()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_groups_seeds_and_checkpointing(reentrant: bool, taken: list[int]) -> None:
    model = adapted("llama", lora_dropout=0.4).train()
    model.enable_input_require_grads()
    report = patch_model(model, LORA_ONLY)
    taken.clear()
    first = outcome(model)
    assert taken == [3, 1, 2, 1] * 2
    assert all(map(torch.equal, outcome(model), first))
    assert not torch.equal(outcome(model, seed=4)[0], first[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(outcome(model), first)
    assert not report.fallbacks


def test_the_probability_is_read_when_it_is_used(taken: list[int]) -> None:
    model = adapted("llama", lora_dropout=0.4).train()
    report = patch_model(model, LORA_ONLY)
    found = []
    for p in (0.4, 0.2, 0.0, 0.4):
        for layer in lora_layers(model).values():
            layer.lora_dropout["default"].p = p
        found.append(outcome(model))
    assert all(map(torch.equal, found[0], found[3]))
    assert not torch.equal(found[0][0], found[1][0])
    assert_close(found[2], outcome(adapted("llama").eval()))
    assert not report.fallbacks


class OtherDropout(nn.Dropout):
    """Somebody's own."""


OTHERS = {
    "a subclass": lambda: OtherDropout(0.4),
    "another kind": lambda: nn.AlphaDropout(0.4),
    "in place": lambda: nn.Dropout(0.4, inplace=True),
    "all": lambda: nn.Dropout(1.0),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_dropouts_are_left_to_peft(case: str, taken: list[int]) -> None:
    options: dict[str, Any] = {"target_modules": ["o_proj"], "lora_dropout": 0.4}
    stock, ours = adapted("llama", **options).train(), adapted("llama", **options).train()
    report = patch_model(ours, LORA_ONLY)
    for model in (stock, ours):
        first, second = (layer.lora_dropout for layer in lora_layers(model).values())
        first["default"].p = 0.0
        second["default"] = OTHERS[case]()
    taken.clear()
    found = []
    for model in (ours, stock):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(model(**batch()).logits)
    assert_close(found[:1], found[1:])
    assert taken == [1] and report.fallbacks == {FALLBACK: 1}


def test_a_compiled_layer_has_pefts_dropout(taken: list[int]) -> None:
    torch._dynamo.reset()
    model = adapted("llama", lora_dropout=0.4).train()
    patch_model(model, LORA_ONLY)
    layer, x = lora_layers(model)["model.layers.1.self_attn.o_proj"], torch.randn(5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    expected = type(layer).forward(layer, x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_trains_on_a_gpu(
    adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama", torch.bfloat16, adapter_dtype, lora_dropout=0.1).train().cuda()
    model.enable_input_require_grads()
    report = patch_model(model, LORA_ONLY)
    drawn = []
    draw = Masks.draw
    monkeypatch.setattr(Masks, "draw", lambda *given: drawn.append(given[0]) or draw(*given))
    with torch.autocast("cuda", torch.bfloat16, enabled=adapter_dtype is torch.float32):
        first = outcome(model, device="cuda")
        assert [len(p) for p in drawn] == [3, 1, 2, 1] * 2 and not report.fallbacks
        assert_close(outcome(model, device="cuda"), first, 0.02)
        assert (outcome(model, 4, "cuda")[0] - first[0]).norm() > 0.02 * first[0].norm()
        for reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # Stock attention may add up in another order; another mask would be far off.
            assert_close(outcome(model, device="cuda"), first, 0.02)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
        inputs = {k: v.cuda() for k, v in batch().items()}
        for _ in range(20):
            loss = model(**inputs, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] and not report.fallbacks
