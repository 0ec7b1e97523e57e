"""Adapters as products read them: in the dtype that is computed in, scaled, of joined ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.runtime import Kernel

_THREADS = 256
_WHOLE = 8  # whose multiples t has of columns in 16 bits


def low_ranks(
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """All A, one below the other, and each B times its scaling, which is rounded once.

    In 16 bits ranks are filled up by zeros to multiples of 8: rows of t then begin at multiples of 16 bytes,
    which kernels need.
    """
    ranks = [part.shape[0] for part in lora_a]
    whole = 1 if dtype is torch.float32 else _WHOLE
    widths = [rank + -rank % whole for rank in ranks]
    first, wide = lora_a[0], lora_a[0].shape[1]
    number = sum(widths)
    a = first.new_empty((number, wide), dtype=dtype)
    b = [p.new_empty((p.shape[0], w), dtype=dtype) for p, w in zip(lora_b, widths, strict=True)]
    places = zip(a.split(widths), b, lora_a, lora_b, scalings, strict=True)
    for to_a, to_b, from_a, from_b, scaling in places:
        if not _by_kernel(to_a, to_b, from_a, from_b, scaling):
            rank = from_a.shape[0]
            to_a[:rank].copy_(from_a)
            to_a[rank:].zero_()
            torch.mul(from_b, scaling, out=to_b[:, :rank])
            to_b[:, rank:].zero_()
    return a, b


def _by_kernel(
    to_a: torch.Tensor,
    to_b: torch.Tensor,
    from_a: torch.Tensor,
    from_b: torch.Tensor,
    scaling: float,
) -> bool:
    """One launch in place of two, or False and nothing done."""
    dtype, given, device = to_a.dtype, from_a.dtype, from_a.get_device()
    if (
        device < 0
        or dtype is torch.float32
        or given not in (dtype, torch.float32)
        or from_b.dtype is not given
        or not from_a.is_contiguous()
        or not from_b.is_contiguous()
        or torch.compiler.is_compiling()
    ):
        return False
    out, width = to_b.shape
    rank, wide = from_a.shape
    grid = (-(-width * (wide + out) // _THREADS), 1, 1)
    pointers = (from_a.data_ptr(), from_b.data_ptr(), to_a.data_ptr(), to_b.data_ptr())
    _kernel(dtype, given).launch(
        device, grid, (_THREADS, 1, 1), *pointers, rank, width, wide, out, scaling
    )
    return True


@functools.cache
def _kernel(dtype: torch.dtype, given: torch.dtype) -> Kernel:
    pointers = {"a": given, "b": given, "to_a": dtype, "to_b": dtype}
    sizes = dict.fromkeys(("rank", "width", "in", "out"), "int32")
    name = f"lora_ranks<{CUDA_NAMES[dtype]},{CUDA_NAMES[given]}>"
    return Kernel("lora_ranks.cu", name, {**pointers, **sizes, "scaling": "float32"})
