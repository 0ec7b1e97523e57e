"""Launches every kernel of the norms, activations, RoPE, attention and LoRA on shapes of all paths.

For compute-sanitizer, all of them or some:

compute-sanitizer --tool racecheck python integration_tests/ops/every_kernel.py [norms lora ...]
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from attention_cases import OTHER_GPUS, Case, draw, ours, tiles_of
from norm_cases import DTYPES, SHAPES, misaligned

from barqtrain_hf.ops import (
    LoraLinear,
    _lora_gradients,
    _lora_kernels,
    apply_rope,
    geglu,
    gelu,
    layer_norm,
    lora_linears,
    rms_norm,
    swiglu,
)

EPS = 1e-6
NORM_SHAPES = [*SHAPES, (5, 16384), (3, 16392), (3, 16385), (700, 32), (3, 1), (300, 2048)]
GLU_SHAPES = [(3, 77), (7, 256), (2, 4096), (37, 4100)]
# batch, tokens, query heads, key heads, D, R
ROPE_SHAPES = [
    (2, 33, 8, 2, 64, 64),
    (1, 129, 5, 1, 128, 128),
    (2, 7, 4, 4, 96, 32),
    (1, 5, 3, 1, 10, 6),
    (1, 17, 72, 8, 128, 128),
    (1, 3, 2, 2, 500, 20),
]

# Every tile shape with more than one tile; then what each call decides, on documents that end within a tile
# and on its edge.
DOCUMENTS = (1, 64, 150, 1, 1)
ATTENTION_CASES = [
    *(
        Case((150,), 2, heads=(2, 1), dim=dim, rope=rope)
        for dim in (32, 40, 64, 80, 96, 128, 256)
        for rope in ("", "half")
    ),
    *(
        Case(DOCUMENTS, heads=(4, 2), dim=dim, causal=causal, rope="half")
        for dim in (64, 128)
        for causal in (True, False)
    ),
    *(Case(DOCUMENTS, heads=(2, 2), rope=rope) for rope in ("interleaved", "partial")),
    *(
        Case(DOCUMENTS, heads=(2, 1), window=window, causal=causal)
        for window in (1, 70)
        for causal in (True, False)
    ),
    Case(DOCUMENTS, heads=(2, 1), softcap=20.0, rope="half"),
    Case((1,), 2),
]
# Rows, dimensions in, dimensions out and ranks of layers that are computed together.
LORA_SHAPES = [
    (257, 72, ((264, 4), (520, 16), (8, 40))),
    (1030, 136, ((200, 32),)),
    (2100, 320, ((2056, 64), (8, 9))),
]


def leaf(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def backward(outputs: Any, *inputs: torch.Tensor) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])


def norms(dtype: torch.dtype, rows: int, dim: int) -> None:
    x, residual = leaf(dtype, rows, dim), leaf(dtype, rows, dim)
    shifted = misaligned(x.detach()).requires_grad_()
    for w_dtype in {dtype, torch.float32}:
        w, b = leaf(w_dtype, dim), leaf(w_dtype, dim)
        backward(rms_norm(x, w, EPS, backend="cuda"), x, w)
        y = layer_norm(x, w, b, EPS, out_dtype=torch.float32, backend="cuda")
        backward(y, x, w, b)
    w, b = leaf(dtype, dim), leaf(dtype, dim)
    for source in (x, shifted):
        backward(rms_norm(source, w, EPS, backend="cuda"), source, w)
        backward(layer_norm(source, w, b, EPS, backend="cuda"), source, w, b)
    backward(rms_norm(x, w, EPS, residual=residual, backend="cuda"), x, w, residual)
    backward(layer_norm(x, w, b, EPS, residual=residual, backend="cuda"), x, w, b, residual)


def activations(dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = leaf(dtype, rows, width), leaf(dtype, rows, width)
    both = leaf(dtype, rows, 2 * width)
    backward(swiglu(gate, up, backend="cuda"), gate, up)
    backward(swiglu(both, backend="cuda"), both)
    for approximate in ("none", "tanh"):
        backward(geglu(gate, up, approximate=approximate, backend="cuda"), gate, up)
        backward(gelu(gate, approximate=approximate, backend="cuda"), gate)


def rotations(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, tokens, q_heads, k_heads, dim, rotary = shape
    q, k = (leaf(dtype, batch, tokens, heads, dim) for heads in (q_heads, k_heads))
    for interleaved, angle_dtype in itertools.product((False, True), {dtype, torch.float32}):
        cos = torch.randn(batch, tokens, rotary, device="cuda").to(angle_dtype)
        heads_first = (q.transpose(1, 2), k.transpose(1, 2))
        turned = apply_rope(*heads_first, cos, cos, interleaved=interleaved, backend="cuda")
        backward(turned, q, k)


def attention(dtype: torch.dtype, case: Case) -> None:
    inputs = draw(case, dtype, "cuda")
    ours(case, "cuda")(*inputs)
    ours(case, "cuda")(*(misaligned(t) for t in inputs))


def portable(dtype: torch.dtype, case: Case) -> None:
    """Attention by the kernels of other GPUs."""
    for gpu in OTHER_GPUS:
        if dtype in gpu.dtypes and case.dim <= gpu.dim:
            with tiles_of(gpu.capability):
                ours(case, "cuda")(*draw(case, dtype, "cuda"))


def lora(dtype: torch.dtype, rows: int, wide: int, sizes: tuple[tuple[int, int], ...]) -> None:
    x = leaf(dtype, rows, wide)
    layers = [
        LoraLinear(
            leaf(dtype, out, wide).detach(),
            leaf(torch.float32, rank, wide),
            leaf(torch.float32, out, rank),
            2.0,
            leaf(dtype, out).detach(),
        )
        for out, rank in sizes
    ]
    adapters = [t for layer in layers for t in (layer.lora_a, layer.lora_b)]
    backward(lora_linears(x, layers, backend="cuda"), x, *adapters)
    dropped = [layer._replace(dropout=0.3) for layer in layers]
    backward(lora_linears(x, dropped, backend="cuda"), x, *adapters)


if __name__ == "__main__":
    # The kernels also where cuBLAS is faster.
    _lora_kernels._LEAST_BUSY = 0.0
    _lora_gradients._MOST = dict.fromkeys(_lora_gradients._MOST, 2**40)
    groups: dict[Any, list[Any]] = {
        norms: NORM_SHAPES,
        activations: GLU_SHAPES,
        rotations: [(shape,) for shape in ROPE_SHAPES],
        attention: [(case,) for case in ATTENTION_CASES],
        portable: [(case,) for case in ATTENTION_CASES],
        lora: LORA_SHAPES,
    }
    half_only = (attention, portable)
    wanted = sys.argv[1:] or [group.__name__ for group in groups]
    for dtype, (group, shapes) in itertools.product(DTYPES, groups.items()):
        if group.__name__ in wanted and (dtype is not torch.float32 or group not in half_only):
            for shape in shapes:
                group(dtype, *shape)
    torch.cuda.synchronize()
