"""lora_linear against fp64, against PEFT's layer, and what it keeps.

The fused path is made of PyTorch's products, so that it is tested on a CPU too; the GPU has others.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from norm_cases import DTYPES, as_double, run
from oracle import assert_as_accurate

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import LoraLinear, lora_linear, lora_linears
from barqtrain_hf.ops import lora as lora_op

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
# In fp32 the order decides in which a CPU adds, and there users have the reference.
PLACES = [
    *(("cpu", dtype) for dtype in DTYPES[1:]),
    *(pytest.param("cuda", dtype, marks=GPU) for dtype in DTYPES),
]
# Rows, dimensions in and out, rank.
SHAPES = [((7,), 48, 80, 4), ((2, 33), 40, 24, 1), ((1,), 128, 256, 16), ((5, 3), 77, 51, 9)]
SCALING = 0.7


def inputs(
    rows: tuple[int, ...], wide: int, out: int, rank: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """x, weight, bias, A, B and the upstream gradient."""
    shapes = [(*rows, wide), (out, wide), (out,), (rank, wide), (out, rank), (*rows, out)]
    scales = (1.0, wide**-0.5, 1.0, wide**-0.5, 1.0, 1.0)
    return [
        (scale * torch.randn(*shape, device=device)).to(dtype)
        for scale, shape in zip(scales, shapes, strict=True)
    ]


def fused(x: Any, weight: Any, bias: Any, a: Any, b: Any) -> Any:
    """The fused path, wherever."""
    return lora_op.apply(x, [LoraLinear(weight, a, b, SCALING, bias)], x.dtype)[0]


def reference(x: Any, weight: Any, bias: Any, a: Any, b: Any) -> Any:
    return lora_op.lora_linear_reference(x, weight, a, b, SCALING, bias)


def graded(function: Any) -> Any:
    """Output and the gradients of x, A and B."""

    def call(x: Any, weight: Any, bias: Any, a: Any, b: Any, upstream: Any) -> list[torch.Tensor]:
        return run(lambda *t: function(t[0], weight, bias, *t[1:]), x, a, b, upstream=[upstream])

    return call


def truth(*tensors: Any) -> list[torch.Tensor]:
    return graded(reference)(*as_double(tensors))


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_stock(shape: Any, dtype: torch.dtype, device: str) -> None:
    assert_as_accurate(
        lambda: inputs(*shape, dtype, device), graded(fused), graded(reference), truth
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_adapters_beside_16_bit_weights(dtype: torch.dtype, device: str) -> None:
    """PEFT's default. Stock in the same dtype is what autocast makes of it."""

    def draw() -> list[torch.Tensor]:
        x, weight, bias, a, b, upstream = inputs((9, 5), 64, 96, 8, dtype, device)
        return [x, weight, bias, a.float(), b.float(), upstream]

    def stock(*tensors: Any) -> Any:
        with torch.autocast(device, dtype):
            return reference(*tensors)

    y, dx, da, db = graded(fused)(*draw())
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (dtype, dtype, torch.float32, torch.float32)
    assert_as_accurate(draw, graded(fused), graded(stock), truth)


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
def test_layers_of_one_input_are_as_accurate_together(dtype: torch.dtype, device: str) -> None:
    sizes = ((64, 4), (24, 16), (24, 1))

    def draw() -> list[torch.Tensor]:
        first = inputs((6, 5), 48, 64, 4, dtype, device)[0]
        each = [inputs((6, 5), 48, out, rank, dtype, device)[1:] for out, rank in sizes]
        return [first, *itertools.chain(*each)]

    def of(function: Any) -> Any:
        def call(x: Any, *tensors: Any) -> list[torch.Tensor]:
            weights, biases, a, b, upstream = (tensors[i::5] for i in range(5))

            def layers(x: Any, *adapters: Any) -> Any:
                return function(x, weights, biases, adapters[:3], adapters[3:])

            return run(layers, x, *a, *b, upstream=upstream)

        return call

    def together(x: Any, *parts: Any) -> Any:
        scalings = (SCALING, 1.0, 2.0)
        layers = [
            LoraLinear(w, a, b, s, bias) for w, bias, a, b, s in zip(*parts, scalings, strict=True)
        ]
        return lora_op.apply(x, layers, x.dtype)

    def apart(x: Any, *parts: Any) -> Any:
        each = zip(*parts, (SCALING, 1.0, 2.0), strict=True)
        return tuple(
            lora_op.lora_linear_reference(x, w, a, b, s, bias) for w, bias, a, b, s in each
        )

    assert_as_accurate(draw, of(together), of(apart), lambda *t: of(apart)(*as_double(t)))


