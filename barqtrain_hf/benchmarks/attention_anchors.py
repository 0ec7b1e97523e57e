"""What others offer for causal attention, each as `call(q, k, v)` → out.

q and out are [B, T, H, D], k and v [B, T, K, D] with K dividing H. Packed rows have B = 1 and documents that
do not see each other; flex_attention's block mask is made once, as a model makes it once for all layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from barqtrain_hf.benchmarks.elementwise_anchors import Implementation, compiled, load

FLASH, CUDNN = "torch SDPA, FA2", "torch SDPA, cuDNN"
VARLEN, FLEX = "torch varlen, FA2", "flex_attention, compiled"
REPEATED, AFTER_ROPE = ", k and v repeated", " after a RoPE kernel"

Rotate = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Found = tuple[dict[str, Implementation], dict[str, str]]


def by_document(lengths: Sequence[int], rotate: Rotate | None = None) -> Implementation:
    """PyTorch's attention, one document after another: what all others are compared with.

    FA2 where it runs, plain products elsewhere and in fp64: cuDNN would make a plan for each new length.
    """
    attention = _sdpa_on(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH).call

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if rotate is not None:
            q, k = rotate(q, k)
        documents = zip(*(t.split(list(lengths), dim=1) for t in (q, k, v)), strict=True)
        return torch.cat([attention(*document) for document in documents], dim=1)

    return Implementation(call)


def dense() -> Found:
    """PyTorch's two fast backends, and why one is missing."""
    return load(
        {
            FLASH: lambda: _sdpa_on(SDPBackend.FLASH_ATTENTION),
            CUDNN: lambda: _sdpa_on(SDPBackend.CUDNN_ATTENTION),
        }
    )


def packed(
    lengths: Sequence[int], boundaries: torch.Tensor, rotate: Rotate, flex: bool = True
) -> Found:
    """The kernels that take documents, without RoPE and after ``rotate``, and why others are missing."""
    # Before `enable_gqa` nobody promised that k and v may have fewer heads: as they are, and repeated.
    names = [VARLEN] if _takes("enable_gqa") else [VARLEN, VARLEN + REPEATED]
    loaders: dict[str, Callable[[], Implementation]] = {
        name: partial(_varlen, lengths, boundaries, name.endswith(REPEATED)) for name in names
    }
    if flex:  # compiling it takes seconds
        loaders[FLEX] = partial(_flex, lengths, boundaries.device)
    found, missing = load(loaders)
    for name in names:
        if name in found:
            found[name + AFTER_ROPE] = _rotated(found[name], rotate)
        else:
            missing[name + AFTER_ROPE] = missing[name]
    return found, missing


def _rotated(attention: Implementation, rotate: Rotate) -> Implementation:
    return Implementation(lambda q, k, v: attention.call(*rotate(q, k), v))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def _sdpa_on(*backends: SDPBackend) -> Implementation:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(list(backends)):
            return _sdpa(q, k, v)

    return Implementation(call)


def _takes(parameter: str) -> bool:
    """Whether this PyTorch's varlen_attn has a parameter; they differ from release to release."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return parameter in inspect.signature(varlen_attn).parameters


def _varlen(lengths: Sequence[int], boundaries: torch.Tensor, repeated: bool) -> Implementation:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if _takes("window_size") else {"is_causal": True}
    )
    limits = (boundaries, boundaries, max(lengths), max(lengths))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if repeated:
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        out: torch.Tensor = varlen_attn(
            q.squeeze(0), k.squeeze(0), v.squeeze(0), *limits, **options
        )
        return out.unsqueeze(0)

    if not _takes("enable_gqa"):
        return Implementation(call)
    options["enable_gqa"] = True

    def on_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the later ones would rather take cuDNN
            return call(q, k, v)

    return Implementation(on_flash)


def _flex(lengths: Sequence[int], device: torch.device) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = sum(lengths)
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )

    def visible(_b: Any, _h: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (document[query] == document[key])

    mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
    attention = compiled(flex_attention).call

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: torch.Tensor = attention(q, k, v, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return Implementation(call)
