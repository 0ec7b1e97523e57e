"""What a gated MLP's down projection saves: recomputed bit for bit, and only where nobody else decides."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import tiny_model
from side_by_side import batch, run
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from barqtrain_hf import patch_model
from barqtrain_hf.ops import swiglu
from barqtrain_hf.patching import glu, recompute


class Products:
    """Watches the memory of what the op returns."""

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        product = swiglu(*args, **kwargs)
        self.storages.append(StorageWeakRef(product.untyped_storage()))
        return product

    def alive(self) -> list[bool]:
        return [not storage.expired() for storage in self.storages]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    watched = Products()
    monkeypatch.setitem(glu.GATED, "silu", watched)
    gc.disable()  # what is freed must not need the collector
    yield watched
    gc.enable()


class MLP(nn.Module):
    def __init__(self, down: nn.Module | None = None, size: int = 48) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, size), nn.Linear(32, size)
        self.down_proj = down or nn.Linear(size, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(product)


def patched(products: Products, down: nn.Module | None = None) -> MLP:
    mlp = MLP(down)
    report = patch_model(mlp)
    assert report.installed == {"glu": [""]}, str(report)
    products.storages.clear()  # the probe's
    return mlp


def adapted(mlp: MLP, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["down_proj"], **options)
    model = peft.get_peft_model(mlp, config)
    nn.init.normal_(model.base_model.model.down_proj.lora_B["default"].weight)
    return model


CASES = {
    "trained": (torch.float32, False, False),
    "trained, autocast": (torch.float32, True, False),
    "trained, bf16": (torch.bfloat16, False, False),
    "lora": (torch.float32, False, True),
    "lora, autocast": (torch.float32, True, True),
    "lora on bf16, autocast": (torch.bfloat16, True, True),
    "lora in fp32 on bf16": (torch.bfloat16, False, True),  # which casts its input to fp32
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_product_is_not_kept(
    case: str,
    recomputed: bool,
    device: str,
    products: Products,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype, autocast, lora = CASES[case]
    if not recomputed:  # the control: else it is kept
        monkeypatch.setattr(recompute, "applies", lambda *_: False)
    mlp = MLP().to(device, dtype)
    mlp.requires_grad_(not lora)
    model = adapted(mlp) if lora else mlp
    patch_model(mlp)
    products.storages.clear()
    x = torch.randn(2, 7, 32, dtype=dtype, device=device).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = model(x)
    # By PEFT's own forward; our path on a GPU keeps no copy of its input.
    cast = device == "cpu" and (case == "lora in fp32 on bf16" or (lora and autocast))
    assert products.alive() == [not recomputed and not cast]
    y.float().square().sum().backward()
    assert len(products.storages) == 1 + recomputed
    assert not any(products.alive())


def gradients(model: nn.Module, autocast: bool = False, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)
    x = torch.randn(2, 7, 32).to(next(model.parameters()).dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(y.float().square().sum(), trained, **options))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bits(
    case: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, autocast, lora = CASES[case]
    mlp = MLP().to(dtype)
    model = adapted(mlp, lora_dropout=dropout) if lora else mlp
    stock = gradients(model, autocast)
    patch_model(mlp)
    ours = gradients(model, autocast)
    monkeypatch.setattr(recompute, "applies", lambda *_: False)
    kept = gradients(model, autocast)
    assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_frozen_projection_needs_no_hooks(products: Products) -> None:
    mlp = patched(products)
    mlp.down_proj.requires_grad_(False)
    y = mlp(torch.randn(3, 32))
    assert products.alive() == [False]  # it saves its weight only
    y.sum().backward()
    assert len(products.storages) == 1


def test_without_gradients_nothing_is_kept_and_nothing_hooked(
    products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = patched(products)
    monkeypatch.setattr(recompute, "call_without_saving", None)
    with torch.no_grad():
        mlp(torch.randn(3, 32))
    mlp.gate_proj.requires_grad_(False)
    mlp.up_proj.requires_grad_(False)
    mlp(torch.randn(3, 32)).sum().backward()  # nothing holds gate and up: the product is less
    assert not any(products.alive())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_its_say(reentrant: bool, products: Products) -> None:
    mlp = patched(products)
    expected = gradients(mlp)
    calls = len(products.storages)

    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(mlp, x, use_reentrant=reentrant)

    model = Checkpointed()
    model.mlp = mlp
    if reentrant:  # it takes no torch.autograd.grad
        torch.manual_seed(5)
        x = torch.randn(2, 7, 32).requires_grad_()
        model(x).square().sum().backward()
        found = [x.grad, *(p.grad for p in mlp.parameters())]
    else:
        found = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Forward, once more in the backward pass, and there once more for the product if hooks are free.
    assert len(products.storages) - calls == (3 if reentrant else 2)


def test_offloading_keeps_its_say(products: Products) -> None:
    mlp = patched(products)
    expected = gradients(mlp)
    calls = len(products.storages)
    with save_on_cpu():
        found = gradients(mlp)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(products.storages) - calls == 1  # it was saved, by offloading


def test_where_hooks_are_forbidden(products: Products) -> None:
    mlp = patched(products)
    expected = gradients(mlp)
    with disable_saved_tensors_hooks("not here"):
        found = gradients(mlp)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_backward_twice_and_of_a_backward(products: Products) -> None:
    mlp, stock = patched(products), MLP()
    stock.load_state_dict(mlp.state_dict())
    x = torch.randn(4, 32).requires_grad_()
    y, expected = mlp(x), stock(x)
    for _ in range(2):
        (once,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        torch.testing.assert_close(
            once, torch.autograd.grad(expected.sum(), x, retain_graph=True)[0]
        )
    results = []
    for model, out in ((mlp, y), (stock, expected)):
        first = torch.autograd.grad(out.square().sum(), model.down_proj.weight, create_graph=True)
        results.append(torch.autograd.grad(first[0].square().sum(), list(model.parameters())))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


class InPlace(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2.0))


class SavesItsOutput(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh().exp()


class Transposes(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x.flatten(0, -2).t()).t().view(*x.shape[:-1], -1)


class TakesHalf(nn.Linear):
    """Saves a part of the product, which the recipe does not give."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :24] @ self.weight[:, :24].t() + x[..., 24:] @ self.weight[:, 24:].t()


