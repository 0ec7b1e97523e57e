"""TRL's metrics of each micro-batch, kept on the device until they are logged."""

from __future__ import annotations

from typing import Any

import torch

from barqtrain_hf.patching import TokenOutput


class TokenMetrics:
    """Means over micro-batches of what SFTTrainer logs; reading them waits for the device once.

    SFTTrainer reads three numbers of every micro-batch and waits for the device each time. The values
    are the same: a micro-batch's sums over all ranks, their ratio, and the mean of the ratios.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}  # by mode: entropy, accuracy, tokens, aux_loss
        self._batches: dict[str, int] = {}

    def add(
        self, mode: str, outputs: TokenOutput, inputs: dict[str, Any], accelerator: Any
    ) -> None:
        """Counts a micro-batch; one collective, and nothing is read.

        Args:
            mode: "train" or "eval".
            outputs: of the model.
            inputs: of the model.
            accelerator: gathers over ranks.
        """
        assert outputs.entropy is not None and outputs.is_top1 is not None
        assert outputs.label_mask is not None
        mask, aux_loss = outputs.label_mask, outputs.aux_loss
        # Counts beyond 2**24 have no fp32; Apple's GPUs have no fp64.
        dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        # FSDP2 rounds a model's outputs to 16 bits, which is no reason to round their sum.
        entropy = outputs.entropy.sum(dtype=torch.float32)
        parts = [mask.sum(), entropy, outputs.is_top1.sum(), _tokens(inputs, mask)]
        if aux_loss is not None:
            parts.append(aux_loss.detach())
        local = torch.stack([part.to(mask.device, dtype) for part in parts])
        ranks = accelerator.gather_for_metrics(local[None])  # [ranks, parts]
        total = ranks.sum(0)
        ratios = total[1:3] / total[0].clamp(min=1)
        values = torch.cat((ratios, total[3:4], ranks[:, 4:].mean(0)))
        self._sums[mode] = self._sums[mode] + values if mode in self._sums else values
        self._batches[mode] = self._batches.get(mode, 0) + 1

    def read(self) -> dict[str, tuple[int, dict[str, float], int]]:
        """By mode: micro-batches since the last call, the means over them, and their tokens."""
        found = {}
        for mode, sums in self._sums.items():
            count, (entropy, accuracy, tokens, *aux_loss) = self._batches[mode], sums.tolist()
            means = {"entropy": entropy / count, "mean_token_accuracy": accuracy / count}
            if aux_loss:
                means["aux_loss"] = aux_loss[0] / count
            found[mode] = count, means, round(tokens)
        self._sums, self._batches = {}, {}
        return found


def _tokens(inputs: dict[str, Any], like: torch.Tensor) -> torch.Tensor:
    """Tokens that are no padding, as SFTTrainer counts them."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.sum()  # type: ignore[no-any-return]
    # A number that is copied to the device would have to wait for it.
    return torch.full((), inputs["position_ids"].size(1), device=like.device)
