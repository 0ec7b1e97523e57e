"""swiglu, geglu and gelu against fp64 and against what transformers computes.

Sizes: less than a vector, odd ones (the scalar path), exactly and just above what a block takes, many rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_cases import DTYPES, as_double, misaligned, run
from oracle import assert_as_accurate

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import geglu, gelu, swiglu
from barqtrain_hf.ops.glu import activation_reference, glu_reference

SHAPES = [(1, 5), (3, 77), (7, 256), (2, 4096), (3, 5, 4104), (301, 1000)]
GATED: dict[str, Any] = {
    "silu": swiglu,
    "gelu": lambda *t, **named: geglu(*t, approximate="none", **named),
    "gelu_tanh": geglu,
}


def inputs(*shape: int, dtype: torch.dtype, device: str = "cuda") -> list[torch.Tensor]:
    gate, up, upstream = (torch.randn(*shape, device=device) for _ in range(3))
    return [(3 * gate).to(dtype), up.to(dtype), upstream.to(dtype)]


def graded(function: Any, **named: Any) -> Any:
    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return run(lambda *t: function(*t, **named), *tensors[:-1], upstream=[tensors[-1]])

    return call


def oracle(activation: str) -> Any:
    def truth(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        y = activation_reference(activation, gate)
        return y if up is None else y * up

    return lambda *tensors: graded(truth)(*as_double(tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_what_an_mlp_computes(dtype: torch.dtype) -> None:
    gate, up, _ = inputs(5, 48, dtype=dtype, device="cpu")
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    assert torch.equal(geglu(gate, up), F.gelu(gate, approximate="tanh") * up)
    assert torch.equal(geglu(gate, up, approximate="none"), F.gelu(gate) * up)
    assert torch.equal(gelu(gate), F.gelu(gate))
    torch.testing.assert_close(swiglu(torch.cat((gate, up), dim=-1)), F.silu(gate) * up)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_kernel_is_as_accurate_as_stock(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str
) -> None:
    assert_as_accurate(
        lambda: inputs(*shape, dtype=dtype),
        graded(GATED[activation], backend="cuda"),
        graded(lambda gate, up: glu_reference(activation, gate, up)),
        oracle(activation),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_kernel_is_as_accurate_as_stock(
    shape: tuple[int, ...], dtype: torch.dtype, approximate: str
) -> None:
    assert_as_accurate(
        lambda: inputs(*shape, dtype=dtype)[::2],
        graded(gelu, approximate=approximate, backend="cuda"),
        graded(F.gelu, approximate=approximate),
        oracle("gelu_tanh" if approximate == "tanh" else "gelu"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("activation", GATED)
def test_kernel_rounds_as_transformers_does(dtype: torch.dtype, activation: str) -> None:
    gate, up, _ = inputs(512, 1024, dtype=dtype)
    # In the left tail stock's 1 + erf and 1 + tanh cancel, and ours do not.
    gate = gate.clamp(min=-1.0)
    ours = GATED[activation](gate, up, backend="cuda")
    # The last bit of exp and erf moves a value over a rounding boundary once in hundreds.
    assert (ours != glu_reference(activation, gate, up)).float().mean() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_16_bit_number_and_the_tails(dtype: torch.dtype) -> None:
    if dtype is torch.float32:
        x = torch.linspace(-30, 30, 2**16 + 1, device="cuda")
    else:
        x = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)
        x = x[torch.isfinite(x)]
    one = torch.ones_like(x)
    for activation, function in GATED.items():
        ours = graded(function, backend="cuda")(x, one, one)
        stock = graded(lambda g, u, a=activation: glu_reference(a, g, u))(x, one, one)
        truth = oracle(activation)(x, one, one)
        for mine, theirs, exact in zip(ours, stock, truth, strict=True):
            # Where x^3 overflows, stock's gradient is 0 * inf.
            assert not (torch.isnan(mine) & ~torch.isnan(theirs)).any()
            finite = torch.isfinite(theirs) & torch.isfinite(exact)
            unit = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
            wrong = (mine.double() - exact).abs() / unit
            theirs_wrong = (theirs.double() - exact).abs() / unit
            # Number by number: within stock's error and one unit in the last place.
            assert (wrong <= 1.25 * theirs_wrong + 1.0 + 1e-7 / unit)[finite].all(), activation


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [256, 4100, 77])
def test_halves_side_by_side(half: int, dtype: torch.dtype) -> None:
    gate, up, upstream = inputs(37, half, dtype=dtype)
    both = torch.cat((gate, up), dim=-1)
    y, dboth = graded(swiglu, backend="cuda")(both, upstream)
    expected = graded(swiglu, backend="cuda")(gate, up, upstream)
    assert torch.equal(y, expected[0])
    assert torch.equal(dboth, torch.cat(expected[1:], dim=-1))
    # And as two views of one tensor, which need no copy.
    views = graded(swiglu, backend="cuda")(*both.chunk(2, dim=-1), upstream)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


@pytest.mark.gpu
def test_kernel_takes_views() -> None:
    gate, up, upstream = inputs(40, 512, dtype=torch.bfloat16)
    expected = graded(swiglu, backend="cuda")(gate, up, upstream)
    wide = torch.randn(40, 1025, device="cuda").bfloat16()
    wide[:, 1:513] = gate
    cases = [
        (wide[:, 1:513], up),
        (gate.t().contiguous().t(), up),
        (misaligned(gate), misaligned(up)),
        (gate.view(2, 20, 512).transpose(0, 1), up.view(2, 20, 512).transpose(0, 1)),
    ]
    for g, u in cases:
        shaped = upstream if g.dim() == 2 else upstream.view(2, 20, 512).transpose(0, 1)
        ours = graded(swiglu, backend="cuda")(g, u, shaped)
        for mine, other in zip(ours, expected, strict=True):
            same = other if g.dim() == 2 else other.view(2, 20, 512).transpose(0, 1)
            assert torch.equal(mine, same)
    row = gate[:1].expand(40, 512)
    assert torch.equal(
        swiglu(row, up, backend="cuda"), swiglu(row.contiguous(), up, backend="cuda")
    )
    assert swiglu(gate[:0], up[:0], backend="cuda").shape == (0, 512)
    plain = gelu(wide[:, :512].contiguous(), backend="cuda")
    assert torch.equal(gelu(wide[:, :512], backend="cuda"), plain)


@pytest.mark.gpu
def test_kernel_indexes_beyond_31_bits_and_repeats() -> None:
    both = torch.randn(2**17 + 1, 2 * 8192, device="cuda", dtype=torch.bfloat16)
    y = swiglu(both, backend="cuda")
    torch.testing.assert_close(y[-1:], glu_reference("silu", both[-1:], None))
    assert torch.equal(y, swiglu(both, backend="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("two", [True, False])
def test_kernel_under_torch_compile_has_no_graph_break(two: bool) -> None:
    gate, up, upstream = inputs(64, 128, dtype=torch.bfloat16)
    tensors = (gate, up, upstream) if two else (torch.cat((gate, up), -1), upstream)
    compiled = torch.compile(lambda *t: swiglu(*t, backend="cuda") * 1.0, fullgraph=True)
    for mine, other in zip(
        graded(compiled)(*tensors), graded(swiglu, backend="cuda")(*tensors), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [swiglu, geglu], ids=lambda f: f.__name__)
def test_second_derivative(function: Any) -> None:
    gate, up, upstream = inputs(40, 40, dtype=torch.float32)
    for transpose in (False, True):  # a copy that is saved must be part of the graph
        seconds = []
        for backend in ("cuda", "torch"):
            leaves = [t.detach().requires_grad_() for t in (gate, up)]
            source = [t.t() if transpose else t for t in leaves]
            grads = torch.autograd.grad(
                function(*source, backend=backend), leaves, upstream, create_graph=True
            )
            total = grads[0].square().sum() + grads[1].square().sum()
            seconds.append(torch.autograd.grad(total, leaves))
        for mine, theirs in zip(*seconds, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_only_the_inputs_are_kept() -> None:
    gate, up, _ = inputs(64, 512, dtype=torch.bfloat16)
    gate.requires_grad_(), up.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up, backend="cuda")
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


def test_bad_arguments_name_the_argument() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ArgumentTypeError, match=r"gate is torch\.int64"):
        swiglu(x.long(), x)
    with pytest.raises(ArgumentError, match=r"up is torch\.float32 \(2, 7\)"):
        swiglu(x, x[:, :7])
    with pytest.raises(ArgumentError, match=r"gate of shape \(2, 7\) cannot be halved"):
        swiglu(x[:, :7])
    with pytest.raises(ArgumentError, match="approximate='erf'"):
        geglu(x, x, approximate="erf")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"x is torch\.float64"):
        gelu(x.double())
    with pytest.raises(UnsupportedError, match="cpu; move it to a CUDA device"):
        swiglu(x, x, backend="cuda")
