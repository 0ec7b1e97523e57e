"""rms_norm against fp64 and against transformers' own modules.

Widths: 8 lanes of a warp (64), a whole warp, one to four vectors a thread, the widest register-resident
row (16384), one beyond it, and odd ones that only the scalar path takes. Rows: fewer than a block holds, a
prime, and more than the persistent grid.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import rms_norm
from barqtrain_hf.ops.rms_norm import rms_norm_reference

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# fp16 with bf16 has no kernel; "auto" takes the reference there.
PAIRS = [p for p in itertools.product(DTYPES, DTYPES) if p[0] is p[1] or torch.float32 in p]


def with_gradients(function: Any, *options: Any, **named: Any) -> Any:
    def call(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function(x, weight, EPS, *options, **named)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), upstream.to(y.dtype))]

    return call


def oracle(zero_centered: bool) -> Any:
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return normed * (1.0 + weight if zero_centered else weight)

    graded = with_gradients(norm)
    return lambda *inputs: graded(*(t.double() for t in inputs))


def inputs(rows: int, dim: int, x_dtype: torch.dtype, w_dtype: torch.dtype, device: str) -> Any:
    x = torch.randn(rows, dim, device=device).to(x_dtype)
    weight = torch.randn(dim, device=device).to(w_dtype)
    # In x's type, so that every side gets the same upstream gradient exactly.
    upstream = torch.randn(rows, dim, device=device).to(x_dtype)
    return x, weight, upstream


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_reference_is_transformers_bit_for_bit(
    pair: tuple[torch.dtype, torch.dtype], zero_centered: bool
) -> None:
    x, weight, upstream = inputs(5, 48, *pair, "cpu")
    module = (Gemma2RMSNorm if zero_centered else LlamaRMSNorm)(48, eps=EPS)
    module.weight.data = weight

    def stock(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    ours = with_gradients(rms_norm, zero_centered=zero_centered)(x, weight, upstream)
    for mine, theirs in zip(ours, with_gradients(stock)(x, weight, upstream), strict=True):
        assert mine.dtype is theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize(
    "rows,dim", [(257, 64), (7, 256), (1031, 1000), (33, 4096), (3, 77), (129, 2049)]
)
def test_kernel_is_as_accurate_as_stock(
    rows: int, dim: int, pair: tuple[torch.dtype, torch.dtype], zero_centered: bool
) -> None:
    assert_as_accurate(
        lambda: inputs(rows, dim, *pair, "cuda"),
        with_gradients(rms_norm, zero_centered=zero_centered, backend="cuda"),
        with_gradients(rms_norm_reference, zero_centered=zero_centered),
        oracle(zero_centered),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows,dim", [(5, 8192), (5, 16384), (3, 16392), (4, 40000), (3, 16385), (20000, 32)]
)
def test_kernel_at_extreme_sizes(rows: int, dim: int, dtype: torch.dtype) -> None:
    assert_as_accurate(
        lambda: inputs(rows, dim, dtype, dtype, "cuda"),
        with_gradients(rms_norm, backend="cuda"),
        with_gradients(rms_norm_reference),
        oracle(False),
        draws=3,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_kernel_rounds_as_transformers_does(dtype: torch.dtype, zero_centered: bool) -> None:
    x, weight, _ = inputs(512, 1024, dtype, dtype, "cuda")
    ours = rms_norm(x, weight, EPS, zero_centered=zero_centered, backend="cuda")
    stock = rms_norm_reference(x, weight, EPS, zero_centered=zero_centered)
    # The fp32 sums differ in order, which moves a value over a rounding boundary once in thousands.
    assert (ours != stock).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 77, 1000, 4096, 20000])
def test_kernel_repeats_bit_for_bit(dim: int) -> None:
    run = with_gradients(rms_norm, backend="cuda")
    case = inputs(3001, dim, torch.bfloat16, torch.bfloat16, "cuda")
    first = run(*case)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*case), strict=True))


@pytest.mark.gpu
def test_kernel_takes_views() -> None:
    wide = torch.randn(40, 2 * 512 + 1, device="cuda").bfloat16()
    views = {
        "strided": wide[:, :512],
        "transposed": torch.randn(512, 40, device="cuda").bfloat16().t(),
        "misaligned": torch.randn(40 * 512 + 1, device="cuda").bfloat16()[1:].view(40, 512),
        "4-D heads": torch.randn(2, 5, 4, 512, device="cuda").bfloat16().transpose(1, 2),
    }
    weights = {
        "plain": torch.randn(512, device="cuda").bfloat16(),
        "misaligned": torch.randn(513, device="cuda").bfloat16()[1:],
        "strided": torch.randn(1024, device="cuda").bfloat16()[::2],
    }
    for x, weight in itertools.product(views.values(), weights.values()):
        upstream = torch.randn(x.shape, device="cuda").bfloat16()
        shifted = torch.empty(upstream.numel() + 1, dtype=upstream.dtype, device="cuda")[1:]
        shifted = shifted.view(x.shape).copy_(upstream)  # a misaligned upstream gradient
        ours = with_gradients(rms_norm, backend="cuda")(x, weight, shifted)
        plain = (x.contiguous().clone(), weight.contiguous().clone(), upstream)
        stock = with_gradients(rms_norm_reference)(*plain)
        truth = oracle(False)(*plain)
        for mine, theirs, exact in zip(ours, stock, truth, strict=True):
            error = (mine.double() - exact).norm()
            assert error <= 1.25 * (theirs.double() - exact).norm()


@pytest.mark.gpu
def test_kernel_under_torch_compile_has_no_graph_break() -> None:
    case = inputs(64, 128, torch.bfloat16, torch.bfloat16, "cuda")
    compiled = torch.compile(
        lambda x, w, eps: rms_norm(x, w, eps, backend="cuda") * 1.0, fullgraph=True
    )
    eager = with_gradients(rms_norm, backend="cuda")(*case)
    for mine, theirs in zip(with_gradients(compiled)(*case), eager, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_kernel_with_frozen_weight_and_no_rows() -> None:
    x, weight, upstream = inputs(16, 64, torch.float32, torch.float32, "cuda")
    x.requires_grad_()
    y = rms_norm(x, weight, EPS, backend="cuda")
    (dx,) = torch.autograd.grad(y, x, upstream)
    (stock,) = torch.autograd.grad(rms_norm_reference(x, weight, EPS), x, upstream)
    torch.testing.assert_close(dx, stock)
    empty = torch.empty(0, 64, device="cuda", requires_grad=True)
    weight.requires_grad_()
    dx, dw = torch.autograd.grad(
        rms_norm(empty, weight, EPS, backend="cuda").sum(), (empty, weight)
    )
    assert dx.shape == (0, 64) and torch.equal(dw, torch.zeros_like(weight))


@pytest.mark.gpu
def test_kernel_indexes_beyond_31_bits() -> None:
    x = torch.randn(2**19 + 1, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    y = rms_norm(x, weight, EPS, backend="cuda")
    torch.testing.assert_close(y[-1:], rms_norm_reference(x[-1:], weight, EPS))


def test_bad_arguments_name_the_argument() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ArgumentTypeError, match=r"x is torch\.float64"):
        rms_norm(x.double(), weight)
    with pytest.raises(ArgumentTypeError, match=r"weight is torch\.int64"):
        rms_norm(x, weight.long())
    with pytest.raises(ArgumentError, match=r"weight of shape \(7,\)"):
        rms_norm(x, weight[:7])
    with pytest.raises(ArgumentError, match="backend='gpu'"):
        rms_norm(x, weight, backend="gpu")
    with pytest.raises(UnsupportedError, match="cpu; move it to a CUDA device"):
        rms_norm(x, weight, backend="cuda")
