"""patch_model: what it matches, what it leaves alone, and that it comes out without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Olmo2Config, Olmo2ForCausalLM

from barqtrain_hf import BarqConfig, patch_model, unpatch_model
from barqtrain_hf.patching import FusedLoss, head_unsupported

IDS = torch.arange(3, 23)[None]


def instance_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patched_model_computes_the_same(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    stock = model(IDS, labels=IDS)
    stock_grads = torch.autograd.grad(stock.loss, list(model.parameters()))
    report = patch_model(model)
    assert "linear_cross_entropy" in report.installed, str(report)
    patched = model(IDS, labels=IDS)
    fused = model(input_ids=IDS, labels=IDS, fused_loss=FusedLoss()).loss
    exact = dtype is torch.float32
    torch.testing.assert_close(
        patched.logits, stock.logits, rtol=1e-5 if exact else 2e-2, atol=1e-5
    )
    torch.testing.assert_close(fused, stock.loss, rtol=1e-5 if exact else 2e-3, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(fused, list(model.parameters())), stock_grads, strict=True
    ):
        assert (mine - theirs).norm() <= (1e-5 if exact else 5e-2) * theirs.norm() + 1e-7
    assert not report.fallbacks
    unpatch_model(model)
    assert instance_forwards(model) == []
    assert torch.equal(model(IDS).logits, stock.logits)


def test_installing_twice_is_installing_once() -> None:
    model = tiny_model("llama")
    first = patch_model(model)
    forwards = {
        n: m.__dict__["forward"] for n, m in model.named_modules() if "forward" in m.__dict__
    }
    assert patch_model(model) is first
    assert forwards == {
        n: m.__dict__["forward"] for n, m in model.named_modules() if "forward" in m.__dict__
    }
    unpatch_model(model)
    unpatch_model(model)  # and out twice is out once
    assert instance_forwards(model) == []
    assert patch_model(model).installed
    assert len(first.installed["rms_norm"]) == 5


def test_config_chooses() -> None:
    model = tiny_model("llama")
    report = patch_model(model, {"rms_norm": False})
    assert set(report.installed) == {"linear_cross_entropy"}
    unpatch_model(model)
    report = patch_model(tiny_model("llama"), BarqConfig(linear_cross_entropy=False))
    assert set(report.installed) == {"rms_norm"}


def test_no_class_and_no_random_state_is_touched() -> None:
    model = tiny_model("gemma2")
    classes = {type(m) for m in model.modules()}
    before = {c: dict(vars(c)) for c in classes}
    state = torch.random.get_rng_state()
    patch_model(model)
    unpatch_model(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(dict(vars(c)) == before[c] for c in classes)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_norm_of_another_kind_is_left_alone() -> None:
    config = Olmo2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = Olmo2ForCausalLM(config).bfloat16()  # multiplies in fp32, rounds last
    report = patch_model(model)
    assert "rms_norm" not in report.installed
    assert "Olmo2RMSNorm is another kind of norm: rounds" in str(report)


def test_a_custom_loss_is_left_alone() -> None:
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()
    report = patch_model(model)
    assert "linear_cross_entropy" not in report.installed
    assert "not plain cross-entropy" in str(report)
    assert "lm_head" not in instance_forwards(model)


def test_a_model_someone_else_patched_is_left_alone() -> None:
    model = tiny_model("llama")
    norm = model.model.norm
    norm.forward = lambda x: x
    report = patch_model(model)
    assert "already patched" in str(report)
    assert "model.norm" not in report.installed["rms_norm"]
    root = tiny_model("llama")
    root.forward = root.forward
    assert "already patched" in str(patch_model(root))


def test_use_kernels_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "use_kernels", True)
    assert "use_kernels=True" in str(patch_model(model))


def test_a_model_without_a_head() -> None:
    report = patch_model(tiny_model("llama").model)
    assert "has no LM head" in str(report)
    assert "rms_norm" in report.installed
    assert "not a transformers model" in str(patch_model(nn.Linear(3, 3)))


def test_unusual_calls_fall_back_and_are_counted() -> None:
    model = tiny_model("llama")
    report = patch_model(model)
    norm, x = model.model.norm, torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.equal(norm(x), type(norm).forward(norm, x))
    assert report.fallbacks == {("rms_norm", "not probed, or not equal, for torch.float64"): 1}
    assert "1 calls took the stock forward" in str(report)


def test_a_copy_of_a_patched_model_stands_alone() -> None:
    model = tiny_model("llama")
    patch_model(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fresh = tiny_model("llama")
    assert torch.equal(twin(IDS).logits, fresh(IDS).logits)
    loss = twin(input_ids=IDS, labels=IDS, fused_loss=FusedLoss()).loss
    torch.testing.assert_close(loss, fresh(IDS, labels=IDS).loss)


def test_signature_is_the_stock_one() -> None:
    import inspect

    model: Any = tiny_model("llama")
    stock = inspect.signature(model.forward)
    patch_model(model)
    assert inspect.signature(model.forward) == stock


def test_report_of_nothing() -> None:
    assert "nothing to install" in str(patch_model(nn.ReLU(), {"linear_cross_entropy": False}))


def test_instances_of_one_class_are_told_apart() -> None:
    class Norm(nn.Module):
        def __init__(self, unit_offset: bool) -> None:
            super().__init__()
            self.weight, self.eps, self.unit_offset = (
                nn.Parameter(torch.randn(16)),
                1e-6,
                unit_offset,
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            return (normed * (1.0 + self.weight if self.unit_offset else self.weight)).to(x.dtype)

    model = nn.Sequential(Norm(False), Norm(True))
    x = torch.randn(3, 16)
    stock = model(x)
    assert len(patch_model(model).installed["rms_norm"]) == 2
    torch.testing.assert_close(model(x), stock)


@pytest.mark.parametrize("where", ["root of the mean square", "nowhere"])
def test_epsilon_in_another_place_is_another_norm(where: str) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            root = x.square().mean(-1, keepdim=True).sqrt()
            return self.weight * (x / (root + self.eps if where != "nowhere" else root))

    report = patch_model(nn.Sequential(Norm()))
    assert "rms_norm" not in report.installed and "another kind of norm" in str(report)


def test_a_norm_whose_forward_raises_is_left_alone() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: torch.Tensor, gate: Any = None) -> torch.Tensor:
            return x * gate.to(x.dtype)

    report = patch_model(nn.Sequential(Gated()))
    assert "fails on the probe: AttributeError" in str(report)


def test_fp64_is_left_alone() -> None:
    report = patch_model(tiny_model("llama").double())
    assert not report.installed
    assert "float64" in str(report)


def test_mixture_of_experts_and_its_router_loss() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    report = patch_model(model)
    assert "linear_cross_entropy" in report.installed, str(report)
    inputs = {"input_ids": IDS, "labels": IDS}
    fused = model(**inputs, fused_loss=FusedLoss()).loss
    torch.testing.assert_close(fused, model(**inputs).loss)
    assert head_unsupported(model, inputs) is None
    assert "router" in str(head_unsupported(model, {**inputs, "output_router_logits": True}))
    model.config.output_router_logits = True
    assert "router" in str(head_unsupported(model, inputs))


def test_calls_that_need_the_stock_forward() -> None:
    model = tiny_model("llama")
    inputs: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
    assert "not patched" in str(head_unsupported(model, inputs))
    patch_model(model)
    assert head_unsupported(model, inputs) is None
    for extra in (
        {"labels": None},
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.tensor([0])},
        {"output_hidden_states": True},
        {"output_attentions": True},
    ):
        assert head_unsupported(model, {**inputs, **extra}), extra
    unpatch_model(model)
    assert "unpatched" in str(head_unsupported(model, inputs))


def test_missing_kernels_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from barqtrain_hf.patching import install

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        install, "cuda_unavailable_reason", lambda: "CuPy cannot be imported: pip …"
    )
    model = nn.Sequential(nn.ReLU())
    report = patch_model(model)
    assert "CuPy cannot be imported" in str(patch_model(model)) == str(report)
    assert len(caplog.records) == 1 and "without its CUDA kernels" in caplog.text
