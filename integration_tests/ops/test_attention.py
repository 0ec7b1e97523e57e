"""flash_attention against fp64 and against PyTorch's own attention.

On a CPU PyTorch's path runs, on a GPU the kernel; long rows only there.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    DIMS,
    HALF,
    LONG,
    MIXED,
    ONES,
    PACKED,
    ROPES,
    SOFTCAPS,
    WINDOWS,
    Case,
    assert_as_accurate,
    cu_seqlens,
    draw,
    equal,
    exact,
    ours,
    rope_of,
    tiles_of,
)
from norm_cases import misaligned
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.ops import (
    Rope,
    _attention_autograd,
    _documents,
    apply_rope,
    attention,
    flash_attention,
)
from barqtrain_hf.ops._attention_call import call_for
from barqtrain_hf.ops.attention import flash_attention_reference

BACKENDS = ["torch", pytest.param("cuda", marks=pytest.mark.gpu)]
NUMBERS = (True, 0.125, None, None)  # causal, scale, window, softcap


def on(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_stock(case: Case, dtype: torch.dtype, backend: str) -> None:
    draws = 2 if backend == "torch" else 8 if case.tokens < 100 else 4
    assert_as_accurate(case, dtype, backend, draws)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows_as_accurate_as_stock(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate(case, dtype, "cuda", draws=1)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(33000,), (5, 33000, 130)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_document_longer_than_32k(lengths: tuple[int, ...], dim: int) -> None:
    assert_as_accurate(Case(lengths, heads=(2, 1), dim=dim), torch.bfloat16, "cuda", draws=1)


@pytest.mark.parametrize("case", [c for c in CASES if c.dim == 64], ids=str)
def test_torch_path_is_the_definition(case: Case) -> None:
    inputs = draw(case, torch.float32, "cpu")
    for mine, truth in zip(ours(case, "torch")(*inputs), exact(case)(*inputs), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [*PACKED[:2], *WINDOWS[:3], *SOFTCAPS, ROPES[3]], ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    inputs = draw(case, torch.float32, "cpu")
    rope = rope_of(case, *inputs[4:])
    out = flash_attention_reference(
        *inputs[:3], cu_seqlens=cu_seqlens(case, "cpu"), rope=rope, **case.named
    )
    torch.testing.assert_close(out.double(), exact(case)(*inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_rope_is_apply_rope_and_attention(batch: int, backend: str) -> None:
    for interleaved, size, shared in itertools.product((False, True), (64, 16), (False, True)):
        case = Case((150,), batch, rope="interleaved" if interleaved else "half")
        q, k, v, dout, cos, sin = draw(case, torch.bfloat16, on(backend))
        cos, sin = (t[: 1 if shared else batch, :, :size] for t in (cos, sin))
        fused = ours(case, backend)(q, k, v, dout, cos, sin)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        named = {"interleaved": interleaved, "unsqueeze_dim": 2, "keep_dtype": True}
        turned = apply_rope(q, k, cos, sin, **named)
        out = flash_attention(*turned, v, backend=backend)  # type: ignore[arg-type]
        for mine, other in zip(fused, [out, *torch.autograd.grad(out, leaves, dout)], strict=True):
            assert (mine - other).norm() <= 1e-2 * other.norm()


def test_tokens_too_far_apart_are_copied() -> None:
    far = torch.zeros(2**24 + 8, dtype=torch.bfloat16).as_strided((1, 2, 1, 8), (0, 2**24, 8, 1))
    assert _attention_autograd._vectors(far).is_contiguous()
    near = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)[..., :8]
    assert _attention_autograd._vectors(near) is near


def test_only_what_cannot_be_loaded_is_copied() -> None:
    q, k, v = (torch.randn(1, 10, n, 64).half() for n in (4, 2, 2))
    wide = torch.randn(1, 10, 2, 68).half()[..., :64]
    for given in ((q, k, v), (q, k, misaligned(v)), (q, wide, v)):
        strides = tuple(x.stride() for x in given)
        with tiles_of((8, 0)):
            call = call_for(0, q.dtype, q.shape, k.shape, strides, False, None, *NUMBERS)
            found, *loaded, _, _ = _attention_autograd._loadable(call, *given, None, None)
        assert found.loadable and found.strides == tuple(x.stride() for x in loaded)
        for one, other in zip(given, loaded, strict=True):
            good = one.stride() == other.stride() and not one.data_ptr() % 16
            assert (one is other) == good and torch.equal(one, other)
            assert not other.data_ptr() % 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_any_size(backend: str) -> None:
    q, k, v = (torch.randn(1, 5, 2, 8, device=on(backend)).bfloat16() for _ in range(3))
    whole = flash_attention(q, k, v, backend=backend)
    assert torch.equal(flash_attention(q, k, v, window=2**40, backend=backend), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_misaligned_inputs(backend: str) -> None:
    case = Case((1, 64, 70), heads=(4, 2), rope="half")
    q, k, v, dout, cos, sin = draw(case, torch.bfloat16, on(backend))
    expected = ours(case, backend)(q, k, v, dout, cos, sin)
    qkv = torch.cat((q, k, v), dim=2)
    fused = (qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:])
    layouts = {
        "heads first": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dout)],
        "fused projection": [*fused, dout],
        "misaligned": [misaligned(t) for t in (q, k, v, dout)],
        "odd strides": [torch.nn.functional.pad(t, (0, 1))[..., :-1] for t in (q, k, v, dout)],
        "last dimension strided": [torch.stack((t, t), -1)[..., 0] for t in (q, k, v, dout)],
    }
    strided = [torch.stack((t, t), -1)[..., 0] for t in (cos, sin)]
    for name, views in layouts.items():
        angles = [misaligned(t) for t in (cos, sin)] if name == "misaligned" else strided
        results = ours(case, backend)(*views, *angles)
        assert results[0].is_contiguous(), name
        for mine, other in zip(results, expected, strict=True):
            if backend == "cuda":
                assert torch.equal(mine, other), name
            else:
                torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)
    one = dout[:, :, :1].expand_as(dout)
    shared = ours(case, backend)(q, k, v, one, cos, sin)
    assert equal(shared, ours(case, backend)(q, k, v, one.contiguous(), cos, sin))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 0, 4, 64), (2, 0, 4, 64), (0, 5, 4, 64)], ids=str)
def test_nothing_to_attend(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape, dtype=torch.bfloat16, device=on(backend), requires_grad=True)
    bounds = torch.zeros(1, dtype=torch.int32, device=x.device)
    angles = torch.empty(1, shape[1], 64, device=x.device)
    for named in ({}, {"rope": Rope(angles, angles)}, {"cu_seqlens": bounds}):
        if "cu_seqlens" in named and shape[:2] != (1, 0):
            continue
        out = flash_attention(x, x, x, backend=backend, **named)  # type: ignore[arg-type]
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape


ALONE = [
    Case(MIXED, rope="half"),
    Case(ONES, heads=(4, 1), rope="partial"),
    Case((65, 300, 64), dim=128, causal=False),
    Case((65, 300, 64), window=70, rope="interleaved"),
    Case((65, 130), softcap=20.0),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_documents_are_as_if_alone(case: Case, backend: str) -> None:
    inputs = draw(case, torch.bfloat16, on(backend))
    together = ours(case, backend)(*inputs)
    start = 0
    for length in case.lengths:
        mine = [t[:, start : start + length] for t in inputs]
        alone = ours(case._replace(lengths=(length,)), backend)(*mine)
        assert equal(alone, [t[:, start : start + length] for t in together])
        start += length


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_documents_never_leak(case: Case, backend: str) -> None:
    inputs = draw(case, torch.bfloat16, on(backend))
    before = ours(case, backend)(*inputs)
    start, end = sum(case.lengths[:1]), sum(case.lengths[:2])
    for value in (1e4, float("nan")):  # not even what 0 times it would give
        for tensor in inputs:
            tensor[:, start:end] = value
        after = ours(case, backend)(*inputs)
        for part in (slice(0, start), slice(end, None)):
            assert equal([t[:, part] for t in after], [t[:, part] for t in before])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*ALONE, *LONG[:3], LONG[-1], DIMS[5]], ids=str)
def test_kernel_repeats_bit_for_bit(case: Case) -> None:
    inputs = draw(case, torch.bfloat16, "cuda")
    first = ours(case, "cuda")(*inputs)
    for _ in range(10):
        assert equal(first, ours(case, "cuda")(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("rope", [True, False])
def test_without_gradients_the_result_is_the_same_and_nothing_is_kept(rope: bool) -> None:
    q, k, v = (torch.randn(1, 300, n, 64, device="cuda").half() for n in (4, 2, 2))
    angles = Rope(*(torch.randn(1, 300, 64, device="cuda").half() for _ in "cs")) if rope else None
    expected = flash_attention(q.requires_grad_(), k, v, rope=angles, backend="cuda")
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        result = flash_attention(q, k, v, rope=angles, backend="cuda")
    assert torch.cuda.memory_allocated() - before <= result.nbytes + 512
    assert torch.equal(result, expected) and not result.requires_grad
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        flash_attention(forward_ad.make_dual(q, q), k, v, rope=angles, backend="cuda")


def test_compiled_torch_path_has_no_graph_break() -> None:
    case = Case((20,), 2, window=5, rope="half")
    q, k, v, _, cos, sin = draw(case, torch.float32, "cpu")

    def attend(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> Any:
        return flash_attention(q, k, v, rope=Rope(cos, sin), window=5) * 1.0

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, cos, sin), attend(q, k, v, cos, sin))


def test_compiled_torch_path_with_documents_is_not_compiled_again() -> None:
    compiled = torch.compile(
        lambda q, bounds: flash_attention(q * 2.0, q, q, cu_seqlens=bounds) * 1.0,
        backend=torch._dynamo.testing.CompileCounter(),
    )
    q = torch.randn(1, 20, 2, 16)
    for cut in (3, 4, 5):
        bounds = torch.tensor([0, cut, 20], dtype=torch.int32)
        with torch._dynamo.config.patch(error_on_recompile=cut > 3):
            out = compiled(q, bounds)
        torch.testing.assert_close(out, flash_attention(q * 2.0, q, q, cu_seqlens=bounds))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [Case(MIXED, window=70, rope="half"), Case((130,), 2, softcap=20.0)], ids=str
)
def test_compiled_kernel_has_no_graph_break(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(case, torch.bfloat16, "cuda")
    bounds = cu_seqlens(case, "cuda")

    def layers(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> Any:
        named = {"cu_seqlens": bounds, "rope": rope_of(case, cos, sin), **case.named}
        for _ in range(2):
            q = flash_attention(q * 1.0, k, v, backend="cuda", **named)
        return q * 1.0

    def graded(function: Any) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        out = function(*leaves, *inputs[4:])
        return [out, *torch.autograd.grad(out, leaves, inputs[3])]

    reads = count_reads(monkeypatch)
    assert equal(graded(torch.compile(layers, fullgraph=True)), graded(layers))
    assert len(reads) == (bounds is not None)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    read = _documents._to_host
    reads: list[torch.Tensor] = []

    def counted(tensor: torch.Tensor) -> list[int]:
        reads.append(tensor)
        return read(tensor)

    monkeypatch.setattr(_documents, "_to_host", counted)
    return reads


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_is_read_once_for_all_layers(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    x = torch.randn(1, 10, 2, 64, dtype=torch.bfloat16, device=on(backend), requires_grad=True)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32, device=x.device)

    def layer() -> None:
        named = {"cu_seqlens": bounds, "backend": backend}
        torch.autograd.grad(flash_attention(x, x, x, **named).mean(), x)  # type: ignore[arg-type]

    layer()
    if backend == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        if backend == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1
    before = flash_attention(x, x, x, cu_seqlens=bounds)
    bounds[1] = 7
    assert not torch.equal(before, flash_attention(x, x, x, cu_seqlens=bounds))
    assert len(reads) == 2
    bounds[1] = 12
    with pytest.raises(ArgumentError, match=r"cu_seqlens\[2\] = 10 is not more than .* = 12"):
        layer()
    with pytest.raises(ArgumentError, match="ends at 4 and q has 10 tokens"):
        flash_attention(x, x, x, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32).to(x.device))
    with torch.inference_mode():  # where tensors do not say when they change
        bounds = torch.tensor([0, 4, 10], dtype=torch.int32, device=x.device)
        one = flash_attention(x, x, x, cu_seqlens=bounds)
        bounds[1] = 7
        assert not torch.equal(one, flash_attention(x, x, x, cu_seqlens=bounds))


@pytest.mark.gpu
def test_cuda_graphs() -> None:
    x = torch.randn(1, 100, 2, 64, dtype=torch.bfloat16, device="cuda")
    bounds = torch.tensor([0, 40, 100], dtype=torch.int32, device="cuda")
    expected = flash_attention(x, x, x, backend="cuda")
    flash_attention(x, x, x, cu_seqlens=bounds, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(x, x, x, backend="cuda")
        with pytest.raises(UnsupportedError, match="capture without cu_seqlens"):
            flash_attention(x, x, x, cu_seqlens=bounds, backend="cuda")
    graph.replay()
    assert torch.equal(out, expected)


def test_autocast_casts_as_stock_does() -> None:
    x = torch.randn(1, 20, 2, 16)
    expected = flash_attention(*(x.bfloat16(),) * 3, softcap=5.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(x, x, x.bfloat16(), softcap=5.0)
        assert (
            torch.nn.functional.scaled_dot_product_attention(x, x, x.bfloat16()).dtype is out.dtype
        )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_angles_that_need_gradients_get_them(device: str) -> None:
    case = Case((20,), 1, rope="half")
    q, k, v, dout, cos, sin = draw(case, torch.bfloat16, device)
    rope = Rope(cos.requires_grad_(), sin.requires_grad_())
    grads = torch.autograd.grad(flash_attention(q, k, v, rope=rope), tuple(rope)[:2], dout)
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [Case(MIXED, softcap=20.0), Case(MIXED, rope="half", softcap=20.0), Case((130,), 2), ALONE[3]],
    ids=str,
)
def test_second_derivative_is_right_or_refused(case: Case, backend: str) -> None:
    dtype = torch.float32 if backend == "torch" else torch.float16
    inputs = draw(case, dtype, on(backend))
    named = {"cu_seqlens": cu_seqlens(case, on(backend)), "rope": rope_of(case, *inputs[4:])}
    named |= case.named
    seconds = []
    for function in (flash_attention, flash_attention_reference):
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        more = {"backend": backend} if function is flash_attention else {}
        out = function(*leaves, **named, **more)
        if backend == "cuda" and case.rope and function is flash_attention:
            with pytest.raises(UnsupportedError, match=r"RoPE inside .* apply_rope before"):
                torch.autograd.grad(out, leaves, inputs[3], create_graph=True)
            return
        grads = torch.autograd.grad(out, leaves, inputs[3], create_graph=True)
        total = sum(g.float().square().sum() for g in grads)
        if backend == "torch" and case.softcap is None and function is flash_attention:
            with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
                torch.autograd.grad(total, leaves)
            return
        seconds.append(torch.autograd.grad(total, leaves))
    for mine, theirs in zip(*seconds, strict=True):
        assert (mine - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.gpu
def test_what_the_kernel_does_not_take() -> None:
    x = torch.randn(1, 20, 2, 264, device="cuda").bfloat16()
    for wrong, message in ((x, "264"), (x[..., :20], "20"), (x[..., :64].float(), "float32")):
        with pytest.raises(UnsupportedError, match=f"'cuda' cannot be used: .*{message}"):
            flash_attention(wrong, wrong, wrong, backend="cuda")
        expected = flash_attention_reference(wrong, wrong, wrong)
        torch.testing.assert_close(
            flash_attention(wrong, wrong, wrong), expected, rtol=2e-2, atol=2e-2
        )
    angles = torch.ones(1, 20, 64, device="cuda").half()
    with pytest.raises(UnsupportedError, match=r"q is torch\.bfloat16 and cos torch\.float16"):
        flash_attention(*(x[..., :64],) * 3, rope=Rope(angles, angles), backend="cuda")
    with pytest.raises(ArgumentError, match="cu_seqlens is on cpu and q on cuda:0"):
        flash_attention(x, x, x, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))


def many_rows(rows: int) -> tuple[torch.Tensor, Rope]:
    x = torch.randn(rows, 2, 1, 64, device="cuda").bfloat16()
    angles = torch.rand(1, 2, 64, device="cuda")
    return x, Rope(angles.cos().bfloat16(), angles.sin().bfloat16())


def test_more_rows_than_a_grid_has_for_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks alone, on tensors that hold nothing: they need no GPU."""
    attended: list[tuple[Any, torch.Size]] = []

    def traced(q: torch.Tensor, k: Any, v: Any, cos: Any, *_: Any) -> torch.Tensor:
        attended.append((cos, q.shape))
        return q

    with FakeTensorMode():
        x, rope = many_rows(65537)
        for op in (
            lambda: apply_rope(x, x, *rope[:2], unsqueeze_dim=2, backend="cuda"),
            lambda: flash_attention(x, x, x, rope=rope, backend="cuda"),
        ):
            with pytest.raises(UnsupportedError, match=r"there are 65537 rows, more than .*65535"):
                op()
        # And with a GPU.
        monkeypatch.setattr(attention, "use_cuda", lambda op, backend, q, reason: reason is None)
        monkeypatch.setattr(attention, "_plan", attention._make_plan)
        monkeypatch.setattr(attention, "call_for", lambda *_: None)
        monkeypatch.setattr(attention._attention_tilings, "unsupported", lambda *_: None)
        monkeypatch.setattr(attention._attention_autograd, "traced", traced)
        flash_attention(x, x, x, rope=rope)
        assert attended == [(None, x.shape)]
        flash_attention(x[:65535], x[:65535], x[:65535], rope=rope)
        assert attended[1:] == [(rope.cos, (65535, *x.shape[1:]))]


