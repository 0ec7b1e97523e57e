"""LoRA's kernels against fp64 and PyTorch: sums of products on Hopper, and the gradients of one read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from norm_cases import DTYPES, as_double
from oracle import assert_as_accurate

from barqtrain_hf.ops import _lora_gradients, _lora_kernels, lora_linear
from barqtrain_hf.ops._lora_gradients import low_rank_gradients
from barqtrain_hf.ops._lora_kernels import summed_products
from barqtrain_hf.ops._lora_ranks import low_ranks


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


on_hopper = pytest.mark.skipif(not hopper(), reason="The kernel is for compute capability 9.0.")
# Rows, columns, terms of each product.
SHAPES = [
    (256, 256, (16, 64)),
    (1, 8, (8, 72)),
    (300, 520, (24, 200)),
    (257, 264, (200, 72, 40)),
    (1000, 776, (64, 328, 8, 136)),
    (700, 4104, (48, 640)),
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels also where cuBLAS is faster."""
    monkeypatch.setattr(_lora_kernels, "_LEAST_BUSY", 0.0)
    monkeypatch.setattr(_lora_gradients, "_MOST", {16: 2**40, 32: 2**40})
    for module in (_lora_kernels, _lora_gradients):
        module._plan.cache_clear()
    yield
    for module in (_lora_kernels, _lora_gradients):
        module._plan.cache_clear()


def draw(rows: int, columns: int, terms: tuple[int, ...], transposed: bool, dtype: Any) -> Any:
    """Left and right matrices in turns, and the bias."""
    tensors = []
    for k in terms:
        shape = (columns, k) if transposed else (k, columns)
        tensors += [torch.randn(rows, k, device="cuda"), torch.randn(shape, device="cuda")]
    return [t.to(dtype) for t in (*tensors, torch.randn(columns, device="cuda"))]


def by_kernel(transposed: bool) -> Any:
    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        *pairs, bias = tensors
        out = pairs[0].new_full((pairs[0].shape[0], len(bias)), float("nan"))
        products = list(zip(pairs[::2], pairs[1::2], strict=True))
        assert summed_products(out, products, transposed, bias)
        return [out]

    return call


