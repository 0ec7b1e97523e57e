"""lora_layer and lora_layers against fp64, against the definition, and what it keeps and writes to.

The fused path is made of PyTorch's products, so that it is tested on a CPU too.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_cases import DTYPES, as_double, run
from oracle import assert_as_accurate
from test_lora import DEVICES, PLACES, SCALING, SHAPES, inputs
from torch.utils.checkpoint import checkpoint

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import LoraLayer, lora_beside, lora_layer, lora_layers
from barqtrain_hf.ops._dropout import Masks, random_words

SIZES = ((64, 4), (24, 16), (24, 1))  # dimensions out, and rank


def base(weight: Any, bias: Any) -> Any:
    """A frozen layer of its own."""
    return lambda x: F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def fused(x: Any, layers: Any, dtype: Any = None, dropouts: Any = (0.0,) * 3) -> Any:
    """The fused path, wherever, of (weight, bias, A, B) each."""
    given = [
        LoraLayer(base(w, bias), a, b, SCALING, p)
        for (w, bias, a, b), p in zip(layers, dropouts, strict=False)
    ]
    return lora_beside.apply(x, given, dtype or x.dtype)


def reference(x: Any, layers: Any) -> Any:
    return tuple(
        lora_beside.lora_layer_reference(x, base(w, bias), a, b, SCALING)
        for w, bias, a, b in layers
    )


def graded(function: Any, number: int = 1) -> Any:
    """Results, and the gradients of x, every A and every B."""

    def call(x: Any, *tensors: Any) -> list[torch.Tensor]:
        weights, biases, a, b, upstream = (tensors[i::5] for i in range(5))

        def of(x: Any, *adapters: Any) -> Any:
            pairs = (adapters[:number], adapters[number:])
            return function(x, list(zip(weights, biases, *pairs, strict=True)))

        return run(of, x, *a, *b, upstream=upstream)

    return call


def truth(number: int = 1) -> Any:
    return lambda *tensors: graded(reference, number)(*as_double(tensors))


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_stock(shape: Any, dtype: torch.dtype, device: str) -> None:
    assert_as_accurate(
        lambda: inputs(*shape, dtype, device), graded(fused), graded(reference), truth()
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp32_it_is_the_definition(shape: Any) -> None:
    tensors = inputs(*shape, torch.float32, "cpu")
    for mine, exact in zip(graded(fused)(*tensors), truth()(*tensors), strict=True):
        assert (mine - exact).norm() <= 1e-6 * exact.norm()


def draw_group(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    x = inputs((6, 5), 48, 64, 4, dtype, device)[0]
    each = [inputs((6, 5), 48, *sizes, dtype, device)[1:] for sizes in SIZES]
    return [x, *itertools.chain(*each)]


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
def test_layers_of_one_input_are_as_accurate_together(dtype: torch.dtype, device: str) -> None:
    assert_as_accurate(
        lambda: draw_group(dtype, device), graded(fused, 3), graded(reference, 3), truth(3)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_adapters_beside_16_bit_layers(dtype: torch.dtype, device: str) -> None:
    """PEFT's default. Stock in the same dtype is what autocast makes of it."""

    def draw() -> list[torch.Tensor]:
        x, weight, bias, a, b, upstream = inputs((9, 5), 64, 96, 8, dtype, device)
        return [x, weight, bias, a.float(), b.float(), upstream]

    def stock(*given: Any) -> Any:
        with torch.autocast(device, dtype):
            return reference(*given)

    y, dx, da, db = graded(fused)(*draw())
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (dtype, dtype, torch.float32, torch.float32)
    assert_as_accurate(draw, graded(fused), graded(stock), truth())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [1, 3])
def test_fp32_inputs_under_autocast(number: int, device: str) -> None:
    """Norms in fp32, as PEFT prepares quantised models: the layer gives fp32 and the adapter is bf16."""

    def in_bf16(weight: Any, bias: Any) -> Any:
        low = torch.float64 if weight.dtype is torch.float64 else torch.bfloat16
        return lambda x: F.linear(x.to(low), weight.to(low), bias.to(low)).to(x.dtype)

    def of(call: Any) -> Any:
        def layers(x: Any, parts: Any) -> Any:
            given = [LoraLayer(in_bf16(w, bias), a, b, SCALING) for w, bias, a, b in parts]
            if x.dtype is torch.float64:
                return tuple(lora_beside.lora_layer_reference(x, *layer) for layer in given)
            with torch.autocast(device, torch.bfloat16):
                return call(x, given)

        return graded(layers, number)

    ours = of(lambda x, layers: lora_beside.apply(x, layers, torch.bfloat16))
    stock = of(lambda x, layers: tuple(lora_beside.lora_layer_reference(x, *la) for la in layers))

    def draw() -> list[torch.Tensor]:
        return draw_group(torch.float32, device)[: 1 + 5 * number]

    assert {t.dtype for t in ours(*draw())} == {torch.float32}
    assert_as_accurate(draw, ours, stock, lambda *t: stock(*as_double(t)))


