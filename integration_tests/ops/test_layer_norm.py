"""layer_norm against fp64, PyTorch's own and transformers'; the grid is argued in norm_cases.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_cases import DTYPES, EXTREMES, SHAPES, as_double, misaligned, run
from oracle import assert_as_accurate
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import layer_norm
from barqtrain_hf.ops.layer_norm import layer_norm_reference

EPS = 1e-5
# x, weight, result. fp32 results are what autocast asks for; 16-bit weights of an fp32 stream come from a
# 16-bit model under autocast.
REGIMES = [
    *((d, d, d) for d in DTYPES),
    *((d, d, torch.float32) for d in DTYPES[1:]),
    *((d, torch.float32, torch.float32) for d in DTYPES[1:]),
    *((torch.float32, d, torch.float32) for d in DTYPES[1:]),
]
Regime = tuple[torch.dtype, torch.dtype, torch.dtype]


def graded(function: Any, **named: Any) -> Any:
    def call(x: Any, weight: Any, bias: Any, residual: Any, *upstream: Any) -> list[torch.Tensor]:
        def norm(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
            return function(x, weight, bias, EPS, residual=residual, **named)

        return run(norm, x, weight, bias, residual, upstream=upstream)

    return call


def truth(x: Any, weight: Any, bias: Any, eps: float, residual: Any) -> Any:
    h = x if residual is None else x + residual
    y = F.layer_norm(h, weight.shape, weight, bias, eps)
    return y if residual is None else (y, h)


def oracle(*tensors: Any) -> list[torch.Tensor]:
    return graded(truth)(*as_double(tensors))  # type: ignore[no-any-return]


def inputs(
    rows: int,
    dim: int,
    regime: Regime,
    device: str,
    bias: bool = True,
    residual: bool = False,
    mean: float = 0.5,
) -> Any:
    def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x_dtype, w_dtype, _ = regime
    x = (draw(torch.float32, rows, dim) + mean).to(x_dtype)
    # Upstream in x's type, so that every side gets the same gradient exactly.
    return (
        x,
        draw(w_dtype, dim),
        draw(w_dtype, dim) if bias else None,
        draw(x_dtype, rows, dim) if residual else None,
        draw(x_dtype, rows, dim),
        draw(x_dtype, rows, dim),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_pytorchs_and_coheres(dtype: torch.dtype, bias: bool) -> None:
    x, weight, b, *_ = inputs(5, 48, (dtype, dtype, dtype), "cpu", bias)
    ours = layer_norm(x, weight, b, EPS)
    assert isinstance(ours, torch.Tensor)
    torch.testing.assert_close(ours, F.layer_norm(x, (48,), weight, b, EPS))
    if not bias:
        module = Cohere2LayerNorm(48, eps=EPS)
        module.weight.data = weight
        assert torch.equal(ours, module(x))
    # What F.layer_norm does under autocast on a GPU.
    wide = layer_norm(x, weight, b, EPS, out_dtype=torch.float32)
    stock = F.layer_norm(x.float(), (48,), weight.float(), None if b is None else b.float(), EPS)
    torch.testing.assert_close(wide, stock)


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows,dim", SHAPES)
def test_kernel_is_as_accurate_as_stock(rows: int, dim: int, bias: bool, regime: Regime) -> None:
    assert_as_accurate(
        lambda: inputs(rows, dim, regime, "cuda", bias),
        graded(layer_norm, out_dtype=regime[2], backend="cuda"),
        graded(layer_norm_reference, out_dtype=regime[2]),
        oracle,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,dim", [e for e in EXTREMES if e[1] > 1])
def test_kernel_at_extreme_sizes(rows: int, dim: int, dtype: torch.dtype) -> None:
    assert_as_accurate(
        lambda: inputs(rows, dim, (dtype, dtype, dtype), "cuda"),
        graded(layer_norm, backend="cuda"),
        graded(layer_norm_reference),
        oracle,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,dim", [*SHAPES, (5, 16384), (4, 40000)])
def test_kernel_with_residual(rows: int, dim: int, dtype: torch.dtype) -> None:
    assert_as_accurate(
        lambda: inputs(rows, dim, (dtype, dtype, dtype), "cuda", residual=True),
        graded(layer_norm, backend="cuda"),
        graded(layer_norm_reference),
        oracle,
        draws=4,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_residual_with_a_wide_result(dtype: torch.dtype) -> None:
    named = {"out_dtype": torch.float32}
    assert_as_accurate(
        lambda: inputs(33, 512, (dtype, dtype, torch.float32), "cuda", residual=True),
        graded(layer_norm, backend="cuda", **named),
        graded(layer_norm_reference, **named),
        oracle,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0, -3000.0])
@pytest.mark.parametrize("dim", [64, 77, 1000, 4096, 40000])
def test_mean_far_from_zero(mean: float, dim: int) -> None:
    """Sums of squares cancel here; F.layer_norm in fp32 is what we must not be worse than."""
    single = (torch.float32, torch.float32, torch.float32)
    assert_as_accurate(
        lambda: inputs(65, dim, single, "cuda", mean=mean),
        graded(layer_norm, backend="cuda"),
        graded(truth),
        oracle,
    )


@pytest.mark.gpu
def test_rows_that_are_constant_or_hold_an_outlier() -> None:
    x = torch.full((8, 1024), 7.0, device="cuda")
    x[1, 3] = 1e4
    x[2] = 0.0
    weight, bias = torch.ones(1024, device="cuda"), torch.full((1024,), 0.25, device="cuda")
    y = layer_norm(x, weight, bias, EPS, backend="cuda")
    torch.testing.assert_close(
        y, F.layer_norm(x.double(), (1024,), weight.double(), bias.double(), EPS).float()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 77, 1000, 4096, 20000])
def test_kernel_repeats_bit_for_bit(dim: int) -> None:
    half = (torch.bfloat16, torch.bfloat16, torch.bfloat16)
    case = inputs(3001, dim, half, "cuda")
    first = graded(layer_norm, backend="cuda")(*case)
    for _ in range(3):
        again = graded(layer_norm, backend="cuda")(*case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_kernel_takes_views() -> None:
    plain = inputs(40, 512, (torch.bfloat16,) * 3, "cuda", residual=True)
    expected = graded(layer_norm, backend="cuda")(*plain)
    wide = torch.randn(40, 1025, device="cuda").bfloat16()
    wide[:, :512] = plain[0]
    for x, shift in itertools.product(
        (wide[:, :512], plain[0].t().contiguous().t(), misaligned(plain[0])), (True, False)
    ):
        rest = [misaligned(t) if shift else t for t in plain[1:]]
        ours = graded(layer_norm, backend="cuda")(x, *rest)
        for mine, other in zip(ours, expected, strict=True):
            assert (mine - other).double().norm() <= 2e-3 * other.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [True, False])
def test_kernel_under_torch_compile_has_no_graph_break(residual: bool) -> None:
    case = inputs(64, 128, (torch.bfloat16,) * 3, "cuda", residual=residual)

    def norm(x: Any, weight: Any, bias: Any, eps: float, residual: Any) -> Any:
        y = layer_norm(x, weight, bias, eps, residual=residual, backend="cuda")
        return (y[0] * 1.0, y[1]) if isinstance(y, tuple) else y * 1.0

    eager = graded(norm)(*case)
    for mine, theirs in zip(graded(torch.compile(norm, fullgraph=True))(*case), eager, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_small_inputs_take_torchs_kernel_unless_told_otherwise() -> None:
    x, weight, bias, *_ = inputs(64, 512, (torch.bfloat16,) * 3, "cuda")
    assert torch.equal(layer_norm(x, weight, bias), torch.layer_norm(x, (512,), weight, bias))
    with torch.autocast("cuda", torch.bfloat16):
        y = layer_norm(x, weight, bias)
    assert isinstance(y, torch.Tensor) and y.dtype is torch.bfloat16


@pytest.mark.gpu
def test_second_derivative_and_no_rows() -> None:
    x, weight, bias, _, upstream, _ = inputs(6, 40, (torch.float32,) * 3, "cuda")
    seconds = []
    for backend in ("cuda", "torch"):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = layer_norm(*leaves, EPS, backend=backend)  # type: ignore[arg-type, call-overload]
        grads = torch.autograd.grad(y, leaves, upstream, create_graph=True)
        seconds.append(torch.autograd.grad(grads[0].square().sum(), leaves[:2]))
    for mine, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    empty = torch.empty(0, 40, device="cuda", requires_grad=True)
    weight.requires_grad_()
    y = layer_norm(empty, weight, bias, backend="cuda")
    assert isinstance(y, torch.Tensor)
    dx, dw = torch.autograd.grad(y.sum(), (empty, weight))
    assert dx.shape == (0, 40) and torch.equal(dw, torch.zeros_like(weight))


def test_bad_arguments_name_the_argument() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ArgumentTypeError, match=r"x is torch\.float64"):
        layer_norm(x.double(), weight)
    with pytest.raises(ArgumentTypeError, match=r"out_dtype is torch\.int32"):
        layer_norm(x, weight, out_dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"weight of shape \(7,\)"):
        layer_norm(x, weight[:7])
    with pytest.raises(ArgumentError, match=r"bias is torch\.float16 \(8,\)"):
        layer_norm(x, weight, weight.half())
    with pytest.raises(UnsupportedError, match="cpu; move it to a CUDA device"):
        layer_norm(x, weight, backend="cuda")