@pytest.mark.parametrize("device", DEVICES)
def test_only_some_results_and_gradients_are_wanted(device: str) -> None:
    x, w, bias, a, b, upstream = inputs((6,), 48, 80, 4, torch.float32, device)
    a2, b2 = torch.randn_like(a), torch.randn_like(b)
    layers = [LoraLinear(w, a, b, SCALING, bias), LoraLinear(w, a2.requires_grad_(), b2, 1.0)]
    x.requires_grad_()
    _, second = lora_op.apply(x, layers, x.dtype)
    dx, da = torch.autograd.grad(second, (x, a2), upstream)
    alone = lora_op.apply(x, layers[1:], x.dtype)[0]
    expected = torch.autograd.grad(alone, (x, a2), upstream)
    torch.testing.assert_close((dx, da), expected)
    # Without any gradient nothing is kept.
    assert not lora_op.apply(x.detach(), layers[:1], x.dtype)[0].requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_kept_are_input_and_rank_many_numbers_a_row(device: str) -> None:
    rows, wide, out, rank = 64, 48, 80, 8  # of which there are multiples of 8
    x, w, bias, a, b, _ = inputs((rows,), wide, out, rank, torch.bfloat16, device)
    leaves = [x.requires_grad_(), *(t.float().requires_grad_() for t in (a, b))]
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused(leaves[0], w, bias, *leaves[1:])
    assert x.untyped_storage().data_ptr() in saved
    assert w.untyped_storage().data_ptr() in saved
    # Beside x, weight, bias and the adapter itself, which are there anyway: t and the adapter in bf16.
    given = [rows * wide, out * wide, out, rank * wide, out * rank]
    assert sorted(saved.values()) == sorted([*given, rows * rank, rank * wide, out * rank])


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_bit_for_bit_and_takes_views(device: str) -> None:
    tensors = inputs((4, 33), 48, 80, 8, torch.bfloat16, device)
    first = graded(fused)(*tensors)
    assert all(torch.equal(p, q) for p, q in zip(first, graded(fused)(*tensors), strict=True))
    x, *rest = tensors
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    upstream = rest.pop().mT.contiguous().mT
    again = graded(fused)(strided, *rest, upstream)
    for mine, expected in zip(again, first, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_results_may_be_written_to(device: str) -> None:
    x, w, bias, a, b, _ = inputs((2, 3), 48, 80, 4, torch.float32, device)
    for rows in (x, x[0], x[0, 0]):
        rows = rows.detach().requires_grad_()
        layers = [LoraLinear(w, a, b, SCALING, bias), LoraLinear(w, a, b, SCALING)]
        for y in lora_op.apply(rows, layers, x.dtype):
            (dx,) = torch.autograd.grad(y.mul_(2).sum(), rows, retain_graph=True)
            expected = (w + SCALING * b @ a).sum(0).mul(2).expand_as(rows)
            torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(0,), (3, 0), ()])
def test_no_rows_and_one_without_a_batch(rows: tuple[int, ...], device: str) -> None:
    tensors = inputs(rows, 48, 80, 4, torch.float32, device)
    for mine, expected in zip(graded(fused)(*tensors), graded(reference)(*tensors), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_computes_in_its_dtype(device: str) -> None:
    def under_autocast(function: Any) -> Any:
        def call(*tensors: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return function(*tensors)

        return graded(call)

    def ours(x: Any, w: Any, bias: Any, a: Any, b: Any) -> Any:
        return lora_op.apply(x, [LoraLinear(w, a, b, SCALING, bias)], torch.bfloat16)[0]

    def draw() -> list[torch.Tensor]:
        return inputs((7,), 48, 80, 4, torch.float32, device)

    y, *grads = under_autocast(ours)(*draw())
    assert y.dtype is torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert_as_accurate(draw, under_autocast(ours), under_autocast(reference), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_pefts_layer(bias: bool, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=bias, dtype=dtype))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0]
    a, b = (getattr(layer, f"lora_{n}")["default"].weight for n in "AB")
    x = torch.randn(3, 5, 48, dtype=dtype)
    base = layer.base_layer
    mine = lora_linear(x, base.weight, a, b, layer.scaling["default"], bias=base.bias)
    assert torch.equal(mine, layer(x))


@pytest.mark.parametrize("path", ["reference", "fused"])
def test_compiles_without_graph_break(path: str) -> None:
    function = {"reference": reference, "fused": fused}[path]
    tensors = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(graded(compiled)(*tensors), graded(function)(*tensors), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.gpu
def test_compiled_on_a_gpu_is_what_it_is_in_eager_mode() -> None:
    x, w, bias, a, b, upstream = inputs((64,), 128, 256, 16, torch.bfloat16, "cuda")

    def layer(x: Any, weight: Any, bias: Any, a: Any, b: Any) -> Any:
        return lora_linear(x, weight, a, b, SCALING, bias=bias, backend="cuda")

    tensors = (x, w, bias, a.float(), b.float(), upstream)
    compiled = torch.compile(layer, fullgraph=True)
    for mine, expected in zip(graded(compiled)(*tensors), graded(layer)(*tensors), strict=True):
        torch.testing.assert_close(mine, expected)


def test_second_derivative_is_the_definitions() -> None:
    *leaves, w, bias = (inputs((6,), 48, 80, 4, torch.float32, "cpu")[i] for i in (0, 3, 4, 1, 2))
    results = []
    for function in (fused, reference):
        x, a, b = (leaf.detach().requires_grad_() for leaf in leaves)
        grads = torch.autograd.grad(
            function(x, w, bias, a, b).square().sum(), (x, a, b), create_graph=True
        )
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (x, a, b)))
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()


