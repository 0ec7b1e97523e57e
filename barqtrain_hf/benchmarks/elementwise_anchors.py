"""What others offer for norms, gated activations and RoPE, each as a function of the same inputs.

    RMSNorm        (x [N, D], weight [D])                      → y
    add + RMSNorm  (x [N, D], residual [N, D], weight [D])     → y, x + residual
    LayerNorm      (x [N, D], weight [D], bias [D])            → y
    gated          (gate [N, I], up [N, I])                    → y, or (gate and up side by side [N, 2·I])
    RoPE           (q [B, H, T, D], k [B, K, T, D], cos [1, T, D], sin [1, T, D]) → q, k

Liger is called as its own functional interface does, in place where that is its default. QuACK has no gated
activation outside its matrix products' epilogues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from barqtrain_hf.benchmarks.head_anchors import reason

Tensors = tuple[torch.Tensor, ...]

EPS = 1e-6
LIGER, QUACK, COMPILE = "Liger", "QuACK", "torch.compile"

__all__ = ["COMPILE", "EPS", "LIGER", "QUACK", "Implementation", "Tensors", "load", "reason"]


def _as_they_are(inputs: Tensors) -> Tensors:
    return inputs


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: from its inputs to its outputs."""

    call: Callable[..., Any]
    # What a model would do once, such as a weight in another dtype: not timed.
    prepare: Callable[[Tensors], Tensors] = _as_they_are
    # The backward pass writes the gradients over what the forward pass saved.
    overwrites: bool = False


def load(
    loaders: Mapping[str, Callable[[], Implementation]],
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """The implementations found here by name, and for the others why they were not."""
    found, missing = {}, {}
    for name, loader in loaders.items():
        try:
            found[name] = loader()
        except ImportError as error:
            missing[name] = f"not installed: {error}"
        except Exception as error:  # installed but broken beside these versions: the rows say how
            missing[name] = reason(error)
    return found, missing


def compiled(function: Callable[..., Any]) -> Implementation:
    """torch.compile of a function, for each shape anew."""
    return Implementation(torch.compile(function, dynamic=False))


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm.forward of transformers."""
    hidden = x.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return weight * (hidden * torch.rsqrt(variance + EPS)).to(x.dtype)


def gemma_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gemma3RMSNorm.forward of transformers."""
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    return (hidden * (1.0 + weight.float())).type_as(x)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The addition and the norm after it, as in a decoder layer of transformers."""
    hidden = residual + x
    return rms_norm(hidden, weight), hidden


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.rms_norm."""
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An addition and F.rms_norm."""
    hidden = residual + x
    return torch_rms_norm(hidden, weight), hidden


def torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """F.layer_norm."""
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def liger_rms_norm() -> Implementation:
    """LigerRMSNormFunction."""
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,import-untyped]
        liger_rms_norm,
    )

    return Implementation(lambda x, weight: liger_rms_norm(x, weight, EPS))


def liger_add_rms_norm() -> Implementation:
    """LigerFusedAddRMSNormFunction."""
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,import-untyped]
        liger_fused_add_rms_norm,
    )

    return Implementation(lambda x, r, weight: liger_fused_add_rms_norm(x, r, weight, EPS))


def liger_layer_norm() -> Implementation:
    """LigerLayerNormFunction."""
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,import-untyped]
        liger_layer_norm,
    )

    return Implementation(lambda x, weight, bias: liger_layer_norm(x, weight, bias, EPS))


def liger_swiglu() -> Implementation:
    """LigerSiLUMulFunction."""
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,import-untyped]
        liger_swiglu,
    )

    return Implementation(lambda gate, up: liger_swiglu(gate, up), overwrites=True)


def liger_swiglu_halves() -> Implementation:
    """LigerSiLUMulFunction as Liger's Phi-3 MLP calls it: its kernel needs each half contiguous."""
    call = liger_swiglu().call
    return Implementation(lambda both: call(*both.chunk(2, dim=-1)), overwrites=True)


def liger_geglu() -> Implementation:
    """LigerGELUMulFunction, which has the tanh approximation only."""
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,import-untyped]
        liger_geglu,
    )

    return Implementation(lambda gate, up: liger_geglu(gate, up), overwrites=True)


def liger_rope() -> Implementation:
    """LigerRopeFunction, in place."""
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,import-untyped]
        liger_rope,
    )

    return Implementation(lambda q, k, cos, sin: liger_rope(q, k, cos, sin))


def quack_rms_norm() -> Implementation:
    """quack.rmsnorm."""
    from quack import rmsnorm  # type: ignore[import-not-found,import-untyped]

    return Implementation(lambda x, weight: rmsnorm(x, weight, eps=EPS))


def quack_add_rms_norm() -> Implementation:
    """quack.rmsnorm with a residual."""
    from quack import rmsnorm

    return Implementation(
        lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)
    )


def quack_layer_norm() -> Implementation:
    """quack.rmsnorm.layernorm_fwd and layernorm_bwd; they take weight and bias in fp32 alone."""
    from quack.rmsnorm import (  # type: ignore[import-not-found,import-untyped]
        layernorm_bwd,
        layernorm_fwd,
    )

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
        ) -> torch.Tensor:
            y, rstd, mean = layernorm_fwd(x, weight, bias, EPS, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Tensors:
            x, weight, rstd, mean = ctx.saved_tensors
            return layernorm_bwd(x, weight, dy, rstd, mean)  # type: ignore[no-any-return]

    def in_fp32(inputs: Tensors) -> Tensors:
        x, *parameters = inputs
        return (x, *(t.detach().float().requires_grad_() for t in parameters))

    return Implementation(LayerNorm.apply, prepare=in_fp32)


def quack_rope() -> Implementation:
    """quack.rotary.apply_rotary_emb, once for q and once for k; it takes half of cos and sin."""
    from quack.rotary import apply_rotary_emb  # type: ignore[import-not-found,import-untyped]

    def halves(inputs: Tensors) -> Tensors:
        q, k, *tables = inputs
        return (q, k, *(t[0].chunk(2, dim=-1)[0].contiguous() for t in tables))

    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = apply_rotary_emb(x.transpose(1, 2), cos, sin)
        return turned.transpose(1, 2)

    return Implementation(
        lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin)), prepare=halves
    )
