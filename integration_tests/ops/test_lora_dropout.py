"""lora_linear with dropout against a plain composition under the same masks, on a CPU by the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from norm_cases import DTYPES, as_double, run
from oracle import assert_as_accurate
from test_lora import DEVICES, PLACES, SCALING, inputs
from torch.utils.checkpoint import checkpoint

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.ops import LoraLinear, lora_linear, lora_linears
from barqtrain_hf.ops import lora as lora_op
from barqtrain_hf.ops._dropout import Masks, random_words

SEED = 11
# The first, the last, none between, and all of the layers of one input with dropout.
DROPOUTS = [(0.3,), (0.3, 0.0), (0.0, 0.5), (0.05, 0.0, 0.6), (0.2, 0.2, 0.2)]
SIZES = ((64, 4), (24, 16), (40, 1))  # dimensions out, and rank


def draw(number: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x, and of each layer weight, bias, A, B and the upstream gradient."""
    x = inputs((6, 5), 48, 64, 4, dtype, device)[0]
    each = [inputs((6, 5), 48, *sizes, dtype, device)[1:] for sizes in SIZES[:number]]
    return [x, *itertools.chain(*each)]


def seeded(function: Any) -> Any:
    """With the same random numbers in every call, and those around it as if it had drawn none."""

    def call(*arguments: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return function(*arguments)

    return call


def fused(dropouts: tuple[float, ...]) -> Any:
    @seeded
    def call(x: Any, *layers: Any) -> Any:
        linears = [
            LoraLinear(w, a, b, SCALING, bias, p)
            for (w, bias, a, b), p in zip(layers, dropouts, strict=True)
        ]
        return lora_op.apply(x, linears, x.dtype)

    return call


def composed(dropouts: tuple[float, ...]) -> Any:
    """Step by step, of a mask that is kept."""

    @seeded
    def call(x: Any, *layers: Any) -> Any:
        seed = torch.empty(1, dtype=torch.int64, device=x.device).random_()
        ys = []
        for i, ((w, bias, a, b), p) in enumerate(zip(layers, dropouts, strict=True)):
            dropped = x
            if p:
                kept = random_words(0, x.numel(), seed, i).view(x.shape) >= p * 2**32
                dropped = torch.where(kept, x * (1.0 / (1.0 - p)), 0.0)
            low = dropped @ a.to(x.dtype).T @ b.to(x.dtype).T
            ys.append(torch.nn.functional.linear(x, w, bias) + SCALING * low)
        return tuple(ys)

    return call


def graded(function: Any) -> Any:
    """Outputs and the gradients of x, every A and every B."""

    def call(x: Any, *tensors: Any) -> list[torch.Tensor]:
        weights, biases, a, b, upstream = (tensors[i::5] for i in range(5))
        number = len(a)

        def layers(x: Any, *adapters: Any) -> Any:
            pairs = (adapters[:number], adapters[number:])
            return function(x, *zip(weights, biases, *pairs, strict=True))

        return run(layers, x, *a, *b, upstream=upstream)

    return call


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("dropouts", DROPOUTS, ids=str)
def test_as_accurate_as_stock(dropouts: tuple[float, ...], dtype: torch.dtype, device: str) -> None:
    stock = graded(composed(dropouts))
    assert_as_accurate(
        lambda: draw(len(dropouts), dtype, device),
        graded(fused(dropouts)),
        stock,
        lambda *tensors: stock(*as_double(tensors)),
    )


@pytest.mark.parametrize("dropouts", DROPOUTS, ids=str)
def test_in_fp32_it_is_the_composition(dropouts: tuple[float, ...]) -> None:
    tensors = draw(len(dropouts), torch.float32, "cpu")
    truth = graded(composed(dropouts))(*as_double(tensors))
    for mine, expected in zip(graded(fused(dropouts))(*tensors), truth, strict=True):
        assert (mine - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_fp32_adapters_and_inputs_under_autocast(device: str) -> None:
    @seeded
    def ours(x: Any, *layers: Any) -> Any:
        ((w, bias, a, b),) = layers
        return lora_op.apply(x, [LoraLinear(w, a, b, SCALING, bias, 0.3)], torch.bfloat16)

    def stock(*tensors: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return composed((0.3,))(*tensors)

    assert_as_accurate(
        lambda: draw(1, torch.float32, device),
        graded(ours),
        graded(stock),
        lambda *tensors: graded(composed((0.3,)))(*as_double(tensors)),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_dropout_nothing_is_drawn_and_nothing_has_changed(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a layer that has it others still have the same result, up to the order of their sums."""
    tensors = draw(2, dtype, device)
    together = graded(fused((0.0, 0.5)))(*tensors)
    monkeypatch.setattr(Masks, "draw", None)
    first = graded(fused((0.0, 0.0)))(*tensors)
    for i in (0, 3, 5):  # y, dA and dB of the first
        torch.testing.assert_close(together[i], first[i])
    x, w, bias, a, b, _ = tensors[:6]
    implied = lora_op.apply(x, [LoraLinear(w, a, b, SCALING, bias)], dtype)[0]
    assert torch.equal(
        implied, lora_op.apply(x, [LoraLinear(w, a, b, SCALING, bias, 0.0)], dtype)[0]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_kept_of_a_mask_but_its_seed(device: str) -> None:
    x, w, bias, a, b, _ = inputs((64,), 48, 80, 8, torch.bfloat16, device)
    kept: dict[float, list[int]] = {}
    for p in (0.0, 0.4):
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lora_op.apply(x.requires_grad_(), [LoraLinear(w, a, b, SCALING, bias, p)], x.dtype)
        kept[p] = sorted(saved.values())
    assert kept[0.4] == [1, *kept[0.0]]


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_under_one_seed_and_takes_views(device: str) -> None:
    tensors = draw(2, torch.bfloat16, device)
    function = graded(fused((0.3, 0.5)))
    first = function(*tensors)
    assert all(map(torch.equal, function(*tensors), first))
    x, *rest = tensors
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    for mine, expected in zip(function(strided, *rest), first, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_drops_the_same_elements(reentrant: bool, device: str) -> None:
    tensors = draw(3, torch.float32, device)
    function = fused((0.3, 0.0, 0.5))

    def again(x: Any, *layers: Any) -> Any:
        flat = list(itertools.chain(*layers))

        def inner(x: Any, *flat: Any) -> Any:
            function = (0.3, 0.0, 0.5)
            linears = [
                LoraLinear(*(flat[i], flat[i + 2], flat[i + 3]), SCALING, flat[i + 1], p)
                for i, p in zip(range(0, 12, 4), function, strict=True)
            ]
            return lora_op.apply(x, linears, x.dtype)

        torch.manual_seed(SEED)
        ys = checkpoint(inner, x, *flat, use_reentrant=reentrant)
        torch.manual_seed(99)  # whatever came in between
        return ys

    def by_backward(function: Any) -> list[torch.Tensor]:
        x, *rest = (
            t.detach().clone().requires_grad_(i % 5 in (0, 3, 4)) for i, t in enumerate(tensors)
        )
        weights, biases, a, b, upstream = (rest[i::5] for i in range(5))
        ys = function(x, *zip(weights, biases, a, b, strict=True))
        torch.autograd.backward(ys, [g.detach() for g in upstream])
        return [*ys, x.grad, *(t.grad for t in (*a, *b))]

    for mine, expected in zip(by_backward(again), by_backward(function), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropouts", [(0.3,), (0.3, 0.0)], ids=str)
def test_second_derivative_is_of_the_same_mask(dropouts: tuple[float, ...], device: str) -> None:
    x, *rest = draw(len(dropouts), torch.float32, device)
    weights, biases, a, b, _ = (rest[i::5] for i in range(5))
    results = []
    for function in (fused(dropouts), composed(dropouts)):
        leaves = [t.detach().requires_grad_() for t in (x, *a, *b)]
        pairs = (leaves[1 : 1 + len(a)], leaves[1 + len(a) :])
        ys = function(leaves[0], *zip(weights, biases, *pairs, strict=True))
        grads = torch.autograd.grad(sum(y.square().sum() for y in ys), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append([*grads, *second])
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_only_some_results_and_gradients_are_wanted(device: str) -> None:
    x, *rest = draw(3, torch.float32, device)
    layers = [tuple(rest[i : i + 4]) for i in (0, 5, 10)]
    x.requires_grad_()
    a = layers[2][2].requires_grad_()
    found = []
    for function in (fused, composed):
        ys = function((0.3, 0.4, 0.5))(x, *layers)
        found.append(torch.autograd.grad(ys[2], (x, a), rest[14], retain_graph=True))
        found[-1] += torch.autograd.grad(ys[1], x, rest[9])
    torch.testing.assert_close(*found)
    with torch.no_grad():
        assert not fused((0.3,))(x, layers[0])[0].requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(0,), (3, 0), ()])
def test_no_rows_and_one_without_a_batch(rows: tuple[int, ...], device: str) -> None:
    tensors = inputs(rows, 48, 80, 4, torch.float32, device)
    expected = graded(composed((0.3,)))(*tensors)
    for mine, truth in zip(graded(fused((0.3,)))(*tensors), expected, strict=True):
        torch.testing.assert_close(mine, truth)


def test_reference_is_pefts_layer_under_the_same_seed() -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(48, 80))
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_dropout=0.4)
    layer = peft.get_peft_model(model, config).train().base_model.model[0]
    a, b = (getattr(layer, f"lora_{n}")["default"].weight for n in "AB")
    x, base, scaling = torch.randn(3, 5, 48), layer.base_layer, layer.scaling["default"]
    torch.manual_seed(SEED)
    mine = lora_linear(x, base.weight, a, b, scaling, bias=base.bias, dropout=0.4)
    torch.manual_seed(SEED)
    assert torch.equal(mine, layer(x))


def test_torch_compile_has_the_reference() -> None:
    x, w, bias, a, b, _ = draw(1, torch.float32, "cpu")

    def layer(x: Any, **options: Any) -> Any:
        return lora_linear(x, w, a, b, SCALING, bias=bias, dropout=0.4, **options)

    torch.manual_seed(SEED)
    expected = layer(x)
    torch.manual_seed(SEED)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.gpu
def test_a_gpu_takes_the_fused_path_but_for_torch_compile() -> None:
    x, w, bias, a, b, _ = draw(1, torch.bfloat16, "cuda")

    def layer(x: Any, **options: Any) -> Any:
        return lora_linear(x, w, a, b, SCALING, bias=bias, dropout=0.4, **options)

    assert layer(x.requires_grad_(), backend="cuda").grad_fn.name() == "_LoraLinearsBackward"
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert compiled(x).grad_fn.name() != "_LoraLinearsBackward"
    with pytest.raises((UnsupportedError, torch._dynamo.exc.TorchDynamoException), match="trace"):
        compiled(x, backend="cuda")
    first, second = lora_linears(x, [LoraLinear(w, a, b, SCALING, bias, 0.4)] * 2)
    assert not torch.equal(first, second)  # every layer has its own
