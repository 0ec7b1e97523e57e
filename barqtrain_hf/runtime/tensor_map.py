"""Descriptions of matrices for Hopper's copy engine (TMA), as the driver encodes them.

A kernel takes them by value. Encoding one takes the driver some microseconds, so that those of one layout are
kept and only their addresses replaced. (CUDA driver API, "Tensor Map Object Management".)
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from barqtrain_hf.errors import UnsupportedError

BYTES = 128
ALIGNMENT = 16  # bytes, of addresses and of the distance between rows
_FLOAT16, _BFLOAT16 = 6, 9  # CUtensorMapDataType
_SWIZZLE_128 = 3
_PROMOTE_256 = 3  # a miss brings 256 bytes into the L2 cache
_STRUCT_ALIGNMENT = 64


class Matrix(NamedTuple):
    """A row-major matrix of 16-bit numbers and the tiles it is read or written in.

    Attributes:
        rows, columns, stride: of the matrix, in elements; stride from row to row.
        tile_rows: up to 256.
        tile_columns: up to 64, the 128 bytes that are swizzled.
    """

    dtype: torch.dtype
    rows: int
    columns: int
    stride: int
    tile_rows: int
    tile_columns: int = 64


class TensorMaps(threading.local):
    """Of some matrices, one after another, as a kernel's struct; a thread has its own."""

    def __init__(self, matrices: Sequence[Matrix | None]) -> None:
        self._matrices = matrices
        self._memory = ctypes.create_string_buffer(BYTES * len(matrices) + _STRUCT_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self._address = start + -start % _STRUCT_ALIGNMENT
        self._places = [self._address + BYTES * i for i, m in enumerate(matrices) if m is not None]
        self._encoded = False

    def at(self, *pointers: int) -> int:
        """The struct's address, once it describes the matrices at these addresses.

        Raises:
            UnsupportedError: the driver refuses a matrix or an address.
        """
        driver = _driver()
        if self._encoded:
            for place, pointer in zip(self._places, pointers, strict=True):
                if driver.cuTensorMapReplaceAddress(place, pointer):
                    raise UnsupportedError(f"The driver refuses the address {pointer:#x}.")
            return self._address
        matrices = (m for m in self._matrices if m is not None)
        for place, pointer, matrix in zip(self._places, pointers, matrices, strict=True):
            _encode(driver, place, pointer, matrix)
        self._encoded = True
        return self._address


def _encode(driver: Any, place: int, pointer: int, of: Matrix) -> None:
    failed = driver.cuTensorMapEncodeTiled(
        place,
        _BFLOAT16 if of.dtype is torch.bfloat16 else _FLOAT16,
        2,
        pointer,
        (ctypes.c_uint64 * 2)(of.columns, of.rows),
        (ctypes.c_uint64 * 1)(of.stride * of.dtype.itemsize),
        (ctypes.c_uint32 * 2)(of.tile_columns, of.tile_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,  # elements are not interleaved
        _SWIZZLE_128,
        _PROMOTE_256,
        0,  # zeros outside the matrix
    )
    if failed:
        raise UnsupportedError(f"The driver describes no such matrix (error {failed}): {of}.")


@functools.cache
def _driver() -> Any:
    """CUDA's driver library, which torch has loaded; CuPy has no names for these functions."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.cuTensorMapReplaceAddress.argtypes = [pointer, pointer]
    library.cuTensorMapEncodeTiled.argtypes = [
        pointer,
        number,
        ctypes.c_uint32,
        *[pointer] * 5,
        *[number] * 4,
    ]
    return library
