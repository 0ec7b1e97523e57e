"""Norms: which are found, which op each gets, and what the report says of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import counts, tiny_model
from torch import nn

from barqtrain_hf import patch_model, unpatch_model
from barqtrain_hf.patching import glu, norms, probe, rope


def reference(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


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


class Scaled(nn.Module):
    """RMSNorm whose last step is given."""

    def __init__(self, last_step: Any, size: int = 48) -> None:
        super().__init__()
        self.weight, self.eps, self.last_step = nn.Parameter(torch.randn(size)), 1e-5, last_step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_step(reference(x, self.eps), self.weight, x.dtype)


ORDERS = {
    "llama": lambda normed, weight, dtype: weight * normed.to(dtype),
    "gemma": lambda normed, weight, dtype: (normed * (1.0 + weight.float())).to(dtype),
    "olmo2": lambda normed, weight, dtype: (weight * normed).to(dtype),
}


# No regime of training has both 16-bit types.
PAIRS = [(x, w) for x in probe.DTYPES for w in probe.DTYPES if x is w or torch.float32 in (x, w)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
def test_orders_of_rounding(order: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    norm = Scaled(ORDERS[order]).to(weight_dtype)
    x = torch.randn(500, 48).to(dtype)
    stock = norm(x)
    report = patch_model(norm)
    assert counts(report) == {"rms_norm": 1}, str(report)
    ours = norm(x)
    assert ours.dtype is stock.dtype and not report.fallbacks
    assert (ours != stock).float().mean() < (0.01 if stock.dtype is not torch.float32 else 1.0)
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize(
    ("last_step", "why"),
    [
        (lambda normed, weight, dtype: normed.to(dtype) * 2.0 * weight, "differs"),
        (lambda normed, weight, dtype: (normed.to(dtype) + 1e-2) * weight, "differs"),
        (lambda normed, weight, dtype: F.silu(normed) * weight, "differs"),
        (lambda normed, weight, dtype: normed[:, :3], "does not return one tensor of the input's"),
    ],
    ids=["twice", "shifted", "gated", "shortened"],
)
def test_other_norms_are_left_alone(last_step: Any, why: str) -> None:
    report = patch_model(nn.Sequential(Scaled(last_step)))
    assert counts(report) == {}
    assert why in str(report) or "rounds" in str(report)


class Centred(nn.Module):
    """LayerNorm by hand, as Cohere writes it: in fp32, rounded once."""

    def __init__(self, round_first: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(48)), 1e-5
        self.round_first = round_first

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        if self.round_first:
            return self.weight * x.to(hidden_states.dtype)
        return (self.weight.float() * x).to(hidden_states.dtype)


@pytest.mark.parametrize("dtype", probe.DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(48),
        lambda: nn.LayerNorm(48, bias=False),
        lambda: nn.LayerNorm(48, eps=1e-2),
        lambda: Centred(False),
    ],
    ids=["LayerNorm", "without bias", "large epsilon", "by hand"],
)
def test_layer_norms(make: Any, dtype: torch.dtype) -> None:
    norm = make().to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = (3.0 + torch.randn(300, 48)).to(dtype).requires_grad_()
    stock = norm(x)
    leaves = [x, *norm.parameters()]
    dy = torch.randn_like(stock)
    stock_grads = torch.autograd.grad(stock, leaves, dy)
    report = patch_model(norm)
    assert counts(report) == {"layer_norm": 1}, str(report)
    ours = norm(x)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {}
    torch.testing.assert_close(ours, stock, **tolerance)
    for mine, theirs in zip(torch.autograd.grad(ours, leaves, dy), stock_grads, strict=True):
        # On a CPU PyTorch sums the gradient of a bf16 weight in bf16.
        assert (mine - theirs).norm() <= 3e-2 * theirs.norm()
    assert not report.fallbacks
    unpatch_model(norm)
    assert torch.equal(norm(x), stock)


def test_a_layer_norm_that_rounds_first_is_none_of_ours_in_16_bits() -> None:
    norm = Centred(True)
    assert counts(patch_model(norm)) == {"layer_norm": 1}  # in fp32 there is nothing to round
    norm = Centred(True).bfloat16()
    report = patch_model(norm)
    assert "another kind of norm: rounds" in str(report)


@pytest.mark.parametrize("by_hand", [False, True])
def test_autocast_decides_the_dtype_of_some(by_hand: bool) -> None:
    """CUDA's autocast has F.layer_norm compute and return fp32, and leaves norms written by hand alone.
    Acted out, as the CPU's does neither.
    """

    class UnderAutocast(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if by_hand or not torch.is_autocast_enabled("cpu"):
                return super().forward(x)
            parameters = [p.float() for p in (self.weight, self.bias)]
            return F.layer_norm(x.float(), self.normalized_shape, *parameters, self.eps)

    norm, x = UnderAutocast(48), torch.randn(20, 48).bfloat16()
    report = patch_model(norm)
    for autocast in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, stock = norm(x), type(norm).forward(norm, x)
        assert ours.dtype is stock.dtype
        assert (ours.dtype is torch.float32) == (autocast and not by_hand)
        torch.testing.assert_close(
            ours, stock, rtol=1e-5 if autocast and not by_hand else 1e-2, atol=1e-5
        )
    assert not report.fallbacks


def test_what_only_looks_like_a_norm_is_named() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return reference(x, self.eps)

    Unit.__name__ = "UnitRMSNorm"
    model = nn.ModuleDict(
        {
            "unit": Unit(),
            "plain": nn.LayerNorm(16, elementwise_affine=False),
            "heads": nn.LayerNorm((2, 8)),
            "batch": nn.BatchNorm1d(16),
            "groups": nn.GroupNorm(4, 16),
            "one group": nn.GroupNorm(1, 16),
            "good": nn.LayerNorm(16),
        }
    )
    before = model["batch"].running_mean.clone()
    report = patch_model(model, {"linear_cross_entropy": False})
    assert report.installed == {"layer_norm": ["good"]}
    reasons = {name: why for (_, why), names in report.skipped.items() for name in names}
    assert reasons["unit"] == reasons["plain"] == "it has no weight"
    assert reasons["heads"] == "its weight has more than one dimension"
    assert "buffers" in reasons["batch"]
    # To three dimensions, of which the second counts the groups' channels.
    assert reasons["groups"] == reasons["one group"]
    assert "fails on the probe: RuntimeError" in reasons["groups"]
    assert torch.equal(model["batch"].running_mean, before)
    assert {op for op, _ in report.skipped} == {"rms_norm", "layer_norm"}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda norm, x: norm(x=x), "called with keyword arguments"),
        (lambda norm, x: norm(x[:, :1]), "input and weight differ in size"),
        (lambda norm, x: norm(x.double()), "torch.float64"),
        (lambda norm, x: norm(nn.Parameter(x)), "called with Parameter"),
    ],
    ids=["by keyword", "of another size", "fp64", "a parameter"],
)
def test_unusual_calls(call: Any, why: str) -> None:
    class Norm(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    norm, x = Norm(ORDERS["llama"]), torch.randn(4, 48)
    stock = call(norm, x)
    report = patch_model(norm)
    torch.testing.assert_close(call(norm, x), stock)
    ((op, reason),) = report.fallbacks
    assert op == "rms_norm" and why in reason


def test_the_probe_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    stock_probe = norms._probe

    def counted(module: nn.Module, *args: Any) -> Any:
        made.append(module)
        return stock_probe(module, *args)

    monkeypatch.setattr(norms, "_probe", counted)
    patch_model(nn.Sequential(*(nn.LayerNorm(17) for _ in range(5))))
    assert len(made) == 6 and len(set(made)) == 1  # three dtypes, with autocast and without


def test_weights_stay_where_they_are_in_a_probe() -> None:
    norm = nn.LayerNorm(33)
    before = dict(norm.named_parameters())
    patch_model(norm)
    assert all(value is before[name] for name, value in norm.named_parameters())
    assert not any(parameter.grad is not None for parameter in norm.parameters())


def test_weight_and_bias_of_two_dtypes() -> None:
    norm = nn.LayerNorm(16)
    norm.bias.data = norm.bias.data.bfloat16()
    assert "differ in dtype" in str(patch_model(norm))


def test_autocast_on_a_device_that_was_not_probed() -> None:
    """A model that moves after it is patched: what autocast does there is not known. Acted out."""
    norm, x = nn.LayerNorm(16), torch.randn(3, 16)
    report = patch_model(norm)
    forward = norm.__dict__["forward"].__func__
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
    cells["device"].cell_contents = "cuda"
    norm(x)
    assert not report.fallbacks
    with torch.autocast("cpu", torch.bfloat16):
        norm(x)
    assert report.fallbacks.total() == 1


def test_a_fp64_norm_is_left_alone() -> None:
    report = patch_model(nn.Sequential(nn.LayerNorm(16).double()))
    assert not report.installed and "float64" in str(report)


def test_guard_reads_the_epsilon_at_each_call() -> None:
    norm, x = nn.LayerNorm(16), torch.randn(5, 16)
    patch_model(norm)
    norm.eps = 0.5
    torch.testing.assert_close(norm(x), type(norm).forward(norm, x))


def test_a_norm_probed_on_a_cpu_falls_back_under_autocast_of_cuda() -> None:
    """F.rms_norm returns fp32 there, which a CPU does not show."""
    norm = nn.RMSNorm(16, eps=1e-6).bfloat16()
    patch_model(norm)
    forward = norm.__dict__["forward"].__func__
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
    assert cells["device"].cell_contents == "cpu"
    assert cells["autocast_calls"].cell_contents is not None


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_with_and_without_bias_are_told_apart(order: tuple[bool, bool]) -> None:
    x = torch.randn(4, 19)
    for bias in order:
        norm = nn.LayerNorm(19, bias=bias)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        stock = norm(x)
        patch_model(norm)
        torch.testing.assert_close(norm(x), stock)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_failure_is_forgotten(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error("out of memory")

    model = tiny_model("llama")
    for kind in (norms, glu, rope):
        monkeypatch.setattr(kind, "_probed", {})
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", fail)
        report = patch_model(model, {"linear_cross_entropy": False})
        assert not report.installed and "fails on the probe" in str(report)
    report = patch_model(tiny_model("llama"), {"linear_cross_entropy": False})
    assert set(report.installed) == {"rms_norm", "glu", "rope"}, str(report)
