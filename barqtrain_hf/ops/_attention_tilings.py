"""Tile shapes of the attention kernels on each GPU, and what those take at all."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from barqtrain_hf.ops._backend import cached, capability

_PAD = 8  # elements between the rows of a tile in shared memory: kPitch of attention.cuh


class Pass(NamedTuple):
    """A kernel of the forward or backward pass.

    Attributes:
        name: of the kernel and of its file.
        template: its arguments after the dtype.
        rows, keys: of a tile.
        threads, shared_bytes: of a block.
    """

    name: str
    template: tuple[int, ...]
    rows: int
    keys: int
    threads: int
    shared_bytes: int

    @property
    def wgmma(self) -> bool:
        """Whether it is one of Hopper's."""
        return self.name.endswith("_hopper")


class Tiling(NamedTuple):
    """What runs for heads of up to ``dim`` dimensions.

    Attributes:
        dim: D.
        forward: the forward pass.
        backward: the launches of the backward pass.
    """

    dim: int
    forward: Pass
    backward: tuple[Pass, ...]


def _forward(dim: int, rows: int, keys: int, warps: int, blocks: int) -> Pass:
    """BM queries, BN keys, WARPS, BLOCKS on an SM."""
    shared = (rows + 2 * keys) * (dim + _PAD) * 2
    template = (dim, rows, keys, warps, blocks)
    return Pass("flash_attention", template, rows, keys, 32 * warps, shared)


def _backward(
    dim: int,
    rows: int,
    keys: int,
    warps: int,
    split: int,
    stages: tuple[int, int],
    blocks: int,
    parts: int = 1,
) -> tuple[Pass, ...]:
    """BM queries, BN keys, WARPS, SPLIT of which share keys, STAGES of queries and of dO, BLOCKS on an SM.

    In two parts, that of v and that of q and k, where the sums of all three do not fit into the registers.
    """
    pitch = dim + _PAD
    elements = (2 * keys + sum(stages) * rows) * pitch + split * keys * (rows + _PAD)
    shared = 2 * elements + 8 * stages[0] * rows  # the rows' statistics
    shape = (dim, rows, keys, warps, split, *stages)
    return tuple(
        Pass("flash_attention_backward", (*shape, part, blocks), rows, keys, 32 * warps, shared)
        for part in ((0,) if parts == 1 else (1, 2))
    )


def _forward_hopper(dim: int, rows: int, keys: int, blocks: int) -> Pass:
    """BM queries, BN keys, BLOCKS on an SM, of two warpgroups."""
    shared = (rows + 4 * keys) * dim * 2
    template = (dim, rows, keys, blocks)
    return Pass("flash_attention_hopper", template, rows, keys, 256, shared)


def _backward_hopper(dim: int) -> tuple[Pass, ...]:
    """Two warpgroups with 64 keys each, and one that loads three stages of 64 queries."""
    rows, keys, stages = 64, 128, 3
    tiles = 2 * (2 * keys * dim + 2 * stages * rows * dim + 2 * keys * rows) + 4 * rows * dim
    shared = tiles + 8 * stages * rows + 256  # statistics; the kernel's Work and barriers
    return (Pass("flash_attention_backward_hopper", (dim,), rows, keys, 384, shared),)


# Measured on an H200 (sm_90); the others are what fits into registers and shared memory: 227 KB on sm_90 and
# sm_100, 163 KB on sm_80, 99 KB on sm_86, 89 and 120, 64 KB on sm_75.
_LARGEST = (
    Tiling(64, _forward(64, 128, 128, 4, 2), _backward(64, 32, 128, 4, 1, (2, 2), 2)),
    Tiling(96, _forward(96, 128, 64, 4, 2), _backward(96, 64, 128, 8, 2, (2, 2), 1)),
    Tiling(128, _forward(128, 128, 64, 4, 2), _backward(128, 64, 128, 8, 2, (2, 2), 1)),
    Tiling(256, _forward(256, 64, 64, 4, 1), _backward(256, 32, 64, 4, 1, (1, 1), 1, parts=2)),
)
_LARGE = (
    *_LARGEST[:2],
    Tiling(128, _LARGEST[2].forward, _backward(128, 64, 128, 8, 2, (2, 1), 1)),
    _LARGEST[3],
)
_HOPPER = (
    Tiling(64, _forward_hopper(64, 128, 128, 2), _backward_hopper(64)),
    Tiling(128, _forward_hopper(128, 128, 64, 2), _backward_hopper(128)),
    _LARGEST[3],
)
# Hopper's backward kernel does not know capped scores.
_HOPPER_CAPPED = (
    Tiling(64, _HOPPER[0].forward, _LARGEST[0].backward),
    Tiling(96, _HOPPER[1].forward, _LARGEST[1].backward),
    Tiling(128, _HOPPER[1].forward, _LARGEST[2].backward),
    _LARGEST[3],
)
_MEDIUM = (
    Tiling(64, _forward(64, 128, 64, 4, 2), _backward(64, 64, 64, 4, 1, (1, 1), 2)),
    Tiling(96, _forward(96, 128, 64, 8, 1), _backward(96, 64, 64, 4, 1, (1, 1), 1)),
    Tiling(128, _forward(128, 128, 64, 8, 1), _backward(128, 32, 64, 4, 1, (1, 1), 1)),
    Tiling(256, _forward(256, 64, 64, 4, 1), _backward(256, 32, 32, 2, 1, (1, 1), 1, parts=2)),
)
_TURING = (
    Tiling(64, _forward(64, 128, 64, 4, 1), _backward(64, 64, 64, 4, 1, (1, 1), 1)),
    Tiling(96, _forward(96, 64, 64, 4, 1), _backward(96, 32, 64, 4, 1, (1, 1), 1)),
    Tiling(128, _forward(128, 64, 64, 4, 1), _backward(128, 32, 64, 4, 1, (1, 1), 1, parts=2)),
)


def _tilings(capability: tuple[int, int], capped: bool) -> tuple[Tiling, ...]:
    if capability < (8, 0):
        return _TURING
    if capability == (9, 0):
        return _HOPPER_CAPPED if capped else _HOPPER
    if capability[0] == 10:
        return _LARGEST
    return _LARGE if capability == (8, 0) else _MEDIUM


@functools.cache
def tiling(device: int, dim: int, capped: bool) -> Tiling:
    """The kernels for heads of ``dim`` dimensions, with capped scores or not."""
    return tiling_on(capability(device), dim, capped)


def tiling_on(capability: tuple[int, int], dim: int, capped: bool) -> Tiling:
    """The kernels on a GPU of a compute capability."""
    return next(t for t in _tilings(capability, capped) if dim <= t.dim)


@cached
def unsupported(dtype: torch.dtype, dim: int, device: int) -> str | None:
    """Why the kernels cannot take queries of a dtype with ``dim`` dimensions a head, or None."""
    major, minor = capability(device)
    if dtype is torch.float32:
        return "the tensor cores have no float32; use bfloat16 or float16, or autocast to one."
    if (major, minor) < (7, 5) or (major < 8 and dtype is torch.bfloat16):
        return f"a GPU of compute capability {major}.{minor} does not multiply {dtype}."
    most = _tilings((major, minor), False)[-1].dim
    if dim > most or dim % 8:
        return f"a head has {dim} dimensions, not a multiple of 8 up to {most}."
    return None