def joined(transposed: bool) -> Any:
    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        *pairs, bias = tensors
        right = [part.T if transposed else part for part in pairs[1::2]]
        return [torch.addmm(bias, torch.cat(pairs[::2], 1), torch.cat(right))]

    return call


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_one_product(shape: Any, dtype: torch.dtype, transposed: bool) -> None:
    stock = joined(transposed)
    assert_as_accurate(
        lambda: draw(*shape, transposed, dtype),
        by_kernel(transposed),
        stock,
        lambda *t: stock(*as_double(t)),
    )


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("transposed", [True, False])
def test_many_tiles_repeat_bit_for_bit(transposed: bool) -> None:
    """More tiles than clusters, in bands that are not whole: enough to be taken without being told to."""
    tensors = draw(4000, 2568, (16, 512, 1000), transposed, torch.bfloat16)
    first, again = (by_kernel(transposed)(*tensors)[0] for _ in range(2))
    assert torch.equal(first, again)
    expected = joined(transposed)(*as_double(tensors))[0]
    torch.testing.assert_close(first.double(), expected, rtol=2**-8, atol=0.3)


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("always")
def test_only_the_result_is_written_and_views_are_read() -> None:
    memory = torch.full((302, 520), 7.0, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(300, 512, device="cuda").bfloat16()
    low, left = wide[:, 8:32], wide[:, 64:264]
    high, right = (torch.randn(520, k, device="cuda").bfloat16() for k in (24, 200))
    assert summed_products(memory[1:301], [(low, high), (left, right)], True)
    assert (memory[0] == 7).all() and (memory[301] == 7).all()
    expected = low.double() @ high.double().T + left.double() @ right.double().T
    torch.testing.assert_close(memory[1:301].double(), expected, rtol=2**-8, atol=0.2)


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("always")
def test_what_the_kernel_cannot_read_is_left_alone() -> None:
    one = torch.randn(300, 72, device="cuda").bfloat16()
    right = torch.randn(64, 72, device="cuda").bfloat16()
    out = torch.zeros(300, 64, device="cuda", dtype=torch.bfloat16)
    shifted = torch.randn(300 * 72 + 1, device="cuda").bfloat16()[1:].view(300, 72)
    turned = torch.randn(72, 300, device="cuda").bfloat16().T
    for left in (shifted, turned):
        assert not summed_products(out, [(left, right)], True)
    assert not summed_products(out, [(one, right)] * 5, True)
    assert not summed_products(out[:0], [(one[:0], right)], True)
    assert not summed_products(out.float(), [(one.float(), right.float())], True)
    assert not out.any()


def capable() -> bool:
    return (
        torch.cuda.is_available() and torch.cuda.get_device_capability() in _lora_gradients._RANKS
    )


reads_once = pytest.mark.skipif(not capable(), reason="The kernel needs more shared memory.")
# Rows, columns, rank: parts of tiles and of bands, and several of both.
THIN = [(1, 8, 1), (255, 72, 8), (1025, 64, 16), (2100, 520, 12), (3000, 1000, 32), (520, 20000, 9)]


def draw_thin(rows: int, columns: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """dy, B and t, the last two filled up to a multiple of 8 ranks, and dB's likeness in fp32."""
    width = rank + -rank % 8
    shapes = ((rows, columns), (columns, width), (rows, width))
    dy, up, low = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    up[:, rank:], low[:, rank:] = 0, 0
    return [dy, up, low, torch.empty(columns, rank, device="cuda")]


def thin(*tensors: torch.Tensor) -> list[torch.Tensor]:
    dy, up, low, like = tensors
    u = torch.full_like(low, float("nan"))
    db = low_rank_gradients(dy, up, low, u, like, 0.5)
    assert db is not None
    return [u, db]


def thin_stock(*tensors: torch.Tensor) -> list[torch.Tensor]:
    dy, up, low, like = tensors
    db = torch.mm(dy.T, low, out_dtype=torch.float32) if dy.dtype in DTYPES[1:] else dy.T @ low
    return [dy @ up, (db * 0.5)[:, : like.shape[1]]]


@pytest.mark.gpu
@reads_once
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", THIN, ids=str)
def test_gradients_are_as_accurate_as_two_products(shape: Any, dtype: torch.dtype) -> None:
    assert_as_accurate(
        lambda: draw_thin(*shape, dtype), thin, thin_stock, lambda *t: thin_stock(*as_double(t))
    )


@pytest.mark.gpu
@reads_once
@pytest.mark.usefixtures("always")
def test_gradients_of_parts_of_t_repeat_bit_for_bit() -> None:
    dy, up, _, like = draw_thin(2100, 520, 16, torch.bfloat16)
    joined_t = torch.randn(2100, 40, device="cuda").bfloat16()
    wide = torch.randn(2100, 600, device="cuda").bfloat16()
    dy = wide[:, 16:536]
    u = torch.full((2100, 40), 7.0, device="cuda", dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        part = u[:, 8:24]
        db = low_rank_gradients(dy, up, joined_t[:, 8:24], part, like.bfloat16(), 1.0)
        assert db is not None and db.dtype is torch.bfloat16
        results.append((part.clone(), db))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert (u[:, :8] == 7).all() and (u[:, 24:] == 7).all()
    expected = (dy.double() @ up.double(), dy.double().T @ joined_t[:, 8:24].double())
    for mine, truth in zip(results[0], expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2**-8, atol=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_adapters_are_scaled_and_rounded_once(given: torch.dtype) -> None:
    ranks, outs = (16, 3, 9), (24, 520, 8)
    a = [torch.randn(r, 200, device="cuda", dtype=given) for r in ranks]
    b = [torch.randn(o, r, device="cuda", dtype=given) for r, o in zip(ranks, outs, strict=True)]
    joined_a, scaled = low_ranks(a, b, (2.0, 0.3, 1.0), torch.float16)
    expected_a, expected = low_ranks(
        [p.cpu() for p in a], [p.cpu() for p in b], (2.0, 0.3, 1.0), torch.float16
    )
    assert joined_a.shape == (16 + 8 + 16, 200)
    for mine, on_cpu in zip((joined_a, *scaled), (expected_a, *expected), strict=True):
        assert torch.equal(mine.cpu(), on_cpu)


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("case", ["no rows", "other 16 bits", "strided bias"])
def test_what_kernels_do_not_take(case: str) -> None:
    rows = 0 if case == "no rows" else 300
    x = torch.randn(rows, 200, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(264, 200, device="cuda").bfloat16()
    dtype = torch.float16 if case == "other 16 bits" else torch.bfloat16
    a, b = (torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in ((8, 200), (264, 8)))
    bias = torch.randn(264, 3, device="cuda").bfloat16()[:, 1]
    with torch.autocast("cuda", torch.bfloat16):
        y = lora_linear(x, weight, a, b, 2.0, bias=bias, backend="cuda")
        expected = lora_linear(x, weight, a, b, 2.0, bias=bias, backend="torch")
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=1.0)
    grads = torch.autograd.grad(y.sum(), (x, a, b))
    assert [g.shape for g in grads] == [x.shape, a.shape, b.shape]
    assert all(g.isfinite().all() for g in grads) and (rows or not any(g.any() for g in grads))


@pytest.mark.gpu
@on_hopper
def test_lora_linear_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def seen(*arguments: Any) -> bool:
        taken.append(summed_products(*arguments))
        return taken[-1]

    monkeypatch.setattr("barqtrain_hf.ops.lora.summed_products", seen)
    x = torch.randn(4096, 520, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(2048, 520, device="cuda").bfloat16()
    a, b = (torch.randn(s, device="cuda").requires_grad_() for s in ((4, 520), (2048, 4)))
    with torch.autocast("cuda", torch.bfloat16):
        lora_linear(x, weight, a, b, 2.0).sum().backward()
    assert taken == [True, False]  # dx has 48 tiles for 66 clusters


def test_elsewhere_it_is_left_to_pytorch() -> None:
    out, low = torch.zeros(4, 8), torch.ones(4, 8)
    assert not summed_products(out, [(low, torch.ones(8, 8))], True)
    assert low_rank_gradients(low, torch.ones(8, 8), low, out, torch.ones(8, 8), 1.0) is None
    assert not out.any()
