"""Gated MLPs, experts and activations: found whatever they are called, left alone where they differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import counts, tiny_model
from side_by_side import assert_equal, assert_no_trace, batch, bound, run
from torch import nn
from transformers.activations import ACT2FN

from barqtrain_hf import patch_model, unpatch_model
from barqtrain_hf.patching import glu


class Gated(nn.Module):
    """A gated MLP with names, sizes and a last step that are given."""

    def __init__(
        self,
        activation: Any = F.silu,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        sizes: tuple[int, int] = (32, 48),
        up_first: bool = False,
        last_step: Any = None,
        middle: Any = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.names, self.up_first, self.bias = names, up_first, bias
        for name in names[:2]:
            self.add_module(name, nn.Linear(*sizes, bias=bias))
        self.add_module(names[2], nn.Linear(*reversed(sizes), bias=bias))
        self.activation, self.last_step, self.middle = activation, last_step, middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_proj, up_proj, down_proj = (getattr(self, name) for name in self.names)
        if self.up_first:
            up = up_proj(x)
            gate = gate_proj(x)
        else:
            gate, up = gate_proj(x), up_proj(x)
        product = self.activation(gate) * up
        y = down_proj(self.middle(product) if self.middle else product)
        return self.last_step(y) if self.last_step else y


class Fused(nn.Module):
    """Gate and up in one projection, in a given order."""

    def __init__(self, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_first = gate_first
        self.w_in, self.w_out = nn.Linear(32, 96), nn.Linear(48, 32)
        self.dropout = nn.Dropout(0.0)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.w_in(x).chunk(2, dim=-1)
        if not self.gate_first:
            first, second = second, first
        return self.w_out(self.dropout(second * self.act(first)))


def outcome(mlp: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients, with the same dropout every time."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = mlp(x)
    trained = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), trained)]


def assert_taken(mlp: nn.Module, where: tuple[str, ...] = ("",)) -> None:
    x = torch.randn(2, 5, 32)
    stock = outcome(mlp, x)
    report = patch_model(mlp)
    assert report.installed.get("glu") == list(where), str(report)
    for mine, theirs in zip(outcome(mlp, x), stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not report.fallbacks
    unpatch_model(mlp)
    assert bound(mlp) == [] and torch.equal(outcome(mlp, x)[0], stock[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": F.gelu},
        {"activation": nn.GELU(approximate="tanh")},
        {"activation": ACT2FN["gelu_new"]},
        {"names": ("w1", "w3", "w2")},
        {"names": ("linear_v", "linear_1", "out")},
        {"up_first": True},
        {"sizes": (32, 32), "names": ("b", "c", "a")},
        {"sizes": (32, 32), "names": ("c", "a", "b"), "up_first": True, "activation": F.gelu},
        {"bias": True},
        {"last_step": nn.Identity()},
        {"middle": nn.Dropout(0.0)},
    ],
    ids=str,
)
def test_gated_mlps(options: dict[str, Any]) -> None:
    assert_taken(Gated(**options))


def test_gate_and_up_in_one_projection() -> None:
    assert_taken(Fused())
    report = patch_model(Fused(gate_first=False))
    assert report.installed == {"glu": ["act"]}  # its GELU still is one
    assert "Fused: what w_out gets is no SwiGLU or GeGLU" in str(report)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"activation": F.relu}, "no SwiGLU or GeGLU"),
        ({"activation": lambda x: x * torch.sigmoid(1.702 * x)}, "no SwiGLU or GeGLU"),
        ({"activation": lambda x: F.silu(x.clamp(max=7.0))}, "no SwiGLU or GeGLU"),
        ({"middle": lambda x: x.clamp(-20.0, 20.0)}, "no SwiGLU or GeGLU"),
        ({"middle": nn.Dropout(0.1)}, "no SwiGLU or GeGLU"),
        ({"last_step": lambda y: 2.0 * y}, "does not return what down_proj returns"),
        ({"last_step": nn.Dropout(0.1)}, "does not return what down_proj returns"),
        ({"last_step": lambda y: (y, None)}, "does not return what down_proj returns"),
        ({"last_step": lambda y: y.no_such_method()}, "fails on the probe: AttributeError"),
    ],
    ids=[
        "relu",
        "scaled sigmoid",
        "clamped silu",
        "clamped product",
        "dropout of the product",
        "doubled",
        "dropout at the end",
        "a tuple",
        "an error",
    ],
)
def test_other_mlps_are_left_alone(options: dict[str, Any], why: str) -> None:
    mlp = Gated(**options)
    names = dict(mlp.named_modules())
    state = torch.random.get_rng_state()
    report = patch_model(mlp)
    assert "glu" not in report.installed and why in str(report), str(report)
    assert dict(mlp.named_modules()) == names  # the projections are back
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("where", ["middle", "last_step"])
def test_a_dropout_is_seen_in_evaluation_too(where: str) -> None:
    mlp = Gated(**{where: nn.Dropout(0.5)}).eval()
    assert "glu" not in patch_model(mlp).installed
    assert not any(module.training for module in mlp.modules())


def test_projections_with_another_input_are_seen() -> None:
    class Shifted(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(F.silu(self.gate_proj(x + 1)) * self.up_proj(x))

    assert "not all called with its input" in str(patch_model(Shifted()))


def test_hooks_of_the_projections_fire() -> None:
    mlp = Gated()
    patch_model(mlp)
    seen: list[str] = []
    for name, projection in mlp.named_children():
        projection.register_forward_hook(lambda *_, name=name: seen.append(name))
        projection.register_full_backward_hook(lambda *_, name=name: seen.append(name))
    mlp(torch.randn(3, 32)).sum().backward()
    assert seen[:3] == ["gate_proj", "up_proj", "down_proj"]
    assert sorted(seen[3:]) == sorted(seen[:3])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora(family: str, dropout: float, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    targets = {"phi3": ["gate_up_proj", "down_proj"], "gpt2": ["c_fc", "c_proj"]}
    names = targets.get(family, ["gate_proj", "up_proj", "down_proj", "q_proj"])
    config = peft.LoraConfig(r=4, target_modules=names, lora_dropout=dropout)
    model = peft.get_peft_model(tiny_model(family, dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    runs = []
    for patched in (False, True):
        # The probe ran in fp32 too: only what adds up differently in 16 bits may differ.
        report = patch_model(model, {"rope": False, "rms_norm": False}) if patched else None
        torch.manual_seed(11)  # of the dropout
        runs.append(run(model, batch()))
    assert report is not None and counts(report)["glu"] == 2
    assert not any(op == "glu" for op, _ in report.fallbacks)  # LoRA's dropout is PEFT's
    if dtype is torch.float32 or family != "gpt2":
        assert_equal(runs[1], runs[0])
    else:  # gelu_new rounds after every step
        torch.testing.assert_close(runs[1].loss, runs[0].loss, rtol=2e-3, atol=0.0)
    assert_no_trace(model.get_base_model())


def test_unusual_calls_take_the_stock_forward() -> None:
    mlp, x = Gated(), torch.randn(3, 32)
    stock = mlp(x=x), copy.deepcopy(mlp).double()(x.double())
    report = patch_model(mlp)
    torch.testing.assert_close(mlp(x=x), stock[0])
    torch.testing.assert_close(mlp.double()(x.double()), stock[1])
    reasons = [reason for _, reason in report.fallbacks]
    assert reasons == [
        "called with keyword arguments",
        "not probed, or not equal, for torch.float64",
    ]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts(implementation: str) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    stock = run(model, batch())
    report = patch_model(model)
    experts = model.model.layers[0].mlp.experts
    assert ("_apply_gate" in experts.__dict__) == (implementation != "eager")
    if implementation == "eager":
        assert "the eager implementation of its experts does not call _apply_gate" in str(report)
        assert "glu" not in report.installed
    else:
        assert counts(report)["glu"] == 2
    assert_equal(run(model, batch()), stock)
    assert not report.fallbacks
    assert_no_trace(model)


def test_experts_with_another_gate() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    report = patch_model(GptOssForCausalLM(config))
    assert "its gate is no SwiGLU or GeGLU" in str(report)
    assert "glu" not in report.installed


def test_the_gate_of_experts_falls_back_in_fp64() -> None:
    model = tiny_model("mixtral")
    report = patch_model(model)
    experts, x = model.model.layers[0].mlp.experts, torch.randn(5, 96, dtype=torch.float64)
    assert torch.equal(experts._apply_gate(x), type(experts)._apply_gate(experts, x))
    assert [op for op, _ in report.fallbacks] == ["glu"]


GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_accurate")


@pytest.mark.parametrize("name", [*GELUS, "gelu_10", "quick_gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations(name: str, dtype: torch.dtype) -> None:
    mlp = nn.Sequential(nn.Linear(32, 64), ACT2FN[name], nn.Linear(64, 32)).to(dtype)
    x = (3.0 * torch.randn(400, 64)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    results = []
    for step in ("stock", "ours"):
        if step == "ours":
            report = patch_model(mlp)
        y = mlp[1](x)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    truth = type(mlp[1]).forward(mlp[1], wide)
    oracle = (truth, *torch.autograd.grad(truth.sum(), wide))
    assert counts(report) == ({"glu": 1} if name in GELUS else {}), str(report)
    if name not in GELUS:
        assert "is not a GELU" in str(report)
    for stock, ours, exact in zip(*results, oracle, strict=True):
        error, allowed = (ours - exact).norm(), 1.25 * (stock - exact).norm()
        assert error <= max(allowed, 1e-6 * exact.norm())
    assert not report.fallbacks


def test_instances_of_one_activation_class_are_told_apart() -> None:
    class MyGELU(nn.Module):
        def __init__(self, approximate: str) -> None:
            super().__init__()
            self.approximate = approximate

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gelu(x, approximate=self.approximate)

    for approximate in ("none", "tanh", "none"):
        mlp = nn.Sequential(nn.Linear(8, 8), MyGELU(approximate))
        patch_model(mlp)
        x = torch.linspace(-4, 4, 100)
        torch.testing.assert_close(mlp[1](x), F.gelu(x, approximate=approximate))


def test_an_activation_inside_a_gated_mlp_is_not_counted_twice() -> None:
    report = patch_model(tiny_model("gemma2"))
    assert all(name.endswith("mlp") for name in report.installed["glu"])
    assert not any(op == "glu" for op, _ in report.skipped)


def test_a_mlp_of_another_kind_is_named() -> None:
    class ThreeLayerMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    report = patch_model(nn.Sequential(ThreeLayerMLP()), {"linear_cross_entropy": False})
    assert list(report.skipped.values()) == [["0"]]
    assert "no gate, up and down projections of fitting sizes" in str(report)


def test_attention_of_fitting_sizes_is_no_mlp() -> None:
    report = patch_model(tiny_model("phi3"))  # its qkv_proj is twice as wide as its o_proj
    assert not any(op == "glu" for op, _ in report.skipped), str(report)


def test_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        mlp = Gated()
    assert "not on a device yet" in str(patch_model(mlp))
    empty = Gated(bias=True)  # as under ZeRO-3
    for parameter in empty.parameters():
        parameter.data = parameter.data.new_empty(0)
    assert counts(patch_model(empty)) == {"glu": 1}


def test_the_probe_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    stock_probe = glu._probe
    monkeypatch.setattr(glu, "_probe", lambda *args: (made.append(1), stock_probe(*args))[1])
    patch_model(nn.Sequential(*(Gated(sizes=(24, 40)) for _ in range(4))))
    assert len(made) == 1