def seeded(function: Any) -> Any:
    """With the same random numbers in every call."""

    def call(*arguments: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return function(*arguments)

    return call


def composed(dropouts: tuple[float, ...]) -> Any:
    """Step by step, of masks that are kept."""

    @seeded
    def call(x: Any, layers: Any) -> Any:
        seed = torch.empty(1, dtype=torch.int64, device=x.device).random_()
        ys = []
        for i, ((w, bias, a, b), p) in enumerate(zip(layers, dropouts, strict=True)):
            kept = random_words(0, x.numel(), seed, i).view(x.shape) >= p * 2**32
            dropped = torch.where(kept, x * (1.0 / (1.0 - p)), 0.0)
            low = dropped @ a.to(x.dtype).T @ b.to(x.dtype).T
            ys.append(base(w, bias)(x) + SCALING * low)
        return tuple(ys)

    return call


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
def test_dropout(dtype: torch.dtype, device: str) -> None:
    dropouts = (0.3, 0.0, 0.6)
    stock = graded(composed(dropouts), 3)
    ours = graded(seeded(lambda x, layers: fused(x, layers, None, dropouts)), 3)
    assert_as_accurate(
        lambda: draw_group(dtype, device), ours, stock, lambda *t: stock(*as_double(t))
    )


def test_a_mask_under_autocast_is_that_of_fp32() -> None:
    tensors = draw_group(torch.float32, "cpu")[:6]
    exact = graded(composed((0.3,)))(*tensors)
    ours = graded(seeded(lambda x, layers: fused(x, layers, torch.bfloat16, (0.3,))))(*tensors)
    for mine, expected in zip(ours, exact, strict=True):
        assert mine.dtype is torch.float32
        assert (mine - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_kept_are_input_and_rank_many_numbers_a_row(device: str) -> None:
    rows, wide, out, rank = 64, 48, 80, 8
    x, w, bias, a, b, _ = inputs((rows,), wide, out, rank, torch.bfloat16, device)
    leaves = [x.requires_grad_(), *(t.float().requires_grad_() for t in (a, b))]
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused(leaves[0], [(w, bias, *leaves[1:])])
    for given in (x, w, *leaves[1:]):
        saved.pop(given.untyped_storage().data_ptr())
    # t and the adapter in bf16.
    assert sorted(saved.values()) == sorted(2 * rank * n for n in (rows, wide, out))


class Product(torch.autograd.Function):
    """A layer that remembers what it returned, and what its backward pass gave."""

    seen: list[torch.Tensor]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, view: bool) -> torch.Tensor:
        ctx.save_for_backward(weight)
        y = x @ weight.T
        Product.seen = [y]
        return y.view(y.shape) if view else y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        dx = dy @ weight
        Product.seen.append(dx)
        return dx, None, None


@pytest.mark.parametrize("view", [False, True], ids=["new", "view"])
@pytest.mark.parametrize("trained", [True, False], ids=["x trained", "x not trained"])
def test_what_the_layer_gives_is_written_to(view: bool, trained: bool) -> None:
    """No second tensor of its size, unless autograd would refuse the first."""
    x, w, _, a, b, upstream = inputs((7,), 48, 80, 4, torch.float32, "cpu")
    leaves = [x.requires_grad_(trained), a.requires_grad_(), b.requires_grad_()]
    wanted = leaves[not trained :]
    before = upstream.clone()
    layer = LoraLayer(lambda x: Product.apply(x, w, view), a, b, SCALING)
    (y,) = lora_beside.apply(x, [layer], x.dtype)
    assert (y.data_ptr() == Product.seen[0].data_ptr()) == (not view)
    found = torch.autograd.grad(y, wanted, upstream)
    stock = lora_beside.lora_layer_reference(x, lambda x: x @ w.T, a, b, SCALING)
    torch.testing.assert_close(y, stock)
    expected = torch.autograd.grad(stock, wanted, upstream)
    torch.testing.assert_close(found, expected)
    # A layer whose input is not trained is not asked for that input's gradient.
    assert len(Product.seen) == 1 + trained and torch.equal(upstream, before)
    if trained:
        assert found[0].data_ptr() == Product.seen[1].data_ptr()


def test_only_some_results_and_gradients_are_wanted() -> None:
    x, *rest = draw_group(torch.float32, "cpu")
    weights, biases, a, b, upstream = (rest[i::5] for i in range(5))
    layers = list(zip(weights, biases, a, b, strict=True))
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in (*a, *b))]
    for chosen in ([1], [0, 2], [0, 1, 2]):
        ys = fused(x, layers)
        alone = reference(x, layers)
        found, expected = (
            torch.autograd.grad(
                [outputs[i] for i in chosen],
                leaves,
                [upstream[i] for i in chosen],
                allow_unused=True,
                retain_graph=True,
            )
            for outputs in (ys, alone)
        )
        for mine, exact in zip(found, expected, strict=True):
            assert (mine is None) == (exact is None)
            if mine is not None:
                torch.testing.assert_close(mine, exact)
    (da,) = torch.autograd.grad(fused(x.detach(), layers)[1], a[1], upstream[1])
    torch.testing.assert_close(da, expected[2])
    for t in leaves:
        t.requires_grad_(False)
    assert not any(y.requires_grad for y in fused(x, layers))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(fused(x, layers)[0], x, upstream[0])
    torch.testing.assert_close(dx, torch.autograd.grad(reference(x, layers)[0], x, upstream[0])[0])


