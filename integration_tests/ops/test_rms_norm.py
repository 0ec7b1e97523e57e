"""rms_norm against fp64 and against transformers' own modules; the grid is argued in norm_cases.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from norm_cases import DTYPES, EXTREMES, PAIRS, SHAPES, as_double, misaligned, run
from oracle import assert_as_accurate
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import rms_norm
from barqtrain_hf.ops.rms_norm import rms_norm_reference

EPS = 1e-5
MODES: dict[str, dict[str, bool]] = {
    "llama": {},
    "zero_centered": {"zero_centered": True},
    "round_once": {"round_once": True},
}
MODULES = {"llama": LlamaRMSNorm, "zero_centered": Gemma2RMSNorm, "round_once": Olmo2RMSNorm}


def with_gradients(function: Any, **named: Any) -> Any:
    def call(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        return run(lambda *t: function(*t, EPS, **named), x, weight, upstream=[upstream])

    return call


def oracle(mode: str) -> Any:
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return normed * (1.0 + weight if mode == "zero_centered" else weight)

    graded = with_gradients(norm)
    return lambda *inputs: graded(*as_double(inputs))


def inputs(rows: int, dim: int, x_dtype: torch.dtype, w_dtype: torch.dtype, device: str) -> Any:
    x = torch.randn(rows, dim, device=device).to(x_dtype)
    weight = torch.randn(dim, device=device).to(w_dtype)
    # In x's type, so that every side gets the same upstream gradient exactly.
    upstream = torch.randn(rows, dim, device=device).to(x_dtype)
    return x, weight, upstream


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_reference_is_transformers_bit_for_bit(
    pair: tuple[torch.dtype, torch.dtype], mode: str
) -> None:
    x, weight, upstream = inputs(5, 48, *pair, "cpu")
    module = MODULES[mode](48, eps=EPS)
    module.weight.data = weight

    def stock(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    ours = with_gradients(rms_norm, **MODES[mode])(x, weight, upstream)
    for mine, theirs in zip(ours, with_gradients(stock)(x, weight, upstream), strict=True):
        assert mine.dtype is theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("rows,dim", SHAPES)
def test_kernel_is_as_accurate_as_stock(
    rows: int, dim: int, pair: tuple[torch.dtype, torch.dtype], mode: str
) -> None:
    assert_as_accurate(
        lambda: inputs(rows, dim, *pair, "cuda"),
        with_gradients(rms_norm, **MODES[mode], backend="cuda"),
        with_gradients(rms_norm_reference, **MODES[mode]),
        oracle(mode),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("rows,dim", [*SHAPES, (5, 16384), (4, 40000)])
def test_kernel_with_residual(rows: int, dim: int, pair: tuple[torch.dtype, torch.dtype]) -> None:
    def graded(function: Any, **named: Any) -> Any:
        def call(x: Any, weight: Any, residual: Any, dy: Any, dh: Any) -> list[torch.Tensor]:
            def norm(x: Any, weight: Any, residual: Any) -> Any:
                return function(x, weight, EPS, residual=residual, **named)

            return run(norm, x, weight, residual, upstream=[dy, dh])

        return call

    def truth(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor) -> Any:
        h = x + residual
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight, h

    def draw() -> Any:
        x, weight, dy = inputs(rows, dim, *pair, "cuda")
        return x, weight, torch.randn_like(x), dy, torch.randn_like(x)

    assert_as_accurate(
        draw,
        graded(rms_norm, backend="cuda"),
        graded(rms_norm_reference),
        lambda *tensors: graded(truth)(*as_double(tensors)),
        draws=4,
    )


@pytest.mark.gpu
def test_residual_with_one_output_unused() -> None:
    x, weight, dy = inputs(40, 512, torch.bfloat16, torch.bfloat16, "cuda")
    residual = torch.randn_like(x)
    for used in (0, 1):
        results = []
        for function in (rms_norm, rms_norm_reference):
            leaves = [t.detach().requires_grad_() for t in (x, weight, residual)]
            named = {"backend": "cuda"} if function is rms_norm else {}
            output = function(leaves[0], leaves[1], EPS, residual=leaves[2], **named)[used]
            results.append(torch.autograd.grad(output, leaves, dy, allow_unused=True))
        for mine, theirs in zip(*results, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert (mine - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,dim", EXTREMES)
def test_kernel_at_extreme_sizes(rows: int, dim: int, dtype: torch.dtype) -> None:
    assert_as_accurate(
        lambda: inputs(rows, dim, dtype, dtype, "cuda"),
        with_gradients(rms_norm, backend="cuda"),
        with_gradients(rms_norm_reference),
        oracle("llama"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_kernel_rounds_as_transformers_does(dtype: torch.dtype, mode: str) -> None:
    x, weight, _ = inputs(512, 1024, dtype, dtype, "cuda")
    ours = rms_norm(x, weight, EPS, **MODES[mode], backend="cuda")
    stock = rms_norm_reference(x, weight, EPS, **MODES[mode])
    # The fp32 sums differ in order, which moves a value over a rounding boundary once in thousands.
    assert (ours != stock).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 77, 1000, 4096, 20000])
def test_kernel_repeats_bit_for_bit(dim: int) -> None:
    graded = with_gradients(rms_norm, backend="cuda")
    case = inputs(3001, dim, torch.bfloat16, torch.bfloat16, "cuda")
    first = graded(*case)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, graded(*case), strict=True))


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
        ours = with_gradients(rms_norm, backend="cuda")(x, weight, misaligned(upstream))
        plain = (x.contiguous().clone(), weight.contiguous().clone(), upstream)
        stock = with_gradients(rms_norm_reference)(*plain)
        truth = oracle("llama")(*plain)
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
def test_small_inputs_take_torchs_kernel_unless_told_otherwise() -> None:
    x, weight, _ = inputs(64, 512, torch.bfloat16, torch.bfloat16, "cuda")
    assert torch.equal(rms_norm(x, weight, EPS), torch.rms_norm(x, (512,), weight, EPS))
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x, weight, EPS, backend="cuda"))
    big = torch.randn(2100, 512, device="cuda").bfloat16()
    assert torch.equal(rms_norm(big, weight, EPS), rms_norm(big, weight, EPS, backend="cuda"))
    for wrong in (weight[:100], torch.ones(64, 512, device="cuda").bfloat16()):
        with pytest.raises(ArgumentError, match="weight of shape"):
            rms_norm(x, wrong)


@pytest.mark.gpu
def test_second_derivative() -> None:
    x, weight, upstream = inputs(40, 40, torch.float32, torch.float32, "cuda")
    for transpose in (False, True):  # a copy that is saved must be part of the graph
        seconds = []
        for backend in ("cuda", "torch"):
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            source = leaves[0].t() if transpose else leaves[0]
            y = rms_norm(source, leaves[1], EPS, backend=backend)  # type: ignore[arg-type, call-overload]
            (dx, _) = torch.autograd.grad(y, leaves, upstream, create_graph=True)
            seconds.append(torch.autograd.grad(dx.square().sum(), leaves))
        for mine, theirs in zip(*seconds, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    flat = torch.randn(40, device="cuda", requires_grad=True)
    (dx,) = torch.autograd.grad(
        rms_norm(flat, weight, EPS, backend="cuda").sum(), flat, create_graph=True
    )
    assert dx.shape == (40,) and dx.requires_grad


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
    with pytest.raises(ArgumentError, match=r"residual is torch\.float32 \(2, 7\)"):
        rms_norm(x, weight, residual=x[:, :7])
    with pytest.raises(ArgumentError, match="rounds once already"):
        rms_norm(x, weight, zero_centered=True, round_once=True)
    with pytest.raises(ArgumentError, match=r"weight of shape \(7,\)"):
        rms_norm(x, weight[:7])
    with pytest.raises(ArgumentError, match="backend='gpu'"):
        rms_norm(x, weight, backend="gpu")
    with pytest.raises(UnsupportedError, match="cpu; move it to a CUDA device"):
        rms_norm(x, weight, backend="cuda")
