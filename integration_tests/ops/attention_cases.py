"""Cases of attention, each as ours, as PyTorch's own kernels in the same dtype, and in fp64.

Lengths: about the tiles' sizes (64 and 128), one token, two, and primes far from them. Each feature (heads,
head dimensions, windows, softcaps, RoPE) is tried on a row whose documents end within a tile and on its edge.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import GATE
from torch.nn.attention import SDPBackend, sdpa_kernel

from barqtrain_hf.ops import Rope, _attention_call, attention, flash_attention
from barqtrain_hf.ops._attention_tilings import Tiling, tiling_on

Tensors = list[torch.Tensor]
# Root mean square of an error of no interest with inputs of N(0, 1): where a token sees itself
# only, dq and dk are 0 and every side returns the rounding error of an fp32 sum.
FLOOR = 1e-6
_CHUNK = 1024  # queries at a time in fp64


class Case(NamedTuple):
    """A dense batch (``batch`` rows of one length), or documents of ``lengths`` packed into a row."""

    lengths: tuple[int, ...]
    batch: int = 0
    heads: tuple[int, int] = (4, 2)
    dim: int = 64
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    rope: str = ""  # half, interleaved, or partial

    @property
    def named(self) -> dict[str, Any]:
        keys = ("causal", "scale", "window", "softcap")
        return {key: getattr(self, key) for key in keys}

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def __str__(self) -> str:
        packed = f"{len(self.lengths)}docs" if len(self.lengths) > 4 else ""
        parts = [packed or "+".join(map(str, self.lengths)), f"b{self.batch}" if self.batch else ""]
        parts += [
            f"h{self.heads[0]}.{self.heads[1]}",
            f"d{self.dim}",
            "" if self.causal else "full",
        ]
        for key in ("scale", "window", "softcap", "rope"):
            value = getattr(self, key)
            parts.append(f"{key}{value}" if value else "")
        return "-".join(part for part in parts if part)


HALF = [torch.bfloat16, torch.float16]
MIXED = (1, 64, 70, 1, 129)
ONES = (1,) * 40 + (130,) + (1,) * 5

LENGTHS = [Case((n,), batch=2) for n in (1, 2, 63, 64, 65, 127, 128, 129)]
PACKED = [Case(MIXED), Case(ONES), Case((1,) * 7), Case((200,)), Case((128, 64))]
HEADS = [Case((1, 64, 70), heads=h) for h in ((1, 1), (4, 4), (4, 1), (6, 2), (32, 8))]
DIMS = [Case((1, 130, 64), dim=d, heads=(2, 1)) for d in (32, 40, 80, 96, 128, 256)]
FULL = [case._replace(causal=False) for case in (LENGTHS[2], LENGTHS[7], *PACKED[:2], *DIMS[4:])]
WINDOWS = [
    Case((1, 200, 33), heads=(2, 1), window=window, causal=causal, rope=rope)
    for window, (causal, rope) in itertools.product(
        (1, 7, 64, 130), ((True, ""), (False, ""), (True, "half"))
    )
]
# A scale at which the cap bends the scores.
SOFTCAPS = [
    Case((1, 130, 64), heads=(2, 1), softcap=softcap, scale=1.0, causal=causal, window=window)
    for softcap, causal, window in ((20.0, True, None), (50.0, False, None), (20.0, True, 64))
]
SCALES = [Case(MIXED, heads=(2, 1), scale=scale) for scale in (0.02, 0.5)]
ROPES = [
    Case(lengths, batch, heads=(4, 2), dim=dim, rope=rope)
    for (lengths, batch), dim, rope in itertools.product(
        (((130,), 2), (MIXED, 0)), (64, 128), ("half", "interleaved", "partial")
    )
]
CASES = [*LENGTHS, *PACKED, *HEADS, *DIMS, *FULL, *WINDOWS, *SOFTCAPS, *SCALES, *ROPES]
LONG = [
    *(Case((n,), batch, dim=d) for n, batch in ((1000, 2), (4097, 1)) for d in (64, 96, 128)),
    *(Case((n,), 1, causal=False) for n in (1000, 4097)),
    *(Case((1, 1000, 63, 4097, 2), dim=d, rope="half") for d in (64, 128)),
    Case((4097, 1, 500), window=1000, rope="interleaved"),
    Case((1000, 1, 500), dim=256, rope="partial"),
    *(Case((2500,), 1, dim=d, heads=(4, 1), causal=False) for d in (32, 80, 256)),
    Case((1,) * 3000 + (600,), heads=(2, 1)),
]


class Gpu(NamedTuple):
    """Another GPU; ``dim`` and ``dtypes`` are what its kernels take."""

    capability: tuple[int, int]
    dim: int = 256
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def __str__(self) -> str:
        return "sm_{}{}".format(*self.capability)


# T4, A100, RTX 3090 (as RTX 4090 and 5090), B200.
OTHER_GPUS = [Gpu((7, 5), 128, (torch.float16,)), Gpu((8, 0)), Gpu((8, 6)), Gpu((10, 0))]


@contextlib.contextmanager
def tiles_of(capability: tuple[int, int]) -> Iterator[None]:
    """The kernels that a GPU of another compute capability gets, with their tiles."""

    def tiling(device: int, dim: int, capped: bool) -> Tiling:
        return tiling_on(capability, dim, capped)

    def forget() -> None:
        _attention_call.call_for.cache_clear()
        attention._plan.cache_clear()

    with contextlib.ExitStack() as at_exit:
        at_exit.callback(forget)
        patch = at_exit.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(_attention_call, "tiling", tiling)
        forget()
        yield


def cu_seqlens(case: Case, device: str) -> torch.Tensor | None:
    if case.batch:
        return None
    bounds = [0, *accumulate(case.lengths)]
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def draw(case: Case, dtype: torch.dtype, device: str) -> Tensors:
    """q, k, v, the output's gradient, cos and sin; the last two have no angles without RoPE."""
    rows, tokens = max(1, case.batch), case.tokens

    def heads(count: int) -> torch.Tensor:
        return torch.randn(rows, tokens, count, case.dim, device=device).to(dtype)

    many, few = case.heads
    q, k, v, dout = heads(many), heads(few), heads(few), heads(many)
    size = {"": 0, "partial": case.dim // 4}.get(case.rope, case.dim)
    # Halves that differ: the formula must not rely on their being equal.
    angles = torch.rand(rows, tokens, size, device=device) * 6.3
    angle_dtype = torch.float32 if case.rope == "interleaved" else dtype
    return [q, k, v, dout, angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)]


