"""The shapes of the attention benchmark, and all that compute them.

Positions of packed rows start again with each document, and so do the angles of RoPE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from barqtrain_hf.benchmarks import attention_anchors as anchors
from barqtrain_hf.benchmarks.elementwise import OURS
from barqtrain_hf.benchmarks.elementwise_anchors import Implementation, Tensors
from barqtrain_hf.ops import (
    Rope,
    _attention_autograd,
    _attention_kernels,
    apply_rope,
    flash_attention,
)
from barqtrain_hf.ops._attention_call import Call, OfThree, call_for
from barqtrain_hf.ops._attention_tilings import tiling_on
from barqtrain_hf.ops._backend import Backend

NO_ROPE, ROPE_BEFORE = "ours, without RoPE", "ours" + anchors.AFTER_ROPE
BARE = "ours, its buffers and launches alone"
ELEMENTWISE = "for scale: torch.mul(x, 2.0, out=x)"
AUTO = 'ours, backend="auto"'
# By mma.sync and cp.async, as GPUs without kernels of their own get them: with the shared memory of an H200
# or a B200, and with an A100's.
PORTABLE, PORTABLE_163 = "ours, portable kernels", "ours, portable kernels in 163 KB (A100)"
_THETA = 500_000.0


@dataclass(frozen=True)
class Case:
    """One shape; ``lengths`` are the documents of a packed row."""

    batch: int
    tokens: int
    dim: int
    lengths: tuple[int, ...] = ()
    heads: int = 32
    key_heads: int = 8
    flex_bar: float | None = None  # at most this share of flex_attention's time
    barred: bool = True  # whether its speed has a bar

    def __str__(self) -> str:
        if self.lengths:
            return f"{self.tokens} tokens in {len(self.lengths)} documents, D{self.dim}"
        return f"B{self.batch} S{self.tokens} D{self.dim}"

    @property
    def part(self) -> str:
        """Where its rows stand in the report."""
        return "packed" if self.lengths else "dense" if self.barred else "short"

    def tflops(self, direction: str, ms: float) -> float:
        """Useful TFLOP/s of a call that took ``ms``."""
        pairs = sum(n * n / 2 for n in self.lengths or (self.tokens,) * self.batch)
        products = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[direction]
        return products * 4 * self.heads * self.dim * pairs / ms / 1e9

    def inputs(self, dtype: torch.dtype, device: str) -> Tensors:
        """Queries, keys and values; the same at every call."""
        torch.manual_seed(0)
        heads = (self.heads, self.key_heads, self.key_heads)
        shapes = ((self.batch, self.tokens, number, self.dim) for number in heads)
        return tuple(
            torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes
        )

    def boundaries(self, device: str) -> torch.Tensor:
        """cu_seqlens of the documents."""
        ends = [0, *np.cumsum(self.lengths).tolist()]
        return torch.tensor(ends, dtype=torch.int32, device=device)

    def rope(self, dtype: torch.dtype, device: str) -> Rope:
        """Angles of every token; positions start again with each document."""
        positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device).float()
        frequencies = _THETA ** -(torch.arange(0, self.dim, 2, device=device).float() / self.dim)
        angles = positions.outer(frequencies).repeat(1, 2)[None]
        return Rope(angles.cos().to(dtype), angles.sin().to(dtype))


def lognormal_lengths(tokens: int) -> tuple[int, ...]:
    """Documents of 16 to 4096 tokens, some 400 on average, the last one cut: 45 in 16384 tokens."""
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(generator.lognormal(5.7, 0.8), 16, 4096)))
    lengths[-1] -= sum(lengths) - tokens
    return tuple(lengths)


DENSE = (Case(4, 4096, 128), Case(4, 4096, 64), Case(1, 32768, 128))
# Where ops/_attention_choice.py begins to leave dense rows to cuDNN.
SHORT = tuple(Case(16, 1024, dim, barred=False) for dim in (128, 64))
DOCUMENTS = lognormal_lengths(16384)
PACKED = (
    Case(1, 16384, 64, DOCUMENTS, flex_bar=0.45),
    Case(1, 16384, 128, DOCUMENTS, flex_bar=0.55),
)
HOST = Case(1, 128, 64, (17, 64, 47), heads=4, key_heads=2)
ERRORS = tuple(Case(2, 1000, dim, heads=8, key_heads=2) for dim in (64, 128))


def portable(
    capability: tuple[int, int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """`flash_attention` of dense rows by the kernels of another GPU."""
    strides = (q.stride(), k.stride(), v.stride())
    call = _portable_call(capability, q.get_device(), q.dtype, (q.shape, k.shape), strides)
    return _attention_autograd.run(call, q, k, v, None, None, None, None)


@lru_cache
def _portable_call(
    capability: tuple[int, int],
    device: int,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    strides: OfThree,
) -> Call:
    dim = shapes[0][3]
    numbers = (True, dim**-0.5, None, None)
    call = call_for(device, dtype, *shapes, strides, False, None, *numbers)
    return replace(call, tiling=tiling_on(capability, dim, False))


def bare(case: Case, inputs: Tensors) -> Callable[[], None]:
    """What a forward call with RoPE cannot do without: its two buffers and two launches, all else known."""
    q, k, v = (x.detach() for x in inputs)
    rope, table = case.rope(q.dtype, "cuda"), case.boundaries("cuda")
    angles = (rope.cos.shape, rope.cos.dtype, False)
    numbers = (True, case.dim**-0.5, None, None)
    strides = (q.stride(), k.stride(), v.stride())
    call = call_for(q.get_device(), q.dtype, q.shape, k.shape, strides, True, angles, *numbers)
    turn, ((attend, tiles),), table_of_tiles = _attention_kernels._forward(call, table)
    out, kept = _attention_kernels.outputs(q, call.kept)
    turned = (kept.data_ptr(), kept.data_ptr() + call.kept.k)
    angled = (rope.cos.data_ptr(), rope.sin.data_ptr(), 0)
    results = (out.data_ptr(), kept.data_ptr() + call.kept.lse, tiles)
    loaded = (q.data_ptr(), k.data_ptr(), *angled, *turned)
    attended = (*turned, v.data_ptr(), *results)

    def run(_: object) -> None:
        _attention_kernels.outputs(q, call.kept)
        if turn is not None:
            turn(call.device, *loaded)
        attend(call.device, *attended)

    pointed_to = (q, k, v, rope, table_of_tiles, out, kept)
    return partial(run, pointed_to)  # which keeps it alive


@dataclass(frozen=True)
class Candidates:
    """All that compute one case, each with the one that it must agree with."""

    found: dict[str, Implementation]
    missing: dict[str, str]
    stock: Implementation
    stock_with_rope: Implementation

    def stock_of(self, name: str) -> Implementation:
        """PyTorch's attention, after RoPE where ``name`` has RoPE too."""
        with_rope = self.stock is not self.stock_with_rope and (
            name in (OURS, AUTO) or name.endswith(anchors.AFTER_ROPE)
        )
        return self.stock_with_rope if with_rope else self.stock