def test_a_layer_without_a_gradient_of_its_own() -> None:
    x, w, bias, a, b, upstream = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    layer = LoraLayer(lambda x: base(w, bias)(x.detach()), a, b, SCALING)
    (y,) = lora_beside.apply(x.requires_grad_(), [layer], x.dtype)
    (dx,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(dx, SCALING * upstream @ b @ a)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    x, *rest = draw_group(torch.float32, "cpu")
    weights, biases, a, b, upstream = (rest[i::5] for i in range(5))
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in (*a, *b))]
    layers = list(zip(weights, biases, a, b, strict=True))
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        call = lambda x: fused(x, layers, None, (0.3, 0.0, 0.2))  # noqa: E731
        ys = checkpoint(call, x, use_reentrant=reentrant) if again else call(x)
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(ys, upstream)
        found.append([leaf.grad.clone() for leaf in leaves])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivative_is_the_definitions(dropout: float) -> None:
    tensors = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    x, w, bias, a, b = tensors[:5]

    @seeded
    def ours(x: Any, a: Any, b: Any) -> Any:
        return fused(x, [(w, bias, a, b)], None, (dropout,))[0]

    @seeded
    def definition(x: Any, a: Any, b: Any) -> Any:
        masks = Masks.draw((dropout,), x.device)
        dropped = masks.differentiable(x, 0)
        return base(w, bias)(x) + SCALING * (dropped @ a.T @ b.T)

    results = []
    for function in (ours, definition):
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("rows", [(0,), (3, 0), ()])
def test_no_rows_and_one_without_a_batch(rows: tuple[int, ...]) -> None:
    tensors = inputs(rows, 48, 80, 4, torch.float32, "cpu")
    for mine, expected in zip(graded(fused)(*tensors), graded(reference)(*tensors), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_bit_for_bit_and_takes_views(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        tensors = inputs((4, 33), 48, 80, 8, dtype, device)
        first = graded(fused)(*tensors)
        assert all(torch.equal(p, q) for p, q in zip(first, graded(fused)(*tensors), strict=True))
    x, *rest = tensors
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    rest[-1] = rest[-1].mT.contiguous().mT
    for mine, expected in zip(graded(fused)(strided, *rest), first, strict=True):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()


def test_compiled_it_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias, a, b, _ = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    monkeypatch.setattr(lora_beside, "use_cuda", lambda *given: given[3] is None)
    compiled = torch.compile(
        lambda x: lora_layer(x, base(w, bias), a, b, SCALING), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x), reference(x, [(w, bias, a, b)])[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(3, 48, dtype=torch.int64)}, ArgumentTypeError, "x is torch.int64"),
        ({"x": torch.ones(3, 47)}, ArgumentError, r"x of shape \(3, 47\) does not fit lora_a"),
        ({"x": torch.ones(())}, ArgumentError, r"x of shape \(\) does not fit"),
        ({"a": torch.ones(5, 48)}, ArgumentError, r"lora_a of shape \(5, 48\) and lora_b of"),
        ({"a": torch.ones(0, 48), "b": torch.ones(80, 0)}, ArgumentError, "rank r > 0"),
        ({"b": torch.ones(79, 4)}, ArgumentError, r"base returns shape \(3, 80\) for x of \(3, 48"),
        ({"b": torch.ones(80, 4, device="meta")}, ArgumentError, "lora_b is on meta and x on cpu"),
        ({"dropout": 1.0}, ArgumentError, "dropout=1.0 must be at least 0 and below 1"),
        ({"backend": "gpu"}, ArgumentError, "backend='gpu' must be"),
        ({"backend": "cuda"}, UnsupportedError, "move it to a CUDA device"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {
        "x": torch.ones(3, 48),
        "a": torch.ones(4, 48),
        "b": torch.ones(80, 4),
        "dropout": 0.0,
        "backend": "auto",
    } | change
    x, a, b, dropout, backend = given.values()
    layer = base(torch.ones(80, 48), torch.zeros(80))
    with pytest.raises(error, match=words):
        lora_layer(x, layer, a, b, 1.0, dropout=dropout, backend=backend)  # type: ignore[arg-type]


def test_the_fused_path_checks_what_the_layer_returns() -> None:
    x, w, bias, a, b, _ = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    with pytest.raises(ArgumentError, match="base returns shape"):
        fused(x, [(w[:79], bias[:79], a, b)])


@pytest.mark.gpu
def test_a_gpu_takes_the_fused_path() -> None:
    x, w, bias, a, b, _ = inputs((64,), 128, 256, 16, torch.bfloat16, "cuda")
    layer = LoraLayer(base(w, bias), a, b, SCALING)
    (y,) = lora_layers(x.requires_grad_(), [layer])
    assert y.grad_fn.name() == "_AddedBackward"
    (stock,) = lora_layers(x, [layer], backend="torch")
    assert stock.grad_fn.name() != "_AddedBackward"
