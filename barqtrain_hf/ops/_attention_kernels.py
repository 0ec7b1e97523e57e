"""Launches of the attention kernels: tile shapes, workspaces, RoPE."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from barqtrain_hf.ops._attention_plan import Tiles, View, dense_tiles, packed_tiles
from barqtrain_hf.ops._backend import CUDA_NAMES, cached
from barqtrain_hf.ops.rope import rotate
from barqtrain_hf.runtime import Kernel

# cos, sin and interleaved.
Angles = tuple[torch.Tensor, torch.Tensor, bool]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_PAD = 8  # elements between the rows of a tile in shared memory: kPitch of attention.cuh
_NO_WINDOW = 2**30
_TURN_SHIFT = (
    2  # log2 of the steps that blocks of the backward pass take in one turn at dQ; measured
)
_LAYOUT = ("batch", "token", "head")


class _Tiling(NamedTuple):
    """Shapes of the tiles for heads of up to ``dim``, as the kernels' template arguments.

    Attributes:
        dim: D.
        forward: BM queries, BN keys, WARPS, BLOCKS on an SM.
        backward: BM queries, BN keys, WARPS, of which SPLIT share rows of keys, STAGES of queries, BLOCKS
            on an SM.
        parts: launches of the backward pass: 0 makes all gradients; 1 those of v, 2 those of q and k, where
            the sums of all three do not fit into the registers.
    """

    dim: int
    forward: tuple[int, int, int, int]
    backward: tuple[int, int, int, int, int, int]
    parts: tuple[int, ...] = (0,)


# Measured on an H200 (sm_90); the others are what fits into registers and shared memory: 163 KB and more on
# sm_80 and sm_90, 99 KB on sm_86, 89 and 120, 64 KB on sm_75.
_LARGE = (
    _Tiling(64, (128, 64, 4, 2), (32, 128, 4, 1, 2, 2)),
    _Tiling(96, (128, 64, 4, 2), (64, 128, 8, 1, 1, 1)),
    _Tiling(128, (128, 64, 4, 2), (64, 128, 8, 1, 1, 1)),
    _Tiling(256, (64, 64, 4, 1), (32, 64, 4, 1, 1, 1), (1, 2)),
)
_HOPPER = (
    _Tiling(64, (128, 64, 4, 3), (32, 128, 4, 1, 2, 2)),
    _Tiling(96, (128, 64, 4, 2), (64, 128, 8, 2, 2, 1)),
    _Tiling(128, (128, 64, 4, 2), (64, 128, 8, 2, 2, 1)),
    _LARGE[-1],
)
_MEDIUM = (
    _Tiling(64, (128, 64, 4, 2), (64, 64, 4, 1, 1, 2)),
    _Tiling(96, (128, 64, 8, 1), (64, 64, 4, 1, 1, 1)),
    _Tiling(128, (128, 64, 8, 1), (32, 64, 4, 1, 1, 1)),
    _Tiling(256, (64, 64, 4, 1), (32, 32, 2, 1, 1, 1), (1, 2)),
)
_TURING = (
    _Tiling(64, (128, 64, 4, 1), (64, 64, 4, 1, 1, 1)),
    _Tiling(96, (64, 64, 4, 1), (32, 64, 4, 1, 1, 1)),
    _Tiling(128, (64, 64, 4, 1), (32, 64, 4, 1, 1, 1), (1, 2)),
)


def _tilings(capability: tuple[int, int]) -> tuple[_Tiling, ...]:
    if capability < (8, 0):
        return _TURING
    return {(8, 0): _LARGE, (9, 0): _HOPPER}.get(capability, _MEDIUM)


@cached
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _tiling(device: int, dim: int) -> _Tiling:
    return next(t for t in _tilings(_capability(device)) if dim <= t.dim)


def unsupported(q: torch.Tensor) -> str | None:
    """Why the kernels cannot take such queries, or None."""
    return _unsupported(q.dtype, q.shape[3], _capability(q.get_device()))


@cached
def _unsupported(dtype: torch.dtype, dim: int, capability: tuple[int, int]) -> str | None:
    if dtype is torch.float32:
        return "the tensor cores have no float32; use bfloat16 or float16, or autocast to one."
    if capability < (7, 5) or (capability < (8, 0) and dtype is torch.bfloat16):
        return f"a GPU of compute capability {capability[0]}.{capability[1]} does not multiply {dtype}."
    most = _tilings(capability)[-1].dim
    if dim > most or dim % 8:
        return f"a head has {dim} dimensions, not a multiple of 8 up to {most}."
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [B, T, Hq, D] and, [Hq, B * T] in fp32, log2 of the sum of exp(scores)."""
    batch, length, heads, dim = q.shape
    device, packed = q.get_device(), cu_seqlens is not None
    tiling = _tiling(device, dim)
    rows, _, warps, _ = tiling.forward
    tiles = _tiles(q, cu_seqlens, rows, False, View(causal, window))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, batch * length), dtype=torch.float32, device=q.device)
    _forward_kernel(q.dtype, tiling).launch(
        device,
        (tiles.total * heads, 1, 1),
        (32 * warps, 1, 1),
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()),
        tiles.table.data_ptr(),
        *_strides(q, packed),
        *_strides(k, packed),
        *_strides(v, packed),
        *_strides(out, packed),
        *(batch * length, 0 if packed else length, heads, heads // k.shape[2], dim),
        *(scale, softcap or 0.0, int(causal), window or _NO_WINDOW),
    )
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    rope: Angles | None,
) -> Gradients:
    """The gradients, contiguous, from what :func:`forward` returned; of q and k turned by ``rope`` those of
    q and k before it."""
    batch, length, heads, dim = q.shape
    tokens, kv_heads = batch * length, k.shape[2]
    group = heads // kv_heads
    device, packed = q.get_device(), cu_seqlens is not None
    tiling = _tiling(device, dim)
    rows, keys, warps, *_ = tiling.backward
    tiles = _tiles(q, cu_seqlens, keys, True, View(causal, window))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    query_tiles = (
        tokens // rows + tiles.documents
    )  # with room for a short one at each document's end
    sums = _empty(q, heads * query_tiles * rows * tiling.dim, torch.float32)
    statistics = _empty(q, 2 * heads * tokens, torch.float32)
    turns = _empty(q, 1 + heads * query_tiles, torch.int32)
    inside = rope if rope is not None and _turns_inside(rope) else None
    cos, sin, *angles, angles_batch = _angles(inside)
    for part in tiling.parts:
        lanes = 8 if dim <= 64 else 16 if dim <= 128 else 32
        _statistics_kernel(q.dtype, lanes).launch(
            device,
            (-(-tokens * heads * lanes // 256), 1, 1),
            (256, 1, 1),
            *(dout.data_ptr(), out.data_ptr(), lse.data_ptr(), statistics.data_ptr()),
            turns.data_ptr(),
            *_strides(dout, False),
            *_strides(out, False),
            *(tokens, length, heads, dim, turns.numel()),
        )
        _backward_kernel(q.dtype, tiling, part).launch(
            device,
            (tiles.total * kv_heads, 1, 1),
            (32 * warps, 1, 1),
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), dout.data_ptr(), statistics.data_ptr()),
            *(dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), sums.data_ptr(), turns.data_ptr()),
            *(tiles.table.data_ptr(), cos, sin),
            *_strides(q, packed),
            *_strides(k, packed),
            *_strides(v, packed),
            *_strides(dout, packed),
            *(angles_batch, tokens, 0 if packed else length, query_tiles, heads, group),
            *(_TURN_SHIFT, dim, scale, softcap or 0.0, int(causal), window or _NO_WINDOW, *angles),
        )
    if rope is not None and inside is None:
        cos, sin, interleaved = rope
        rotate(dq, dk, cos, sin, None, interleaved, 2, q.dtype, True, inplace=True)
    return dq, dk, dv