def candidates(
    case: Case, backend: Backend = "cuda", device: str = "cuda", flex: bool = True
) -> Candidates:
    """What computes a case on a device, ours with a backend."""
    if not case.lengths:
        found, missing = anchors.dense()
        dense: dict[str, Callable[..., Any]] = {
            OURS: partial(flash_attention, backend=backend),
            AUTO: partial(flash_attention, backend="auto"),
            PORTABLE: partial(portable, (10, 0)),
            PORTABLE_163: partial(portable, (8, 0)),
        }
        implementations = {name: Implementation(call) for name, call in dense.items()}
        stock = anchors.by_document((case.tokens,))
        return Candidates({**implementations, **found}, missing, stock, stock)
    rope, boundaries = case.rope(torch.bfloat16, device), case.boundaries(device)
    options: dict[str, Any] = {"cu_seqlens": boundaries, "max_seqlen": max(case.lengths)}
    ours: Callable[..., torch.Tensor] = partial(flash_attention, backend=backend, **options)

    def rotate(q: torch.Tensor, k: torch.Tensor, backend: Backend = backend) -> Any:
        return apply_rope(q, k, rope.cos, rope.sin, unsqueeze_dim=2, backend=backend)

    def rotated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turned_q, turned_k = rotate(q, k)
        return ours(turned_q, turned_k, v)

    found, missing = anchors.packed(case.lengths, boundaries, rotate, flex)
    calls: dict[str, Callable[..., Any]] = {
        OURS: partial(ours, rope=rope),
        AUTO: partial(flash_attention, backend="auto", rope=rope, **options),
        NO_ROPE: ours,
        ROPE_BEFORE: rotated,
    }
    implementations = {name: Implementation(call) for name, call in calls.items()}
    by_document = partial(anchors.by_document, case.lengths)
    exact_rope = partial(rotate, backend="torch")
    return Candidates({**implementations, **found}, missing, by_document(), by_document(exact_rope))
