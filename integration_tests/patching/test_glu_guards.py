"""Gated MLPs and activations: what their probes look at, and what the calls do that they did not cover."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_glu_in_models import Gated, assert_taken
from torch import nn

from barqtrain_hf import patch_model
from barqtrain_hf.patching import glu


class Buffered(nn.Module):
    """A quantised projection: it has no parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.packed)


def test_projections_without_parameters() -> None:
    mlp = Gated()
    for name, projection in list(mlp.named_children()):
        setattr(mlp, name, Buffered(projection))
    assert_taken(mlp)

    class Nothing(Buffered):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear)
            del self._buffers["packed"]

    for name, projection in list(mlp.named_children()):
        setattr(mlp, name, Nothing(nn.Linear(projection.in_features, projection.out_features)))
    assert "its device is not known" in str(patch_model(mlp))


class ClipsHalf(Gated):
    """In fp16 it is another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.up_proj(x), self.gate_proj(x)
        product = F.silu(gate) * up
        if product.dtype is torch.float16:
            product = product.clamp(-0.01, 0.01)
        return self.down_proj(product)


class ToHalf(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).half()


@pytest.mark.parametrize("how", ["weights", "autocast", "projections"])
def test_a_refused_dtype_takes_the_stock_forward(how: str) -> None:
    mlp, x = ClipsHalf(), torch.randn(5, 32)
    calls: list[str] = []
    if how == "weights":
        mlp, x = mlp.half(), x.half()
    if how == "projections":
        mlp.gate_proj, mlp.up_proj = ToHalf(32, 48), ToHalf(32, 48)
        mlp.down_proj.half()
    with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
        stock = mlp(x)
        report = patch_model(mlp)
        for name, projection in mlp.named_children():
            projection.register_forward_hook(lambda *_, name=name: calls.append(name))
        assert torch.equal(mlp(x), stock)
    assert sorted(calls) == ["down_proj", "gate_proj", "up_proj"]  # each once
    assert list(report.fallbacks) == [("glu", "not probed, or not equal, for torch.float16")]
    assert type(mlp.gate_proj) is not glu._Given


class Configured(Gated):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        limit = self.config if isinstance(self.config, (list, tuple)) else self.config.limit
        gate = self.gate_proj(x).clamp(*limit)
        return self.down_proj(F.silu(gate) * self.up_proj(x))


class Config:
    def __init__(self, *limit: float) -> None:
        self.limit = limit


@pytest.mark.parametrize("make", [Config, lambda *limit: limit, lambda *limit: list(limit)])
def test_what_instances_are_configured_with_is_looked_at(make: Any) -> None:
    for bound_, taken in ((1e4, True), (0.5, False), (1e4, True)):
        report = patch_model(Configured(make(-bound_, bound_)))
        assert ("glu" in report.installed) == taken, str(report)


def test_layers_of_one_config_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    stock_probe = glu._probe
    monkeypatch.setattr(glu, "_probe", lambda *args: (made.append(1), stock_probe(*args))[1])
    config = Config(-1e4, 1e4)
    patch_model(nn.Sequential(*(Configured(config) for _ in range(3))))
    assert len(made) == 1


def test_buffers_and_modes_are_looked_at() -> None:
    class Modal(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.gate_proj(x)
            gate = gate if self.training else gate.clamp(max=0.5)
            return self.down_proj(F.silu(gate) * self.up_proj(x))

    for training in (True, False):
        assert "no SwiGLU" in str(report := patch_model(Modal().train(training))) or (
            "output 0 is" in str(report)
        )
        assert "glu" not in report.installed
    mlp = Gated()
    mlp.register_buffer("limit", torch.tensor(1e4))
    assert "it has buffers" in str(patch_model(mlp))


def test_an_activation_that_layers_share() -> None:
    gelu = nn.GELU()
    layers = [nn.Sequential(nn.Linear(8, 8), gelu) for _ in range(2)]
    report = patch_model(nn.Sequential(*layers), {"linear_cross_entropy": False})
    assert report.installed == {"glu": ["0.1"]} and not report.skipped, str(report)
    other = patch_model(nn.Sequential(nn.Linear(8, 8), gelu), {"linear_cross_entropy": False})
    assert "already patched (with another model)" in str(other)
