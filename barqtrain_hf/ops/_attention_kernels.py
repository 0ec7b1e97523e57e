"""Launches of the attention kernels: buffers, RoPE, and what each layout comes to, found once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from barqtrain_hf.ops._attention_call import Call, Kept, Strides, contiguous
from barqtrain_hf.ops._attention_plan import Tiles, dense_tiles, packed_tiles
from barqtrain_hf.ops._attention_tilings import Pass
from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.ops._documents import find
from barqtrain_hf.ops._rope_kernels import launch as rope_launch
from barqtrain_hf.ops._rope_kernels import rotate
from barqtrain_hf.runtime import Kernel, Launch

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_TURN_SHIFT = 2  # log2 of the steps of the backward pass's blocks in one turn at dQ; measured
_LAYOUT = ("batch", "token", "head")
_LAYOUTS = 1024  # that are kept
_MOST_TILES = 65535  # in a grid's third dimension
_TILE_BYTES = 16
# kThreads and kHeads of attention_statistics.cu; a thread loads that many heads of its token at once, so that
# more is on its way from memory.
_STATISTICS_THREADS, _STATISTICS_HEADS = 256, 2


def outputs(q: torch.Tensor, kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty ones: the output, contiguous, and what is kept."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(kept.size, dtype=torch.float32)


def gradients(out: torch.Tensor, v: torch.Tensor) -> Gradients:
    """Empty ones of q, which is like ``out``, and of k and v, contiguous."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out, v, v))
    return dq, dk, dv


class _Forward(NamedTuple):
    """A layout's forward pass over some documents.

    Attributes:
        turn: q and k by RoPE, or None.
        attend: launches, each with the address of its tiles: more than one if a grid does not take all.
        tiles: what they point to.
    """

    turn: Launch | None
    attend: tuple[tuple[Launch, int], ...]
    tiles: Tiles


