"""Launch of lora_gradients.cu: u = dy B and dB = dy^T t in one read of dy."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES, capability
from barqtrain_hf.runtime import Kernel, sm_count

# As in the kernels.
_THREADS, _SUM_THREADS = 512, 256
_ROWS, _COLUMNS, _STAGES = 256, 64, 3
_ALIGNMENT = 16  # bytes
# Ranks by compute capability: a block's rows of t have to fit into shared memory.
_RANKS = {(8, 0): (16,), (9, 0): (16, 32), (10, 0): (16, 32)}
# Elements of dy up to which cuBLAS's two products take longer. On an H200 this takes 0.3 to 0.7 of their time
# for up to 16 ranks; for 32 it reads shared memory as long as dy, and loses where launches no longer count.
_MOST = {16: 2**40, 32: 2**24}


def low_rank_gradients(
    dy: torch.Tensor,
    up: torch.Tensor,
    low: torch.Tensor,
    u: torch.Tensor,
    like: torch.Tensor,
    scaling: float,
) -> torch.Tensor | None:
    """Writes ``u = dy @ up`` and returns ``scaling * dy.T @ low``; None and nothing done where cuBLAS has to.

    Args:
        dy: [N, O], fp16 or bf16.
        up: [O, R] of dy's dtype, contiguous, R the rank or more, a multiple of 8.
        low: [N, R] of dy's dtype.
        u: [N, R] of dy's dtype.
        like: [O, rank], whose dtype the result has.
    """
    device = dy.get_device()
    if device < 0 or dy.dtype is torch.float32 or torch.compiler.is_compiling():
        return None
    rows, columns = dy.shape
    width, rank = up.shape[1], like.shape[1]
    strides = (dy.stride(), low.stride(), u.stride())
    plan = _plan(device, (dy.dtype, like.dtype), (rows, columns, width, rank), strides, scaling)
    pointers = (dy.data_ptr(), up.data_ptr(), low.data_ptr())
    if plan is None or any(pointer % _ALIGNMENT for pointer in pointers):
        return None
    parts = torch.empty(plan.elements, dtype=torch.float32, device=dy.device)
    u_parts = parts.data_ptr()
    db_parts = u_parts + plan.db_at
    db = torch.empty_like(like, memory_format=torch.contiguous_format)
    plan.make.launch(
        device, plan.grid, (_THREADS, 1, 1), *pointers, u_parts, db_parts, *plan.make_numbers
    )
    plan.add.launch(
        device,
        plan.add_grid,
        (_SUM_THREADS, 1, 1),
        *(u_parts, db_parts, u.data_ptr(), db.data_ptr()),
        *plan.add_numbers,
    )
    return db


class _Plan(NamedTuple):
    make: Kernel
    grid: tuple[int, int, int]
    make_numbers: tuple[int, ...]
    add: Kernel
    add_grid: tuple[int, int, int]
    add_numbers: tuple[float, ...]
    elements: int  # of the bands' sums
    db_at: int  # bytes to those of dB


@functools.lru_cache(maxsize=1024)
def _plan(
    device: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int, int, int],
    strides: tuple[tuple[int, ...], ...],
    scaling: float,
) -> _Plan | None:
    rows, columns, width, rank = sizes
    size = dtypes[0].itemsize
    of_rank = next((r for r in _RANKS.get(capability(device), ()) if width <= r), None)
    aligned = all(one == 1 and stride * size % _ALIGNMENT == 0 for stride, one in strides)
    if (
        of_rank is None
        or dtypes[1] not in (dtypes[0], torch.float32)
        or not aligned
        or columns % 8
        or not 0 < rows * columns <= _MOST[of_rank]
        or max(rows, columns) * of_rank >= 2**31
    ):
        return None
    tiles = 64 // of_rank
    row_bands = -(-rows // (tiles * _ROWS))
    chunks = -(-columns // _COLUMNS)
    chunks = -(-chunks // max(1, sm_count(device) // row_bands))  # of a band of columns
    column_bands = -(-columns // (chunks * _COLUMNS))
    of_dy, of_low, of_u = (stride for stride, _ in strides)
    fours = of_rank // 4
    blocks = sum(-(-count * fours // _SUM_THREADS) for count in (rows, columns))
    u_elements = column_bands * rows * of_rank
    return _Plan(
        _make(dtypes[0], of_rank, tiles),
        (row_bands, column_bands, 1),
        (of_dy, of_low, rows, columns, width, chunks),
        _add(*dtypes, of_rank),
        (blocks, 1, 1),
        (of_u, rows, columns, column_bands, row_bands, width, rank, scaling),
        u_elements + row_bands * columns * of_rank,
        u_elements * 4,
    )


@functools.cache
def _make(dtype: torch.dtype, rank: int, tiles: int) -> Kernel:
    shared = _STAGES * _ROWS * _COLUMNS * 2 + tiles * _ROWS * rank * 2
    shared += 2 * _COLUMNS * rank * 2 + _COLUMNS * rank * 4
    pointers = {"dy": dtype, "up": dtype, "low": dtype, "u": torch.float32, "db": torch.float32}
    strides = dict.fromkeys(("dy_stride", "low_stride"), "int64")
    sizes = dict.fromkeys(("rows", "columns", "width", "chunks"), "int32")
    name = f"lora_gradients<{CUDA_NAMES[dtype]},{rank}>"
    return Kernel("lora_gradients.cu", name, {**pointers, **strides, **sizes}, shared)


@functools.cache
def _add(dtype: torch.dtype, of_db: torch.dtype, rank: int) -> Kernel:
    pointers = {"u_parts": torch.float32, "db_parts": torch.float32, "u": dtype, "db": of_db}
    names = ("rows", "columns", "column_bands", "row_bands", "width", "rank")
    sizes = {"u_stride": "int64", **dict.fromkeys(names, "int32"), "scaling": "float32"}
    name = f"lora_gradients_sum<{CUDA_NAMES[dtype]},{CUDA_NAMES[of_db]},{rank}>"
    return Kernel("lora_gradients.cu", name, {**pointers, **sizes})
