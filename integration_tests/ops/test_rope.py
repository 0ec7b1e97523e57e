"""apply_rope against fp64 and against transformers' own functions.

Shapes: heads that fill a block and that do not, one head, an odd number of heads, partial rotary dimensions,
dimensions no vector divides (the scalar path), more heads than a block takes, one token.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from norm_cases import DTYPES, as_double, misaligned, run
from oracle import assert_as_accurate

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import apply_rope
from barqtrain_hf.ops.rope import apply_rope_reference

# batch, tokens, query heads, key heads, D, R
SHAPES = [
    (2, 33, 8, 2, 64, 64),
    (1, 129, 5, 1, 128, 128),
    (2, 7, 4, 4, 96, 32),
    (1, 5, 3, 1, 10, 6),
    (1, 17, 72, 8, 128, 128),
    (1, 9, 2, 2, 256, 256),
    (3, 1, 1, 1, 80, 80),
]
# q, cos
PAIRS = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:]]
PAIRS += [(torch.float32, d) for d in DTYPES[1:]]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, angle_dtype: torch.dtype, device: str = "cuda"
) -> list[torch.Tensor]:
    batch, tokens, q_heads, k_heads, dim, rotary = shape

    def heads(count: int) -> torch.Tensor:
        # As a projection gives them: [B, T, H, D], seen as [B, H, T, D].
        return torch.randn(batch, tokens, count, dim, device=device).to(dtype).transpose(1, 2)

    # Two halves that differ: the formula must not rely on their being equal.
    angles = torch.rand(batch, tokens, rotary, device=device) * 6.3
    q, k, dq, dk = (heads(count) for count in (q_heads, k_heads, q_heads, k_heads))
    return [q, k, angles.cos().to(angle_dtype), angles.sin().to(angle_dtype), dq, dk]


def graded(function: Any, **named: Any) -> Any:
    def call(q: Any, k: Any, cos: Any, sin: Any, dq: Any, dk: Any) -> list[torch.Tensor]:
        return run(lambda q, k: function(q, k, cos, sin, **named), q, k, upstream=[dq, dk])

    return call


def definition(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair by pair, in whatever precision comes in: nothing shared with the reference."""
    rotary = cos.shape[-1]
    one = torch.arange(0, rotary, 2) if interleaved else torch.arange(rotary // 2)
    two = one + 1 if interleaved else one + rotary // 2
    turned = []
    for x in (q, k):
        y = x.clone()
        c, s = cos[:, None], sin[:, None]
        y[..., one] = x[..., one] * c[..., one] - x[..., two] * s[..., one]
        y[..., two] = x[..., two] * c[..., two] + x[..., one] * s[..., two]
        turned.append(y)
    return turned[0], turned[1]


def stock(q: Any, k: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    """transformers' formula, each product rounded, with partial rotary dimensions."""
    cos, sin, rotary = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        part, rest = x[..., :rotary], x[..., rotary:]
        if interleaved:
            other = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
        else:
            a, b = part.chunk(2, dim=-1)
            other = torch.cat((-b, a), dim=-1)
        return torch.cat((part * cos + other * sin, rest), dim=-1)

    return turn(q), turn(k)


def oracle(interleaved: bool) -> Any:
    return lambda *t: graded(definition, interleaved=interleaved)(*as_double(t))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "olmo2", "cohere2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_is_transformers(family: str, dtype: torch.dtype) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    partial = family in ("phi3", "gpt_neox")
    q, k, cos, sin, _, _ = inputs((2, 7, 4, 2, 32, 16 if partial else 32), dtype, dtype, "cpu")
    named = {"interleaved": family == "cohere2", "keep_dtype": family in ("olmo2", "cohere2")}
    ours = apply_rope(q, k, cos, sin, **named)
    theirs = module.apply_rotary_pos_emb(q, k, cos, sin)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype is other.dtype
        torch.testing.assert_close(
            mine, other, atol=1e-6 if dtype is torch.float32 else 4e-2, rtol=1e-5
        )


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_the_definition(interleaved: bool) -> None:
    case = inputs(SHAPES[2], torch.float32, torch.float32, "cpu")
    ours = graded(apply_rope, interleaved=interleaved)(*case)
    for mine, exact in zip(ours, oracle(interleaved)(*case), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_as_accurate_as_stock(
    shape: tuple[int, ...], pair: tuple[torch.dtype, torch.dtype], interleaved: bool
) -> None:
    assert_as_accurate(
        lambda: inputs(shape, *pair),
        graded(apply_rope, interleaved=interleaved, backend="cuda"),
        graded(stock, interleaved=interleaved),
        oracle(interleaved),
        draws=4,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kernel_keeps_the_dtype_if_asked(dtype: torch.dtype) -> None:
    case = inputs(SHAPES[0], dtype, torch.float32)
    ours = graded(apply_rope, keep_dtype=True, backend="cuda")(*case)
    assert all(t.dtype is dtype for t in ours)
    expected = graded(apply_rope, backend="cuda")(*case)
    for mine, other in zip(ours, expected, strict=True):
        assert (mine != other.to(dtype)).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_of_packed_rows(interleaved: bool) -> None:
    q, k, _, _, dq, dk = inputs((2, 33, 8, 2, 64, 64), torch.bfloat16, torch.bfloat16)
    angles = torch.rand(40, 64, device="cuda")
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    ids = torch.cat((torch.arange(20), torch.arange(13))).cuda()
    ids = torch.stack((ids, ids.flip(0)))
    for rows in (ids, ids[:1]):
        named = {"interleaved": interleaved, "backend": "cuda"}
        ours = graded(apply_rope, position_ids=rows, **named)(q, k, cos, sin, dq, dk)
        expected = graded(apply_rope, **named)(q, k, cos[rows], sin[rows], dq, dk)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.gpu
def test_kernel_takes_views_and_other_layouts() -> None:
    case = inputs((2, 33, 8, 2, 64, 64), torch.bfloat16, torch.bfloat16)
    q, k, cos, sin, dq, dk = case
    expected = graded(apply_rope, backend="cuda")(*case)

    def same(results: Any, swap: bool = False) -> bool:
        return all(
            torch.equal(a.transpose(1, 2) if swap else a, b)
            for a, b in zip(results, expected, strict=True)
        )

    swapped = [t.transpose(1, 2) for t in (q, k)]
    upstream = [t.transpose(1, 2) for t in (dq, dk)]
    heads_last = graded(apply_rope, unsqueeze_dim=2, backend="cuda")(*swapped, cos, sin, *upstream)
    assert same(heads_last, swap=True)
    contiguous = [t.contiguous() for t in case]
    assert same(graded(apply_rope, backend="cuda")(*contiguous))
    assert same(graded(apply_rope, backend="cuda")(*(misaligned(t) for t in case)))
    fused = torch.cat((q, k), dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    assert same(graded(apply_rope, backend="cuda")(fused[:, :8], fused[:, 8:], cos, sin, dq, dk))
    wide = torch.stack((q, q), dim=-1)[..., 0]  # the last dimension strided
    assert same(graded(apply_rope, backend="cuda")(wide, k, cos, sin, dq, dk))
    shared = apply_rope(q, k, cos[:1], sin[:1], backend="cuda")
    rows = apply_rope(q, k, cos[:1].expand_as(cos), sin[:1].expand_as(sin), backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(shared, rows, strict=True))
    none = apply_rope(q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0], backend="cuda")
    assert none[0].shape == (2, 8, 0, 64)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_place_where_autograd_allows(device: str) -> None:
    q, k, cos, sin, dq, _ = inputs(SHAPES[0], torch.float32, torch.float32, device)
    expected = apply_rope(q, k, cos, sin)
    own_q, own_k = q.clone(), k.clone()
    turned = apply_rope(own_q, own_k, cos, sin, inplace=True)
    assert turned[0].data_ptr() == own_q.data_ptr() and torch.equal(own_q, expected[0])
    assert torch.equal(own_k, expected[1])
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in (q, k)]
    apply_rope(*strided, cos, sin, inplace=True)
    assert torch.equal(strided[0], expected[0]) and torch.equal(strided[1], expected[1])
    leaf = q.clone().requires_grad_()
    with pytest.raises(ArgumentError, match="q is a leaf that needs gradients"):
        apply_rope(leaf, k, cos, sin, inplace=True)
    with pytest.raises(ArgumentError, match="q is a view that needs gradients"):
        apply_rope((leaf * 2.0).transpose(0, 1).transpose(0, 1), k, cos, sin, inplace=True)
    with pytest.raises(ArgumentError, match=r"inplace=True cannot turn torch\.float16"):
        apply_rope(q.half(), k.half(), cos, sin, inplace=True)
    grads = []
    for inplace in (True, False):
        turned = apply_rope(leaf * 2.0, k.clone(), cos, sin, inplace=inplace)
        grads.append(torch.autograd.grad(turned[0], leaf, dq)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
def test_kernel_under_torch_compile_has_no_graph_break() -> None:
    case = inputs(SHAPES[0], torch.bfloat16, torch.bfloat16)

    def turn(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        a, b = apply_rope(q, k, cos, sin, backend="cuda")
        return a * 1.0, b * 1.0

    compiled = graded(torch.compile(turn, fullgraph=True))(*case)
    for mine, other in zip(compiled, graded(turn)(*case), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.gpu
def test_second_derivative_and_repetition() -> None:
    case = inputs(SHAPES[0], torch.float32, torch.float32)
    first = graded(apply_rope, backend="cuda")(*case)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, graded(apply_rope, backend="cuda")(*case), strict=True)
    )
    q, k, cos, sin, dq, dk = case
    seconds = []
    for backend in ("cuda", "torch"):
        leaves = [t.detach().requires_grad_() for t in (q, k, dq, dk)]
        turned = apply_rope(leaves[0], leaves[1], cos, sin, backend=backend)  # type: ignore[arg-type]
        grads = torch.autograd.grad(turned, leaves[:2], leaves[2:], create_graph=True)
        total = grads[0].square().sum() + grads[1].pow(3).sum()
        seconds.append(torch.autograd.grad(total, leaves[2:]))
    for mine, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_kernel_indexes_beyond_31_bits() -> None:
    q = torch.randn(1, 2**19 + 3, 32, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k = q[:, :1]
    angles = torch.rand(1, q.shape[2], 128, device="cuda")
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    turned = apply_rope(q, k, cos, sin, backend="cuda")
    last = apply_rope_reference(q[:, :, -2:], k[:, :, -2:], cos[:, -2:], sin[:, -2:])
    for mine, exact in zip(turned, last, strict=True):
        torch.testing.assert_close(mine[:, :, -2:], exact)


def test_bad_arguments_name_the_argument() -> None:
    q, k, cos, sin, _, _ = inputs(SHAPES[0], torch.float32, torch.float32, "cpu")
    with pytest.raises(ArgumentTypeError, match=r"q is torch\.float64"):
        apply_rope(q.double(), k, cos, sin)
    with pytest.raises(ArgumentError, match=r"q is torch\.float32 and k torch\.float16"):
        apply_rope(q, k.half(), cos, sin)
    with pytest.raises(ArgumentError, match="differ in the number of heads"):
        apply_rope(q, k[:, :, :5], cos, sin)
    with pytest.raises(ArgumentError, match=r"cos of shape \(2, 32, 64\)"):
        apply_rope(q, k, cos[:, 1:], sin[:, 1:])
    with pytest.raises(ArgumentError, match="even number of angles up to 64"):
        apply_rope(q, k, cos[..., :7], sin[..., :7])
    with pytest.raises(ArgumentError, match="unsqueeze_dim=3"):
        apply_rope(q, k, cos, sin, unsqueeze_dim=3)
    ids = torch.zeros(2, 33, dtype=torch.int32)
    with pytest.raises(ArgumentTypeError, match=r"position_ids is torch\.int32"):
        apply_rope(q, k, cos[0], sin[0], position_ids=ids)
    for tables, rows in ((cos, ids.long()), (cos[0], ids[0].long())):
        with pytest.raises(ArgumentError, match="for position_ids of"):
            apply_rope(q, k, tables, tables, position_ids=rows)
    with pytest.raises(UnsupportedError, match="cpu; move it to a CUDA device"):
        apply_rope(q, k, cos, sin, backend="cuda")