def turned(q: torch.Tensor, k: torch.Tensor, rope: Angles) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned, for :func:`forward`.

    By RoPE's own kernel, which reads a token's angles once for all heads: turning each head's queries where
    the attention kernel loads them took 98 us in place of 81 us for 16384 tokens of 32 + 8 heads of 128, keys
    apart, on an H200. The turned ones are kept for the backward pass in place of the others.
    """
    cos, sin, interleaved = rope
    return rotate(q, k, cos, sin, None, interleaved, 2, q.dtype, False)


def _tiles(
    q: torch.Tensor, cu_seqlens: torch.Tensor | None, rows: int, keys: bool, view: View
) -> Tiles:
    if cu_seqlens is None:
        return dense_tiles(q.shape[0], q.shape[1], rows, keys, view, q.device)
    return packed_tiles(cu_seqlens, q.shape[1], rows, keys, view)


def _empty(like: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(count, dtype=dtype, device=like.device)


def _turns_inside(rope: Angles) -> bool:
    """Whether the backward kernel can turn gradients back: it reads sixteen columns at once."""
    return rope[0].shape[2] % 16 == 0


def _angles(rope: Angles | None) -> tuple[int, int, int, int, int, int]:
    """The kernels' cos, sin, rotary, interleaved, fp32_angles and angles_batch."""
    if rope is None:
        return 0, 0, 0, 0, 0, 0
    cos, sin, interleaved = rope
    rows, length, rotary = cos.shape
    each = 0 if rows == 1 else length
    fp32 = cos.dtype is torch.float32
    return cos.data_ptr(), sin.data_ptr(), rotary, int(interleaved), int(fp32), each


