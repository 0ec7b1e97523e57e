"""Host side of ``cuda/rope.cu``: layouts and launches."""

from __future__ import annotations

import functools

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.runtime import Kernel, Launch

Pair = tuple[torch.Tensor, torch.Tensor]
MAX_DIM = _THREADS = 512  # kThreads of rope.cu; on its scalar path a token needs one per dimension
MAX_ROWS = 65535  # a row of the batch has a place in a grid's third dimension
_UNROLL = 2  # kUnroll of rope.cu
_MOST_TOKENS = 64  # that a block has in its third dimension


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    interleaved: bool,
    heads_dim: int,
    out: torch.dtype,
    backward: bool,
    inplace: bool = False,
) -> Pair:
    """Turns, or turns gradients back, in one launch; the inputs as apply_rope has checked them."""
    if cos.dtype is not q.dtype and cos.dtype is not torch.float32:
        cos, sin = cos.float(), sin.float()  # fp32 q with 16-bit angles: exact, and few elements
    cos, sin = cos.contiguous(), sin.contiguous()
    if q.stride(3) != 1:
        q = q.contiguous()
    if k.stride(3) != 1:
        k = k.contiguous()
    q_out, k_out = (
        (q, k) if inplace else (empty_like(q, heads_dim, out), empty_like(k, heads_dim, out))
    )
    if not (q.numel() or k.numel()):
        return q_out, k_out
    rows = cos.shape[0]
    positions = 0
    if position_ids is not None:
        position_ids = position_ids.contiguous()
        positions, rows = position_ids.data_ptr(), position_ids.shape[0]
    qs, ks, cs, ss = q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr()
    qo, ko = q_out.data_ptr(), k_out.data_ptr()
    prepared = launch(
        q.shape,
        k.shape[heads_dim],
        (q.stride(), k.stride(), q_out.stride(), k_out.stride()),
        (q.dtype, cos.dtype, out),
        heads_dim,
        rows == 1,
        cos.shape[-1],
        interleaved,
        backward,
        not (qs | ks | cs | ss | qo | ko) % 16,
    )
    prepared(q.get_device(), qs, ks, cs, ss, positions, qo, ko)
    return q_out, k_out


def empty_like(x: torch.Tensor, heads_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Empty, contiguous if x is; else a token's heads lie side by side, as projections write them."""
    if heads_dim == 2 or x.is_contiguous():
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    like = x.transpose(1, 2)
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format).transpose(
        1, 2
    )


@functools.lru_cache(maxsize=1024)
def launch(
    shape: tuple[int, ...],
    k_heads: int,
    strides: tuple[tuple[int, ...], ...],
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    heads_dim: int,
    shared_rows: bool,
    rotary: int,
    interleaved: bool,
    backward: bool,
    aligned: bool,
) -> Launch:
    """The launch for one layout, which takes the addresses of q, k, cos, sin, positions, and both results.

    Args:
        shape: of q.
        k_heads: heads of k.
        strides: of q, k and both results.
        types: of q, cos and the results.
        heads_dim: where the heads are.
        shared_rows: whether all rows have the same angles.
        rotary: angles of a token.
        interleaved: pairs neighbouring dimensions.
        backward: turns back.
        aligned: all addresses, but that of positions, are multiples of 16.
    """
    batch, length, dim = shape[0], shape[3 - heads_dim], shape[3]
    heads = shape[heads_dim] + k_heads
    steps = [step[d] for step in strides for d in (0, heads_dim, 3 - heads_dim)]
    # In bytes of the narrowest dtype.
    aligned = aligned and not any(2 * step % 16 for step in steps)
    kernel, vec = _kernel(types, dim, rotary, interleaved, aligned, backward)
    units = rotary // (2 * vec) + (dim - rotary) // vec
    blocks = -(-heads // (_UNROLL * max(1, _THREADS // units)))
    lanes = -(-heads // (_UNROLL * blocks))
    group = min(_MOST_TOKENS, max(1, _THREADS // (units * lanes)))
    grid = (-(-length // group), blocks, batch)
    numbers = (length, int(shared_rows), shape[heads_dim], heads, rotary, int(interleaved))
    return kernel.prepare(grid, (units, lanes, group), *steps, *numbers)


@functools.cache
def _kernel(
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    dim: int,
    rotary: int,
    interleaved: bool,
    aligned: bool,
    backward: bool,
) -> tuple[Kernel, int]:
    x, cos, out = types
    vec = 8 if min(x.itemsize, out.itemsize) == 2 else 4
    # Each unit is two whole vectors of the turned part, or one of the rest.
    if not aligned or rotary % (2 * vec) or dim % vec:
        vec = 1
    names = ",".join(CUDA_NAMES[dtype] for dtype in types)
    flags = ",".join(str(flag).lower() for flag in (interleaved and vec > 1, backward))
    name = f"rope<{names},{vec},{flags}>"
    parameters: dict[str, torch.dtype | str] = {"q": x, "k": x, "cos": cos, "sin": cos}
    parameters |= {"positions": torch.int64, "q_out": out, "k_out": out}
    for tensor in ("q", "k", "q_out", "k_out"):
        parameters |= dict.fromkeys((f"{tensor}_{d}" for d in ("batch", "head", "token")), "int64")
    numbers = ("length", "shared_rows", "q_heads", "heads", "rotary", "interleaved")
    parameters |= dict.fromkeys(numbers, "int32")
    return Kernel("rope.cu", name, parameters), vec