def forward(
    call: Call,
    max_seqlen: int | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [B, T, Hq, D] and what `Kept` says.

    q and k are turned by RoPE's own kernel, which reads a token's angles once for all heads: turning each
    head's queries where the attention kernel loads them took 98 us in place of 81 us for 16384 tokens of
    32 + 8 heads of 128, keys apart, on an H200. The turned ones are kept in place of the others.
    """
    if cu_seqlens is None:
        plan = _dense_forward(call)
    else:
        # With the documents' tiles, so that a layer has one thing to look up, not two.
        plans = find(cu_seqlens, call.q_shape[1], max_seqlen).plans
        plan = plans.get(call) or plans.setdefault(call, _forward(call, cu_seqlens))
    turn, attend, _ = plan
    out, buffer = outputs(q, call.kept)
    queries, keys, start = q.data_ptr(), k.data_ptr(), buffer.data_ptr()
    if turn is not None and cos is not None and sin is not None:
        turned = (start, start + call.kept.k)
        turn(call.device, queries, keys, cos.data_ptr(), sin.data_ptr(), 0, *turned)
        queries, keys = turned
    inputs = (queries, keys, v.data_ptr(), out.data_ptr(), start + call.kept.lse)
    for launch, tiles in attend:
        launch(call.device, *inputs, tiles)
    return out, buffer


def _forward(call: Call, cu_seqlens: torch.Tensor | None) -> _Forward:
    which, shape, kv_heads = call.tiling.forward, call.q_shape, call.k_shape[2]
    tiles = _tiles(call, which.rows, False, cu_seqlens, None)
    if not tiles.total:
        return _Forward(None, (), tiles)
    batch, length, heads, dim = shape
    turn = None
    of_q, of_k, of_v = call.strides
    if call.angles is not None:
        cos, of_cos, interleaved = call.angles
        turned = (contiguous(shape), contiguous(call.k_shape))
        turn = rope_launch(
            shape,
            kv_heads,
            (of_q, of_k, *turned),
            (call.dtype, of_cos, call.dtype),
            2,
            cos[0] == 1,
            cos[2],
            interleaved,
            False,
            True,
        )
        of_q, of_k = turned
    steps = _steps((of_q, of_k, of_v, contiguous(shape)), call.packed)
    sizes = (batch * length, 0 if call.packed else length, heads, heads // kv_heads, dim)
    kernel = _forward_kernel(call.dtype, which)
    grids = _grids(which, tiles.total, heads, kv_heads)
    launches = (
        kernel.prepare(grid, (which.threads, 1, 1), *steps, *sizes, *call.settings)
        for grid in grids
    )
    start, each = tiles.table.data_ptr(), _MOST_TILES * _TILE_BYTES
    return _Forward(turn, tuple((run, start + each * i) for i, run in enumerate(launches)), tiles)


@functools.lru_cache(maxsize=_LAYOUTS)
def _dense_forward(call: Call) -> _Forward:
    return _forward(call, None)


def _grids(forward: Pass, tiles: int, heads: int, kv_heads: int) -> list[tuple[int, int, int]]:
    """All heads of a tile before the next tile's."""
    if not forward.wgmma:
        return [(tiles * heads, 1, 1)]
    numbers = (min(_MOST_TILES, tiles - first) for first in range(0, tiles, _MOST_TILES))
    return [(heads // kv_heads, kv_heads, number) for number in numbers]


class _Backward(NamedTuple):
    """A layout's backward pass.

    Attributes:
        size: elements of a workspace in fp32: sums for dQ, statistics, turns.
        statistics, turns: where they start, in bytes; turns for each of ``parts``.
        prepare: fills statistics, and turns with zeros.
        parts: make the gradients.
        turns_back: whether they turn those of turned q and k back.
    """

    size: int
    statistics: int
    turns: tuple[int, ...]
    prepare: Launch
    parts: tuple[Launch, ...]
    turns_back: bool


def backward(
    call: Call,
    max_seqlen: int | None,
    dout: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    out: torch.Tensor,
    buffer: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Gradients:
    """The gradients, contiguous, from what `forward` returned; q and k only if that did not turn them."""
    keys_of_tile = call.tiling.backward[0].keys
    table, tiles, documents = _tiles(call, keys_of_tile, True, cu_seqlens, max_seqlen)
    dq, dk, dv = gradients(out, v)
    if not tiles:
        return dq, dk, dv
    inputs = None if q is None or k is None else (q.stride(), k.stride())
    strides = (v.stride(), dout.stride(), out.stride())
    plan = _backward_plan(call, tiles, documents, inputs, *strides)
    workspace = out.new_empty(plan.size, dtype=torch.float32)
    kept, start, sums = call.kept, buffer.data_ptr(), workspace.data_ptr()
    queries = start if q is None else q.data_ptr()
    keys = start + kept.k if k is None else k.data_ptr()
    upstream, statistics = dout.data_ptr(), sums + plan.statistics
    lse, turns = start + kept.lse, sums + plan.turns[0]
    plan.prepare(call.device, upstream, out.data_ptr(), lse, statistics, turns)
    pointers = (queries, keys, v.data_ptr(), upstream, statistics)
    results = (dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
    rest = (table.data_ptr(), 0, 0)
    if cos is not None and sin is not None and plan.turns_back:
        rest = (rest[0], cos.data_ptr(), sin.data_ptr())
    for part, place in zip(plan.parts, plan.turns, strict=True):
        part(call.device, *pointers, *results, sums, sums + place, *rest)
    if call.angles is not None and cos is not None and sin is not None and not plan.turns_back:
        rotate(dq, dk, cos, sin, None, call.angles[2], 2, dq.dtype, True, inplace=True)
    return dq, dk, dv


@functools.lru_cache(maxsize=_LAYOUTS)
def _backward_plan(
    call: Call,
    tiles: int,
    documents: int,
    inputs: tuple[Strides, Strides] | None,
    of_v: Strides,
    of_dout: Strides,
    of_out: Strides,
) -> _Backward:
    dtype, shapes, angles = call.dtype, call.tiling, call.angles
    batch, length, heads, dim = call.q_shape
    tokens, kv_heads = batch * length, call.k_shape[2]
    rows = shapes.backward[0].rows
    of_q, of_k = inputs or (contiguous(call.q_shape), contiguous(call.k_shape))
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
        (-(-tokens * lanes // _STATISTICS_THREADS), -(-heads // _STATISTICS_HEADS), 1),
        (_STATISTICS_THREADS, 1, 1),
        *_steps((of_dout, of_out), False),
        *(tokens, length, heads, dim, count),
    )
    parts = [
        _backward_kernel(dtype, part).prepare(
            (tiles * kv_heads, 1, 1),
            (part.threads, 1, 1),
            *_steps((of_q, of_k, of_v, of_dout), call.packed),
            *(angles_batch, tokens, 0 if call.packed else length, query_tiles),
            *(heads, heads // kv_heads, _TURN_SHIFT, dim, *call.settings),
            *(rotary, interleaved, fp32_angles),
        )
        for part in shapes.backward
    ]
    return _Backward(
        turns + count,
        4 * statistics,
        tuple(4 * (turns + each * i) for i in range(len(parts))),
        prepare,
        tuple(parts),
        turns_back,
    )


def _tiles(
    call: Call,
    rows: int,
    keys: bool,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> Tiles:
    batch, length = call.q_shape[:2]
    if cu_seqlens is None:
        return dense_tiles(batch, length, rows, keys, call.view, call.device)
    return packed_tiles(cu_seqlens, length, rows, keys, call.view, max_seqlen)


def _steps(strides: tuple[Strides, ...], packed: bool) -> list[int]:
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
    return Kernel("attention_statistics.cu", name, parameters)


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