def _strides(x: torch.Tensor, packed: bool) -> tuple[int, int, int]:
    batch, token, head, _ = x.stride()
    return 0 if packed else batch, token, head


@functools.cache
def _forward_kernel(dtype: torch.dtype, tiling: _Tiling) -> Kernel:
    rows, keys, _, _ = tiling.forward
    parameters: dict[str, torch.dtype | str] = dict.fromkeys(("q", "k", "v", "out"), dtype)
    parameters |= {"lse": torch.float32, "tiles": torch.int32}
    parameters |= _layouts("q", "k", "v", "o") | {"tokens": "int64"}
    parameters |= dict.fromkeys(("row_length", "heads", "group", "dim"), "int32") | _SETTINGS
    name = f"flash_attention<{_template(dtype, tiling.dim, *tiling.forward)}>"
    return Kernel(
        "flash_attention.cu", name, parameters, (rows + 2 * keys) * (tiling.dim + _PAD) * 2
    )


@functools.cache
def _statistics_kernel(dtype: torch.dtype, lanes: int) -> Kernel:
    parameters: dict[str, torch.dtype | str] = {"dout": dtype, "out": dtype, "lse": torch.float32}
    parameters |= {"statistics": torch.float32, "turns": torch.int32}
    parameters |= _layouts("do", "o") | {"tokens": "int64"}
    parameters |= dict.fromkeys(("row_length", "heads", "dim", "count"), "int32")
    name = f"attention_statistics<{_template(dtype, lanes)}>"
    return Kernel("flash_attention_backward.cu", name, parameters)


@functools.cache
def _backward_kernel(dtype: torch.dtype, tiling: _Tiling, part: int) -> Kernel:
    rows, keys, warps, split, stages, blocks = tiling.backward
    parameters: dict[str, torch.dtype | str] = dict.fromkeys(("q", "k", "v", "dout"), dtype)
    parameters |= {"statistics": torch.float32, "dq": dtype, "dk": dtype, "dv": dtype}
    parameters |= {"sums": torch.float32, "turns": torch.int32, "tiles": torch.int32}
    parameters |= {"cos": dtype, "sin": dtype}
    parameters |= _layouts("q", "k", "v", "do") | {"angles_batch": "int64", "tokens": "int64"}
    numbers = ("row_length", "query_tiles", "heads", "group", "shift", "dim")
    parameters |= dict.fromkeys(numbers, "int32") | _SETTINGS
    parameters |= dict.fromkeys(("rotary", "interleaved", "fp32_angles"), "int32")
    shape = (tiling.dim, rows, keys, warps, split, stages, part, blocks)
    name = f"flash_attention_backward<{_template(dtype, *shape)}>"
    pitch = tiling.dim + _PAD
    elements = 2 * keys * pitch + 2 * stages * rows * pitch + split * keys * (rows + _PAD)
    shared = 2 * elements + 8 * stages * rows  # the rows' statistics
    return Kernel("flash_attention_backward.cu", name, parameters, shared)


_SETTINGS: dict[str, torch.dtype | str] = {"scale": "float32", "softcap": "float32"}
_SETTINGS |= {"causal": "int32", "window": "int32"}


def _layouts(*tensors: str) -> dict[str, torch.dtype | str]:
    return {f"{tensor}_{dimension}": "int64" for tensor in tensors for dimension in _LAYOUT}


def _template(dtype: torch.dtype, *numbers: int) -> str:
    return ",".join((CUDA_NAMES[dtype], *map(str, numbers)))
