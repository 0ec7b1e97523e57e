"""Launch of lora_hopper.cu: products with frozen weights and with their adapters, in one sum."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES, capability
from barqtrain_hf.runtime import Kernel, Matrix, TensorMaps, sm_count
from barqtrain_hf.runtime.tensor_map import ALIGNMENT

# As in the kernel.
_ROWS, _COLUMNS, _DEPTH, _PRODUCTS = 128, 256, 64, 4
_BLOCK = (384, 1, 1)
_SHARED_BYTES = 4 * (_ROWS + _COLUMNS) * _DEPTH * 2 + 4 * 64 * 64 * 2 + 2 * 4 * 8
_CLUSTER = 2
# Of the time that all clusters take for the tiles, the share in which they have one. On an H200 this
# took 0.82 to 0.97 of cuBLAS's time for the same at 0.97, and 1.0 to 1.5 at 0.5: cuBLAS has smaller tiles.
_LEAST_BUSY = 0.85

_Layout = tuple[int, int, int]  # rows, columns, stride
Pair = tuple[torch.Tensor, torch.Tensor]


def summed_products(
    out: torch.Tensor,
    pairs: Sequence[Pair],
    transposed: bool,
    bias: torch.Tensor | None = None,
) -> bool:
    """``out = left0 @ right0 + left1 @ right1 + ... (+ bias)``, or False and nothing where cuBLAS has to.

    Args:
        out: [N, C], fp16 or bf16, contiguous.
        pairs: left [N, K] and right [C, K] if ``transposed`` else [K, C], of out's dtype, each with a K.
        bias: [C] of out's dtype, contiguous.
    """
    device = out.get_device()
    if device < 0 or out.dtype is torch.float32 or torch.compiler.is_compiling():
        return False
    layouts = tuple((_layout(left), _layout(right)) for left, right in pairs)
    plan = _plan(device, out.dtype, (out.shape[0], out.shape[1]), layouts, transposed)
    if plan is None:
        return False
    pointers = [
        *(left.data_ptr() for left, _ in pairs),
        *(right.data_ptr() for _, right in pairs),
        out.data_ptr(),
    ]
    if any(pointer % ALIGNMENT for pointer in pointers):
        return False
    address = 0 if bias is None else bias.data_ptr()
    plan.kernel.launch(
        device, plan.grid, _BLOCK, plan.maps.at(*pointers), address, *out.shape, *plan.steps
    )
    return True


class _Plan(NamedTuple):
    kernel: Kernel
    grid: tuple[int, int, int]
    maps: TensorMaps
    steps: tuple[int, ...]  # the number of products, and the steps of each


def _layout(matrix: torch.Tensor) -> _Layout:
    rows, columns = matrix.shape
    stride, one = matrix.stride()
    return rows, columns, stride if one == 1 else -1


@functools.lru_cache(maxsize=1024)
def _plan(
    device: int,
    dtype: torch.dtype,
    shape: tuple[int, int],
    layouts: tuple[tuple[_Layout, _Layout], ...],
    transposed: bool,
) -> _Plan | None:
    """None for what the kernel cannot do, or not as fast as cuBLAS."""
    rows, columns = shape
    if capability(device) != (9, 0):
        return None
    tiles = -(-rows // (_CLUSTER * _ROWS)) * -(-columns // _COLUMNS)
    clusters = sm_count(device) // _CLUSTER
    turns = -(-tiles // clusters)
    aligned = all(
        stride * dtype.itemsize % ALIGNMENT == 0
        and (stride >= wide or (height == 1 and stride > 0))
        for pair in layouts
        for height, wide, stride in pair
    )
    if (
        not aligned
        or columns * dtype.itemsize % ALIGNMENT
        or len(layouts) > _PRODUCTS
        or not tiles
        or tiles < _LEAST_BUSY * turns * clusters
    ):
        return None
    unused = [None] * (_PRODUCTS - len(layouts))
    lefts = [Matrix(dtype, *left, _ROWS) for left, _ in layouts]
    # Each block of a cluster brings one half of a tile for both.
    rights = [
        Matrix(dtype, *right, _COLUMNS // 2 if transposed else _DEPTH) for _, right in layouts
    ]
    out = Matrix(dtype, rows, columns, columns, 64)
    steps = [-(-left.columns // _DEPTH) for left in lefts]
    return _Plan(
        _kernel(dtype, transposed, lefts[0].columns),
        (_CLUSTER * min(tiles, clusters), 1, 1),
        TensorMaps([*lefts, *unused, *rights, *unused, out]),
        (len(layouts), *steps, *(0 for _ in unused)),
    )


def _kernel(dtype: torch.dtype, transposed: bool, terms: int) -> Kernel:
    """For a first product of so many terms, of which those it does not have need not be multiplied."""
    return _instance(dtype, transposed, next(i for i in (1, 2, 4) if terms <= 16 * i or i == 4))


@functools.cache
def _instance(dtype: torch.dtype, transposed: bool, first: int) -> Kernel:
    name = f"lora_hopper<{CUDA_NAMES[dtype]},{str(transposed).lower()},{first}>"
    sizes = ("rows", "columns", "products", "steps0", "steps1", "steps2", "steps3")
    parameters = {"of": "struct", "bias": dtype, **dict.fromkeys(sizes, "int32")}
    return Kernel("lora_hopper.cu", name, parameters, _SHARED_BYTES)
