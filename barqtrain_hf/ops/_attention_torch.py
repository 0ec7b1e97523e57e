"""Attention by PyTorch's own kernels, where ours do not run: documents one after another, no packed mask."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from barqtrain_hf.ops._documents import find


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    materialise: bool = False,
) -> torch.Tensor:
    """[B, T, Hq, D] of the same and k and v of [B, T, Hkv, D], which are turned already.

    Args:
        materialise: the scores in any case, since PyTorch's fused kernels have no second derivative.
    """
    materialise |= softcap is not None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    boundaries: list[int] = []
    if cu_seqlens is not None:
        boundaries = find(cu_seqlens, q.shape[2], max_seqlen).boundaries
    if len(boundaries) <= 2:
        y = _one(q, k, v, causal, scale, window, softcap, materialise)
        return y.transpose(1, 2).contiguous()
    lengths = [end - start for start, end in pairwise(boundaries)]
    # split, not slices: each of those would have a gradient as long as the row.
    each = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    done = [_one(a, b, c, causal, scale, window, softcap, materialise) for a, b, c in each]
    return torch.cat([y.transpose(1, 2) for y in done], dim=1)


# Under torch.compile as it is: how a batch splits into documents is no reason to compile again.
attend_documents = torch.compiler.disable(
    attend, reason="flash_attention's PyTorch path splits packed rows on the host."
)


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    materialise: bool,
) -> torch.Tensor:
    """One document, [B, H, T, D]."""
    tokens = q.shape[2]
    if window is not None and window >= tokens:
        window = None
    if materialise:
        return weighted(q, k, v, allowed(tokens, causal, window, q.device), scale, softcap)
    mask = None if window is None else allowed(tokens, causal, window, q.device)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or q.dtype is torch.float32):
        # There only the 16-bit kernel without a mask takes groups. Copies of k and v are small beside the
        # scores that PyTorch would materialise.
        k, v, grouped = *_repeat(q, k, v), False
    is_causal = causal and mask is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def allowed(
    tokens: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """[T, T], true where a query (row) sees a key (column); None where all do."""
    if not causal and window is None:
        return None
    place = torch.arange(tokens, device=device)
    distance = place[:, None] - place
    if not causal:
        return distance.abs() < window
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def weighted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """The definition, [B, H, T, D], in fp32 (or fp64) with all scores in memory."""
    dtype = q.dtype
    if dtype is not torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    k, v = _repeat(q, k, v)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).to(dtype)


def _repeat(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A key and a value for each query head."""
    group = q.shape[1] // k.shape[1]
    return (
        (k, v)
        if group == 1
        else (k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))
    )