def test_layers_whose_results_are_not_used_get_no_gradient() -> None:
    x, w, _, a, b, upstream = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    unused = a.clone().requires_grad_()
    layers = [LoraLinear(w, a.requires_grad_(), b, 1.0), LoraLinear(w, unused, b, 1.0)]
    lora_op.apply(x, layers, x.dtype)[0].backward(upstream)
    assert a.grad is not None
    assert unused.grad is None


def test_a_weight_that_is_trained_takes_the_reference() -> None:
    x, w, _, a, b, _ = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    w.requires_grad_()
    lora_linear(x, w, a, b, SCALING).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand_as(w))
    assert "weight is trained" in str(lora_op._unsupported(w, None, 0.0))
    with torch.no_grad():
        assert lora_op._unsupported(w, None, 0.0) is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(3, 48, dtype=torch.int64)}, ArgumentTypeError, "x is torch.int64"),
        ({"x": torch.ones(3, 47)}, ArgumentError, r"x of shape \(3, 47\) does not fit weight"),
        ({"a": torch.ones(5, 48)}, ArgumentError, r"lora_a of shape \(5, 48\) and lora_b of"),
        ({"b": torch.ones(79, 4)}, ArgumentError, r"must be \[r, 48\] and \[80, r\]"),
        ({"a": torch.ones(0, 48), "b": torch.ones(80, 0)}, ArgumentError, "rank r > 0"),
        ({"bias": torch.ones(79)}, ArgumentError, r"bias of shape \(79,\) must be \[80\]"),
        ({"a": torch.ones(4, 48, device="meta")}, ArgumentError, "lora_a is on meta and x on cpu"),
        ({"w": torch.ones(80, 48).half()}, ArgumentError, "cast them to one dtype"),
        ({"dropout": 1.0}, ArgumentError, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, ArgumentError, "dropout=-0.1 must be"),
        ({"dropout": float("nan")}, ArgumentError, "dropout=nan must be"),
        ({"backend": "gpu"}, ArgumentError, "backend='gpu' must be"),
        ({"backend": "cuda"}, UnsupportedError, "move it to a CUDA device"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {
        "x": torch.ones(3, 48),
        "w": torch.ones(80, 48),
        "a": torch.ones(4, 48),
        "b": torch.ones(80, 4),
        "bias": None,
        "dropout": 0.0,
        "backend": "auto",
    } | change
    x, w, a, b, bias, dropout, backend = given.values()
    with pytest.raises(error, match=words):
        lora_linear(x, w, a, b, 1.0, bias=bias, dropout=dropout, backend=backend)  # type: ignore[arg-type]


def test_layers_together_are_checked_each() -> None:
    x, w, _, a, b, _ = inputs((6,), 48, 80, 4, torch.float32, "cpu")
    good, bad = LoraLinear(w, a, b, 1.0), LoraLinear(w[:, :5], a, b, 1.0)
    with pytest.raises(ArgumentError, match="does not fit weight"):
        lora_linears(x, [good, bad])
    one, other = lora_linears(x, [good, good])
    assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_gpu_takes_the_fused_path() -> None:
    x, w, bias, a, b, _ = inputs((64,), 128, 256, 16, torch.bfloat16, "cuda")
    y = lora_linear(x.requires_grad_(), w, a, b, SCALING, bias=bias)
    assert y.grad_fn.name() == "_LoraLinearsBackward"
    stock = lora_linear(x, w, a, b, SCALING, bias=bias, backend="torch")
    assert stock.grad_fn.name() != "_LoraLinearsBackward"
