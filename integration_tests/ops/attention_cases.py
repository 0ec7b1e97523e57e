"""Cases of attention, each as ours, as PyTorch's own kernels in the same dtype, and in fp64."""

from __future__ import annotations

import contextlib
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import GATE
from torch.nn.attention import SDPBackend, sdpa_kernel

from barqtrain_hf.ops import Rope, flash_attention

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