@pytest.mark.parametrize("layer", [InPlace, SavesItsOutput, Transposes, TakesHalf])
def test_odd_projections(layer: type[nn.Linear], products: Products) -> None:
    mlp = MLP(layer(48, 32, bias=False))
    stock = gradients(mlp)
    report = patch_model(mlp)
    assert report.installed == {"glu": [""]}, str(report)
    for mine, theirs in zip(gradients(mlp), stock, strict=True):
        torch.testing.assert_close(mine, theirs)
    # A graph that is never run backward goes with its output.
    products.storages.clear()
    y = mlp(torch.randn(2, 7, 32))
    inputs = [StorageWeakRef(t.untyped_storage()) for t in y.grad_fn.metadata.values()]
    del y
    assert not any(products.alive()) and inputs == []


def test_gate_and_up_go_with_the_graph(products: Products) -> None:
    mlp = patched(products, SavesItsOutput(48, 32))
    storages = []
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.register_forward_hook(
            lambda module, args, output: storages.append(StorageWeakRef(output.untyped_storage()))
        )
    y = mlp(torch.randn(2, 7, 32))
    assert [storage.expired() for storage in storages] == [False, False]
    y.sum().backward()
    assert [storage.expired() for storage in storages] == [True, True]
    y = mlp(torch.randn(2, 7, 32))
    del y
    assert [storage.expired() for storage in storages] == [True] * 4


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_torch_compile_sees_no_hooks(family: str) -> None:
    model = tiny_model(family)
    inputs = {**batch(), "use_cache": False}
    expected = run(model, inputs)
    report = patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(outputs.loss, list(model.parameters()))
    for mine, theirs in zip(found, expected.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not report.fallbacks


@pytest.mark.parametrize("what", ["weight", "gate"])
def test_a_tensor_written_to_before_the_backward_pass(what: str, products: Products) -> None:
    mlp = patched(products)
    gates: list[torch.Tensor] = []
    mlp.gate_proj.register_forward_hook(lambda module, args, output: gates.append(output))
    y = mlp(torch.randn(4, 32))
    with torch.no_grad():
        (mlp.down_proj.weight if what == "weight" else gates[0].detach()).add_(1.0)
    wanted = mlp.up_proj.weight if what == "weight" else mlp.down_proj.weight
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*expected version"):
        torch.autograd.grad(y.sum(), wanted)


class Pair(nn.Module):
    """Saves a cast of the product."""

    def __init__(self, before: Any = None, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8, device=device, dtype=torch.bfloat16))
        self.before = before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.before:
            self.before(x)
        return x.to(self.weight) @ self.weight


@pytest.mark.parametrize("case", ["plain", "another device", "written to", "transposed"])
def test_which_casts_are_recomputed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    stock = recompute._Recipe

    def counted(*args: Any) -> Any:
        made.append(stock(*args))
        return made[-1]

    monkeypatch.setattr(recompute, "_Recipe", counted)
    gate, up = (torch.randn(8, 8).requires_grad_() for _ in range(2))
    op: Any = (lambda *parts: swiglu(*parts).t()) if case == "transposed" else swiglu
    layer = Pair(device="meta" if case == "another device" else "cpu")
    if case == "written to":
        layer.before = lambda x: x.detach().add_(1.0)
    recompute.call_without_saving(layer, op(gate, up), op, [gate, up])
    assert len(made) == (case == "plain")