@pytest.mark.gpu
def test_more_rows_than_a_grid_has() -> None:
    x, rope = many_rows(65536)
    out = flash_attention(x, x, x, rope=rope)
    for rows in (slice(0, 3), slice(-3, None)):
        expected = flash_attention_reference(x[rows], x[rows], x[rows], rope=rope)
        torch.testing.assert_close(out[rows], expected, rtol=2e-2, atol=2e-2)


def test_bad_arguments_name_the_argument() -> None:
    x = torch.randn(1, 10, 4, 8)

    def refused(message: str, q: Any = x, k: Any = x, v: Any = x, **named: Any) -> None:
        with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
            flash_attention(q, k, v, **named)

    def bounds(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    refused("cu_seqlens starts at 2; it must start at 0", cu_seqlens=bounds(2, 10))
    refused(r"cu_seqlens\[2\] = 3 is not more than .* = 4", cu_seqlens=bounds(0, 4, 3, 10))
    refused("leave empty documents out", cu_seqlens=bounds(0, 4, 4, 10))
    refused("cu_seqlens ends at 9 and q has 10 tokens", cu_seqlens=bounds(0, 4, 9))
    refused("cu_seqlens is torch.int64; cast", cu_seqlens=bounds(0, 10, dtype=torch.int64))
    refused(r"cu_seqlens of shape \(1, 2\)", cu_seqlens=bounds(0, 10)[None])
    refused(r"cu_seqlens of shape \(0,\)", cu_seqlens=bounds())
    meta = torch.empty(2, dtype=torch.int32, device="meta")
    refused("cu_seqlens is on meta and q on cpu; move", cu_seqlens=meta)
    rows = x.view(2, 5, 4, 8)
    refused("q has 2 rows, and cu_seqlens", rows, rows, rows, cu_seqlens=bounds(0, 5))
    refused("max_seqlen=5, but .* document of 6", cu_seqlens=bounds(0, 4, 10), max_seqlen=5)
    refused("max_seqlen=5 needs cu_seqlens", max_seqlen=5)
    refused("q is torch.float32, k torch.float32 and v torch.bfloat16; cast", v=x.bfloat16())
    refused("q is torch.float64", x.double(), x.double(), x.double())
    refused("4 query heads cannot share 3 key heads", k=x[:, :, :3], v=x[:, :, :3])
    refused("4 query heads cannot share 0 key heads", k=x[:, :, :0], v=x[:, :, :0])
    refused(r"k of \(1, 10, 4, 8\) and v of \(1, 10, 2, 8\)", v=x[:, :, :2])
    for other in (x[:, :9], x[..., :4], x.expand(2, 10, 4, 8), x[0]):
        refused("of one B, T and D", k=other, v=other)
    refused("must be .B, T, heads, D.", x[..., :0], x[..., :0], x[..., :0])
    refused("window=0 must be", window=0)
    refused("window=2.5 must be", window=2.5)
    refused("softcap=0.0 must be positive", softcap=0.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refused("scale=.* must be positive", scale=scale)
    refused("backend='gpu'", backend="gpu")
    cos = torch.ones(1, 10, 8)
    refused("rope is a tuple; pass Rope", rope=(cos, cos))
    refused("cos is torch.float32 and sin torch.bfloat16", rope=Rope(cos, cos.bfloat16()))
    refused("cos is torch.float64", rope=Rope(cos.double(), cos.double()))
    for wrong in (cos[:, 1:], cos[..., :3], torch.ones(1, 10, 10), cos[0], cos.expand(2, 10, 8)):
        refused("an even number of angles up to 8", rope=Rope(wrong, wrong))
    with pytest.raises(UnsupportedError, match="cpu; move it to a CUDA device"):
        flash_attention(x, x, x, backend="cuda")
