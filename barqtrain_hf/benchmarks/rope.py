"""Rotary position embedding of queries and keys beside all rivals: bandwidth, host time, errors.

The bytes counted: q and k in and out, cos and sin in once, forward and backward alike. q and k are transposed
views of [B, T, H·D] projections, as in transformers.
"""

from __future__ import annotations

from functools import partial

import torch

from barqtrain_hf.benchmarks import elementwise_anchors as anchors
from barqtrain_hf.benchmarks.elementwise import OURS, Case, Op, run_cases
from barqtrain_hf.benchmarks.elementwise_anchors import (
    COMPILE,
    LIGER,
    QUACK,
    Implementation,
    Tensors,
)
from barqtrain_hf.benchmarks.harness import Report
from barqtrain_hf.ops import apply_rope
from barqtrain_hf.ops._backend import Backend

ROPE, TRANSFORMERS = "RoPE", "transformers, eager"

BATCH, LENGTH, KEY_HEADS = 4, 4096, 8
HEADS = ((16, 128), (32, 64), (32, 128), (64, 128))  # and their size: hidden 2048, 2048, 4096, 8192
HOST_SHAPE = (1, 64, 4, 2, 64)
ERROR_SHAPE = (2, 333, 8, 2, 96)
_THETA = 500_000.0


def ops(backend: Backend = "cuda") -> list[Op]:
    """RoPE with all implementations found here."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ours = partial(apply_rope, backend=backend)
    found, missing = anchors.load(
        {
            OURS: lambda: Implementation(ours),
            TRANSFORMERS: lambda: Implementation(apply_rotary_pos_emb),
            LIGER: anchors.liger_rope,
            QUACK: anchors.quack_rope,
            COMPILE: lambda: anchors.compiled(apply_rotary_pos_emb),
        }
    )
    # transformers' own function is exact in fp64: it works in the dtype of what it gets.
    return [
        Op(ROPE, ("q", "k"), ("q", "k"), TRANSFORMERS, apply_rotary_pos_emb, found, missing),
    ]


def case(batch: int, length: int, heads: int, key_heads: int, dim: int) -> Case:
    """One shape of queries and keys, in bf16."""

    def make(dtype: torch.dtype, device: str) -> Tensors:
        torch.manual_seed(0)
        frequencies = _THETA ** -(torch.arange(0, dim, 2, device=device).float() / dim)
        angles = torch.arange(length, device=device).float().outer(frequencies).repeat(1, 2)[None]
        tensors = []
        for number in (heads, key_heads):
            projection = torch.randn(batch, length, number * dim, device=device).to(dtype)
            turned = projection.view(batch, length, number, dim).transpose(1, 2)
            tensors.append(turned.requires_grad_())
        return (*tensors, angles.cos().to(dtype), angles.sin().to(dtype))

    tokens = batch * length
    size = 2 * (2 * tokens * (heads + key_heads) * dim + 2 * length * dim)
    shape = f"{tokens} tokens × {heads} and {key_heads} heads of {dim}"
    return Case(ROPE, shape, size, size, make)


def run() -> Report:
    """Measures every implementation at every shape."""
    report = Report("rope")
    cases = [case(BATCH, LENGTH, heads, KEY_HEADS, dim) for heads, dim in HEADS]
    run_cases(report, ops(), cases, [case(*HOST_SHAPE)], [case(*ERROR_SHAPE)])
    return report
