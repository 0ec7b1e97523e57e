"""What the head says of each token beside its loss, and what a trainer's metrics need of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class TokenOutput(ModelOutput):  # type: ignore[misc]
    """Output of a patched model that was asked for tokens; all but loss have the shape of the targets.

    Where there is no target, log_probs, entropy and is_top1 are zero.

    Attributes:
        loss: fp32 scalar, or None if log_probs have the gradient.
        log_probs: [B, T] fp32, of the target.
        entropy: [B, T] fp32, of the softmax, in nats; without gradient.
        is_top1: [B, T] bool, whether the target is the first of the largest logits.
        label_mask: [B, T] bool, where there is a target.
        mean_logits: [B, T] fp32, over the vocabulary, without gradient; None if not asked for.
        aux_loss: fp32 scalar, the load-balancing loss of experts; None without ``output_router_logits``.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


@torch.no_grad()
def mean_logits(
    hidden: torch.Tensor,  # [..., H]
    weight: torch.Tensor,  # [V, H]
    bias: torch.Tensor | None,  # [V]
    scale: float,
) -> torch.Tensor:
    """Mean over the vocabulary of ``scale * (hidden @ weight.T + bias)``, [...] in fp32.

    By the mean row of the weight: no logits are made.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            mean += bias.mean(dtype=torch.float32)
        return scale * mean


def auxiliary_loss(
    config: Any, router_logits: Any, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The load-balancing loss of one batch, as every model of experts in transformers computes it."""
    # Late: few models need it, and it brings a model's whole code along.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = config.get_text_config()
    return load_balancing_loss_func(  # type: ignore[no-any-return]
        router_logits, text.num_experts, text.num_experts_per_tok, attention_mask
    )
