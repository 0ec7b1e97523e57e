"""Launches of the attention kernels: buffers, RoPE, and what each layout comes to, found once."""

from __future__ import annotations

import functools
from math import prod
from typing import NamedTuple

import torch

from barqtrain_hf.ops._attention_plan import Tiles, View, dense_tiles, packed_tiles
from barqtrain_hf.ops._attention_tilings import Pass, Tiling, tiling
from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.ops._rope_kernels import launch as rope_launch
from barqtrain_hf.ops._rope_kernels import rotate
from barqtrain_hf.runtime import Kernel, Launch

# Shape and dtype of cos, and interleaved.
Angles = tuple[tuple[int, ...], torch.dtype, bool]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Strides = tuple[int, ...]

_NO_WINDOW = 2**30  # and no window is wider
_TURN_SHIFT = 2  # log2 of the steps of the backward pass's blocks in one turn at dQ; measured
_LAYOUT = ("batch", "token", "head")
_LAYOUTS = 1024  # that are kept
_MOST_TILES = 65535  # in a grid's third dimension
_TILE_BYTES = 16


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


def outputs(q: torch.Tensor, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty ones: the output, contiguous, and what is kept."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(kept.size, dtype=torch.float32)


def gradients(out: torch.Tensor, v: torch.Tensor) -> Gradients:
    """Empty ones of q, which is like ``out``, and of k and v, contiguous."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out, v, v))
    return dq, dk, dv


class _Forward(NamedTuple):
    """A layout's forward pass."""

    kept: Kept
    turn: Launch | None
    attend: tuple[Launch, ...]  # more than one if there are more tiles than a grid takes


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [B, T, Hq, D] and what `Kept` says.

    q and k are turned by RoPE's own kernel, which reads a token's angles once for all heads: turning each
    head's queries where the attention kernel loads them took 98 us in place of 81 us for 16384 tokens of
    32 + 8 heads of 128, keys apart, on an H200. The turned ones are kept in place of the others.
    """
    device, shape = q.get_device(), q.shape
    window = min(window or _NO_WINDOW, _NO_WINDOW)
    shapes, view = _shapes(device, shape[3], softcap is not None, causal, window)
    table, tiles, _ = _tiles(q, shape, cu_seqlens, max_seqlen, shapes.forward.rows, False, view)
    kept, turn, attend = _forward_plan(
        device,
        tiles,
        q.dtype,
        shape,
        k.shape,
        (q.stride(), k.stride(), v.stride()),
        cu_seqlens is not None,
        None if cos is None else (cos.shape, cos.dtype, interleaved),
        (scale, softcap or 0.0, causal, window),
    )
    out, buffer = outputs(q, kept)
    if not tiles:
        return out, buffer
    queries, keys, start = q.data_ptr(), k.data_ptr(), buffer.data_ptr()
    if turn is not None and cos is not None and sin is not None:
        turned = (start, start + kept.k)
        turn(device, queries, keys, cos.data_ptr(), sin.data_ptr(), 0, *turned)
        queries, keys = turned
    inputs = (queries, keys, v.data_ptr(), out.data_ptr(), start + kept.lse)
    work = table.data_ptr()
    for launch in attend:
        launch(device, *inputs, work)
        work += _MOST_TILES * _TILE_BYTES
    return out, buffer


@functools.lru_cache(maxsize=_LAYOUTS)
def _forward_plan(
    device: int,
    tiles: int,
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    strides: tuple[_Strides, _Strides, _Strides],
    packed: bool,
    angles: Angles | None,
    settings: tuple[float, ...],
) -> _Forward:
    batch, length, heads, dim = q_shape
    forward = tiling(device, dim, settings[1] > 0.0).forward
    kept = Kept.of(q_shape, k_shape, angles is not None)
    of_q, of_k, of_v = strides
    turn = None
    if angles is not None:
        cos, of_cos, interleaved = angles
        turned = (_contiguous(q_shape), _contiguous(k_shape))
        turn = rope_launch(
            q_shape,
            k_shape[2],
            (of_q, of_k, *turned),
            (dtype, of_cos, dtype),
            2,
            cos[0] == 1,
            cos[2],
            interleaved,
            False,
            True,
        )
        of_q, of_k = turned
    steps = _steps((of_q, of_k, of_v, _contiguous(q_shape)), packed)
    sizes = (batch * length, 0 if packed else length, heads, heads // k_shape[2], dim)
    kernel = _forward_kernel(dtype, forward)
    attend = [
        kernel.prepare(grid, (forward.threads, 1, 1), *steps, *sizes, *settings)
        for grid in _grids(forward, tiles, heads, k_shape[2])
    ]
    return _Forward(kept, turn, tuple(attend))


def _grids(forward: Pass, tiles: int, heads: int, kv_heads: int) -> list[tuple[int, int, int]]:
    """All heads of a tile before the next tile's."""
    if not forward.wgmma:
        return [(tiles * heads, 1, 1)]
    numbers = (min(_MOST_TILES, tiles - first) for first in range(0, tiles, _MOST_TILES))
    return [(heads // kv_heads, kv_heads, number) for number in numbers]


class _Backward(NamedTuple):
    """A layout's backward pass.

    Attributes:
        kept: of the forward pass.
        size: elements of a workspace in fp32: sums for dQ, statistics, turns.
        statistics, turns: where they start, in bytes; turns for each of ``parts``.
        prepare: fills statistics, and turns with zeros.
        parts: make the gradients.
        turns_back: whether they turn those of turned q and k back.
    """

    kept: Kept
    size: int
    statistics: int
    turns: tuple[int, ...]
    prepare: Launch
    parts: tuple[Launch, ...]
    turns_back: bool


def backward(
    dout: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    out: torch.Tensor,
    buffer: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    interleaved: bool,
) -> Gradients:
    """The gradients, contiguous, from what `forward` returned; q and k only if that did not turn them."""
    device, shape = out.get_device(), out.shape
    window = min(window or _NO_WINDOW, _NO_WINDOW)
    shapes, view = _shapes(device, shape[3], softcap is not None, causal, window)
    keys_of_tile = shapes.backward[0].keys
    table, tiles, documents = _tiles(out, shape, cu_seqlens, max_seqlen, keys_of_tile, True, view)
    plan = _backward_plan(
        device,
        tiles,
        documents,
        out.dtype,
        shape,
        v.shape,
        None if q is None or k is None else (q.stride(), k.stride()),
        (v.stride(), dout.stride(), out.stride()),
        cu_seqlens is not None,
        None if cos is None else (cos.shape, cos.dtype, interleaved),
        (scale, softcap or 0.0, causal, window),
    )
    dq, dk, dv = gradients(out, v)
    if not tiles:
        return dq, dk, dv
    workspace = out.new_empty(plan.size, dtype=torch.float32)
    kept, start, sums = plan.kept, buffer.data_ptr(), workspace.data_ptr()
    queries = start if q is None else q.data_ptr()
    keys = start + kept.k if k is None else k.data_ptr()
    upstream, statistics = dout.data_ptr(), sums + plan.statistics
    lse, turns = start + kept.lse, sums + plan.turns[0]
    plan.prepare(device, upstream, out.data_ptr(), lse, statistics, turns)
    inputs = (queries, keys, v.data_ptr(), upstream, statistics)
    results = (dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
    rest = (table.data_ptr(), 0, 0)
    if cos is not None and sin is not None and plan.turns_back:
        rest = (rest[0], cos.data_ptr(), sin.data_ptr())
    for part, place in zip(plan.parts, plan.turns, strict=True):
        part(device, *inputs, *results, sums, sums + place, *rest)
    if cos is not None and sin is not None and not plan.turns_back:
        rotate(dq, dk, cos, sin, None, interleaved, 2, dq.dtype, True, inplace=True)
    return dq, dk, dv


@functools.lru_cache(maxsize=_LAYOUTS)
def _backward_plan(
    device: int,
    tiles: int,
    documents: int,
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    inputs: tuple[_Strides, _Strides] | None,
    strides: tuple[_Strides, _Strides, _Strides],
    packed: bool,
    angles: Angles | None,
    settings: tuple[float, ...],
) -> _Backward:
    batch, length, heads, dim = q_shape
    tokens, kv_heads = batch * length, k_shape[2]
    shapes = tiling(device, dim, settings[1] > 0.0)
    rows = shapes.backward[0].rows
    of_v, of_dout, of_out = strides
    of_q, of_k = inputs or (_contiguous(q_shape), _contiguous(k_shape))
    angles_batch = rotary = interleaved = fp32_angles = 0
    # The kernel reads sixteen columns of angles at once.
    turns_back = angles is not None and angles[0][2] % 16 == 0
    if angles is not None and turns_back:
        (angles_rows, _, rotary), of_cos, interleaved = angles
        angles_batch = 0 if angles_rows == 1 else length
        fp32_angles = of_cos is torch.float32

    query_tiles = tokens // rows + documents  # with room for a short one at the end of each
    statistics = heads * query_tiles * rows * shapes.dim
    turns = statistics + 2 * heads * tokens
    each = 1 + heads * query_tiles
    count = each * len(shapes.backward)
    lanes = 8 if dim <= 64 else 16 if dim <= 128 else 32
    prepare = _statistics_kernel(dtype, lanes).prepare(
        (-(-tokens * lanes // 256), -(-heads // 2), 1),
        (256, 1, 1),
        *_steps((of_dout, of_out), False),
        *(tokens, length, heads, dim, count),
    )
    parts = [
        _backward_kernel(dtype, part).prepare(
            (tiles * kv_heads, 1, 1),
            (part.threads, 1, 1),
            *_steps((of_q, of_k, of_v, of_dout), packed),
            *(angles_batch, tokens, 0 if packed else length, query_tiles),
            *(heads, heads // kv_heads, _TURN_SHIFT, dim, *settings),
            *(rotary, interleaved, fp32_angles),
        )
        for part in shapes.backward
    ]
    return _Backward(
        Kept.of(q_shape, k_shape, inputs is None),
        turns + count,
        4 * statistics,
        tuple(4 * (turns + each * i) for i in range(len(parts))),
        prepare,
        tuple(parts),
        turns_back,
    )


@functools.cache
def _shapes(device: int, dim: int, capped: bool, causal: bool, window: int) -> tuple[Tiling, View]:
    return tiling(device, dim, capped), View(causal, window)


def _tiles(
    x: torch.Tensor,
    shape: tuple[int, ...],
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    rows: int,
    keys: bool,
    view: View,
) -> Tiles:
    if cu_seqlens is None:
        return dense_tiles(shape[0], shape[1], rows, keys, view, x.device)
    return packed_tiles(cu_seqlens, shape[1], rows, keys, view, max_seqlen)


def _contiguous(shape: tuple[int, ...]) -> _Strides:
    _, length, heads, dim = shape
    return length * heads * dim, heads * dim, dim, 1


def _steps(strides: tuple[_Strides, ...], packed: bool) -> list[int]:
    """What the kernels take of the strides: from row to row of the batch, token to token, head to head."""
    return [step for s in strides for step in (0 if packed else s[0], s[1], s[2])]


@functools.cache
def _forward_kernel(dtype: torch.dtype, forward: Pass) -> Kernel:
    parameters: dict[str, torch.dtype | str] = dict.fromkeys(("q", "k", "v", "out"), dtype)
    parameters |= {"lse": torch.float32, "tiles": torch.int32}
    parameters |= _layouts("q", "k", "v", "o") | {"tokens": "int64"}
    parameters |= dict.fromkeys(("row_length", "heads", "group", "dim"), "int32") | _SETTINGS
    return _kernel(dtype, forward, parameters)


@functools.cache
def _statistics_kernel(dtype: torch.dtype, lanes: int) -> Kernel:
    parameters: dict[str, torch.dtype | str] = {"dout": dtype, "out": dtype, "lse": torch.float32}
    parameters |= {"statistics": torch.float32, "turns": torch.int32}
    parameters |= _layouts("do", "o") | {"tokens": "int64"}
    parameters |= dict.fromkeys(("row_length", "heads", "dim", "count"), "int32")
    name = f"attention_statistics<{_template(dtype, lanes)}>"
    return Kernel("flash_attention_backward.cu", name, parameters)


@functools.cache
def _backward_kernel(dtype: torch.dtype, backward: Pass) -> Kernel:
    parameters: dict[str, torch.dtype | str] = dict.fromkeys(("q", "k", "v", "dout"), dtype)
    parameters |= {"statistics": torch.float32, "dq": dtype, "dk": dtype, "dv": dtype}
    parameters |= {"sums": torch.float32, "turns": torch.int32, "tiles": torch.int32}
    parameters |= {"cos": dtype, "sin": dtype}
    parameters |= _layouts("q", "k", "v", "do") | {"angles_batch": "int64", "tokens": "int64"}
    numbers = ("row_length", "query_tiles", "heads", "group", "shift", "dim")
    parameters |= dict.fromkeys(numbers, "int32") | _SETTINGS
    parameters |= dict.fromkeys(("rotary", "interleaved", "fp32_angles"), "int32")
    return _kernel(dtype, backward, parameters)


def _kernel(dtype: torch.dtype, which: Pass, parameters: dict[str, torch.dtype | str]) -> Kernel:
    name = f"{which.name}<{_template(dtype, *which.template)}>"
    return Kernel(f"{which.name}.cu", name, parameters, which.shared_bytes)


_SETTINGS: dict[str, torch.dtype | str] = {"scale": "float32", "softcap": "float32"}
_SETTINGS |= {"causal": "int32", "window": "int32"}


def _layouts(*tensors: str) -> dict[str, torch.dtype | str]:
    return {f"{tensor}_{dimension}": "int64" for tensor in tensors for dimension in _LAYOUT}


def _template(dtype: torch.dtype, *arguments: int) -> str:
    return ",".join((CUDA_NAMES[dtype], *map(str, arguments)))
