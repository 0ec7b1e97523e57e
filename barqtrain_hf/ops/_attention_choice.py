"""Where PyTorch's attention is faster than ours for dense rows: the one place that says so.

`python -m barqtrain_hf.benchmarks attention` measures it (docs/benchmarks.md): on an H200 cuDNN's kernel
takes 0.92 of our time for both passes at 4096 tokens and 0.8 at 32768, with 64 and 128 dimensions a head,
but 1.02 to 1.06 of it at 1024. It plans each new length anew, for some 170 ms, so that it is left to lengths
that return: rows cut or padded to a size. Packed rows, windows and capped scores are always ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from barqtrain_hf.ops._backend import capability

# PyTorch's backends in their order, by compute capability.
_FASTER = {(9, 0): (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)}
_DIMS = (64, 128)
_SHORTEST, _STEP = 2048, 64


def sdpa_is_faster(
    shape: torch.Size,
    dtype: torch.dtype,
    device: int,
    window: int | None,
    softcap: float | None,
) -> bool:
    """Whether dense rows of q, of ``shape`` [B, T, H, D], are left to :func:`sdpa`.

    But for deterministic algorithms: cuDNN's gradient of q was seen to differ from run to run.
    """
    _, length, _, dim = shape
    return (
        window is None
        and softcap is None
        and length >= _SHORTEST
        and length % _STEP == 0
        and dim in _DIMS
        and dtype is not torch.float32
        and capability(device) in _FASTER
    )


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> torch.Tensor:
    """PyTorch's attention of [B, T, H, D] tensors by the backend that is faster here."""
    backends = _FASTER[capability(q.get_device())]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(list(backends), set_priority=True):
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return y.transpose(1, 2).contiguous()
