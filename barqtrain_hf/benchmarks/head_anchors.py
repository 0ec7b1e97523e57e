"""What others offer for a linear layer with cross-entropy, each as `loss(hidden, weight, target)`.

All take hidden [N, H], weight [V, H] and labels [N] with -100 where there is no loss, and return the mean
over the other rows. They are called as their own trainers call them, with their default settings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

IGNORE_INDEX = -100
LIGER = "Liger"

# Vocabulary columns per tile in TRL's trainers: `_CHUNKED_LOGPROB_CHUNK_SIZE` of trl.trainer.utils.
_TRL_CHUNK_SIZE = 32768


def anchors() -> tuple[dict[str, Loss], dict[str, str]]:
    """The implementations found here by name, and for the others why they were not."""
    found: dict[str, Loss] = {
        "eager": materialised,
        # Shapes are static: a second case would otherwise be compiled for any size, which is slower.
        "torch.compile": torch.compile(materialised, dynamic=False),
    }
    missing = {}
    for name, load in ((LIGER, _liger), ("CCE", _cce), ("TRL fused head", _trl)):
        try:
            found[name] = load()
        except ImportError as error:
            missing[name] = f"not installed: {error}"
        except Exception as error:  # installed but broken beside these versions: the rows say how
            missing[name] = reason(error)
    return found, missing


def materialised(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What transformers does: all logits in the model's dtype, then all of them in fp32."""
    return F.cross_entropy((hidden @ weight.t()).float(), target, ignore_index=IGNORE_INDEX)


def reason(error: Exception) -> str:
    """Type and first line of an error, for a row of the report."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


def _liger() -> Loss:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found,import-untyped]
        liger_fused_linear_cross_entropy,
    )

    return lambda hidden, weight, target: liger_fused_linear_cross_entropy(
        hidden, weight, target, ignore_index=IGNORE_INDEX
    )


def _cce() -> Loss:
    from cut_cross_entropy import (  # type: ignore[import-not-found,import-untyped]
        linear_cross_entropy,
    )

    # Its default skips blocks of the gradient whose entries are all below 2^-12, before scaling.
    return lambda hidden, weight, target: linear_cross_entropy(
        hidden, weight, target, ignore_index=IGNORE_INDEX
    )


def _trl() -> Loss:
    # The backward pass imports trl.trainer.utils, and with it `datasets`: missing here, not in a row.
    import trl.trainer.utils  # type: ignore[import-not-found,import-untyped]  # noqa: F401
    from trl.kernels.chunked_logprob import (  # type: ignore[import-not-found,import-untyped]
        ChunkedLogProbFunction,
    )

    def loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        valid = target != IGNORE_INDEX
        # SFTTrainer compacts the rows so, and waits for their number. It also asks for the entropy and
        # the top-1 hit, for its logs; without them (`outputs`) the head is at its fastest.
        no_bias, temperature, softcap, logit_scale, outputs = None, 1.0, None, 1.0, ()
        log_probs, *_ = ChunkedLogProbFunction.apply(
            *(hidden[valid], weight, no_bias, target[valid], temperature, _TRL_CHUNK_SIZE),
            *(softcap, logit_scale, outputs),
        )
        return -log_probs.mean()

    return loss