def rope_of(case: Case, cos: torch.Tensor, sin: torch.Tensor) -> Rope | None:
    return Rope(cos, sin, case.rope == "interleaved") if case.rope else None


def equal(mine: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def ours(case: Case, backend: str, **named: Any) -> Any:
    """A function of `draw`'s tensors that returns the output, dq, dk and dv."""

    def call(q: Any, k: Any, v: Any, dout: Any, cos: Any, sin: Any) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        options = {"cu_seqlens": cu_seqlens(case, q.device), "rope": rope_of(case, cos, sin)}
        options |= {"backend": backend, **case.named, **named}
        out = flash_attention(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return call


def stock(case: Case) -> Any:
    """The same by PyTorch: RoPE rounded once, then SDPA, or Gemma 2's eager attention with a softcap."""

    def call(q: Any, k: Any, v: Any, dout: Any, cos: Any, sin: Any) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        turned = [turn(case, x, cos, sin).to(x.dtype) for x in leaves[:2]]
        rows = [x.transpose(1, 2) for x in (*turned, leaves[2])]
        bounds = [0, *accumulate(case.lengths)]
        docs = [
            _stock_document(case, *(x[:, :, start:end] for x in rows))
            for start, end in pairwise(bounds)
        ]
        out = torch.cat(docs, dim=2).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return call


def _stock_document(case: Case, q: Any, k: Any, v: Any) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    scale = case.dim**-0.5 if case.scale is None else case.scale
    plain = case.window is None and case.softcap is None
    if plain:
        fused = q.is_cuda and q.dtype is not torch.float32
        only = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if fused else contextlib.nullcontext()
        with only:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, scale=scale, enable_gqa=group > 1
            )
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = _seen(case, 0, q.shape[2], q.shape[2], q.device)
    if case.softcap is None:
        only = (
            sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if q.is_cuda else contextlib.nullcontext()
        )
        with only:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = case.softcap * torch.tanh(q @ k.transpose(2, 3) * scale / case.softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def exact(case: Case) -> Any:
    """The same in fp64, from the definition, some queries at a time so that a long document fits."""

    def call(*tensors: torch.Tensor) -> Tensors:
        q, k, v, dout, cos, sin = (t.double() for t in tensors)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        turned = [turn(case, x, cos, sin) for x in (q, k)] + [v]
        inputs = [t.detach().requires_grad_() for t in turned]
        out = torch.zeros_like(q)
        grads = [torch.zeros_like(t) for t in inputs]
        for start, end in pairwise([0, *accumulate(case.lengths)]):
            for first in range(start, end, _CHUNK):
                last = min(first + _CHUNK, end)
                y = _exact_rows(case, *inputs, start, first, last, end)
                out[:, first:last] = y.detach()
                for total, part in zip(
                    grads, torch.autograd.grad(y, inputs, dout[:, first:last]), strict=True
                ):
                    total += part
        return [out.detach(), *torch.autograd.grad(turned, leaves, grads)]

    return call


def _exact_rows(
    case: Case, q: Any, k: Any, v: Any, start: int, first: int, last: int, end: int
) -> torch.Tensor:
    """Queries first to last of the document of tokens start to end."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x[:, start:end].repeat_interleave(group, dim=2) for x in (k, v))
    scale = case.dim**-0.5 if case.scale is None else case.scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, first:last], keys) * scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    mask = _seen(case, first - start, last - start, end - start, q.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


def _seen(case: Case, first: int, last: int, keys: int, device: Any) -> torch.Tensor:
    """[last - first, keys]: which keys of its document a query sees."""
    i = torch.arange(first, last, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    seen = j <= i if case.causal else torch.ones_like(i + j, dtype=torch.bool)
    return seen if case.window is None else seen & ((i - j).abs() < case.window)


def turn(case: Case, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of [B, T, H, D] in fp32 or fp64, pair by pair: nothing shared with `apply_rope`."""
    if not case.rope:
        return x
    size = cos.shape[-1]
    one = torch.arange(size // 2, device=x.device)
    one, step = (2 * one, 1) if case.rope == "interleaved" else (one, size // 2)
    two = one + step
    x = x if x.dtype is torch.float64 else x.float()
    c, s = (t.to(x.dtype).unsqueeze(2) for t in (cos, sin))
    y = x.clone()
    y[..., one] = x[..., one] * c[..., one] - x[..., two] * s[..., one]
    y[..., two] = x[..., two] * c[..., two] + x[..., one] * s[..., two]
    return y


def assert_as_accurate(case: Case, dtype: torch.dtype, backend: str, draws: int) -> None:
    """As `oracle.assert_as_accurate`, where the truth may be 0."""
    device = "cuda" if backend == "cuda" else "cpu"
    sides = (ours(case, backend), stock(case), exact(case))
    totals = torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(draws):
        inputs = draw(case, dtype, device)
        for total, mine, theirs, truth in zip(totals, *(f(*inputs) for f in sides), strict=True):
            assert mine.shape == theirs.shape == truth.shape
            assert mine.dtype is theirs.dtype is dtype
            assert torch.isfinite(mine).all()
            errors = [(side.double() - truth).square().mean() for side in (mine, theirs)]
            total += torch.stack([*errors, truth.square().mean()]).cpu() / draws
    names = ("out", "dq", "dk", "dv")
    for name, (mine, theirs, truth) in zip(names, totals.sqrt().tolist(), strict=True):
        assert mine <= GATE * theirs + FLOOR, (
            f"{name}: error {mine:.3e}, stock {theirs:.3e}, of {truth:.3e}"
        )
