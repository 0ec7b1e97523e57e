"""What the attention kernels have to know of a call beside its tensors, worked out once for all like it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from barqtrain_hf.ops._attention_plan import View
from barqtrain_hf.ops._attention_tilings import Tiling, tiling

# Shape and dtype of cos, and interleaved.
Angles = tuple[tuple[int, ...], torch.dtype, bool]
Strides = tuple[int, ...]
OfThree = tuple[Strides, Strides, Strides]  # q, k and v

_NO_WINDOW = 2**30  # and no window is wider


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass beside its output, in one buffer of fp32.

    Turned q and k, contiguous, if there are angles, and the log2 of each sum of exp(scores), [Hq, B * T].
    One buffer, since each costs a microsecond or two to allocate and to save.

    Attributes:
        size: elements of the buffer.
        k, lse: where they start, in bytes; q is first.
    """

    size: int
    k: int
    lse: int

    @classmethod
    def of(cls, q_shape: tuple[int, ...], k_shape: tuple[int, ...], turned: bool) -> Kept:
        k = 2 * prod(q_shape) if turned else 0
        lse = k + 2 * prod(k_shape) if turned else 0
        return cls(lse // 4 + prod(q_shape[:3]), k, lse)


@dataclass(frozen=True, eq=False)  # equal if the same, so that its hash is a key that costs nothing
class Call:
    """What the kernels have to know of a call, documents apart.

    Attributes:
        device: index of the CUDA device.
        dtype: of q, k and v.
        q_shape, k_shape: [B, T, heads, D].
        strides: of q, k and v.
        packed: whether the row consists of documents.
        angles: of RoPE, or None.
        causal, scale, window, softcap: as `flash_attention` takes them.
        settings: the same as the kernels take them.
        tiling: the kernels.
        view: which keys a query sees.
        kept: for the backward pass.
    """

    device: int
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    strides: OfThree
    packed: bool
    angles: Angles | None
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    settings: tuple[float, ...]
    tiling: Tiling
    view: View
    kept: Kept

    @functools.cached_property
    def loadable(self) -> bool:
        """Whether the kernels can step through q, k and v, if they are aligned."""
        return all(map(are_vectors, self.strides))

    def strided(self, strides: OfThree) -> Call:
        """That of the same tensors with other strides."""
        shapes = (self.device, self.dtype, self.q_shape, self.k_shape, strides)
        numbers = (self.causal, self.scale, self.window, self.softcap)
        return call_for(*shapes, self.packed, self.angles, *numbers)


def contiguous(shape: tuple[int, ...]) -> Strides:
    """Strides of a contiguous [B, T, heads, D]."""
    _, length, heads, dim = shape
    return length * heads * dim, heads * dim, dim, 1


def are_vectors(strides: Strides) -> bool:
    """Whether heads are whole vectors of 16 bytes, and near enough."""
    # The kernels step over a tile's tokens, and from head to head, in 32 bits.
    batch, token, head, element = strides
    return element == 1 and not (batch | token | head) % 8 and token < 2**24 and head < 2**31


@functools.lru_cache(maxsize=1024)
def call_for(
    device: int,
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    strides: OfThree,
    packed: bool,
    angles: Angles | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Call:
    """The one object for such calls."""
    seen = min(window or _NO_WINDOW, _NO_WINDOW)
    return Call(
        device,
        dtype,
        q_shape,
        k_shape,
        strides,
        packed,
        angles,
        causal,
        scale,
        window,
        softcap,
        (scale, softcap or 0.0, causal, seen),
        tiling(device, q_shape[3], softcap is not None),
        View(causal, seen),
        Kept.of(q_shape, k_shape, angles is not None),
    )
