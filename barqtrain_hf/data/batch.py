"""The one batch layout that keeps documents apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class PackedBatch(dict[str, Any]):
    """A batch that knows on the host where its documents end, wherever its tensors are.

    Attributes:
        boundaries: where each document starts and, last, the number of tokens; None in a copy that was made
            key by key.
    """

    boundaries: list[int] | None = None

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device: what accelerate looks for in a batch."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        batch = PackedBatch(
            (key, change(value) if isinstance(value, torch.Tensor) else value)
            for key, value in self.items()
            if key != "cu_seq_lens_k"
        )
        if "cu_seq_lens_k" in self:  # one tensor, though a DataLoader may have copied it twice
            batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"]
        batch.boundaries = self.boundaries
        return batch


def packed_batch(
    input_ids: npt.NDArray[np.integer],  # [T]
    labels: npt.NDArray[np.integer],  # [T]
    position_ids: npt.NDArray[np.integer],  # [T]
    boundaries: npt.NDArray[np.int32],  # [documents + 1]
    longest: int,
) -> PackedBatch:
    """The arrays as what a model takes: one row of T tokens; the tensors share their memory."""
    cu_seq_lens = torch.from_numpy(boundaries)
    tensors = {
        "input_ids": torch.from_numpy(input_ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        # transformers looks for documents in position_ids only if no KV cache is made, and
        # config.use_cache is True by default: documents would attend to each other, unsaid.
        "use_cache": False,
    }
    batch = PackedBatch(tensors)
    batch.boundaries = boundaries.tolist()
    return batch


def sequence_index(cu_seq_lens: torch.Tensor) -> torch.Tensor:
    """Which document each token is of: int32 of shape ``[1, T]``."""
    numbers = torch.arange(len(cu_seq_lens) - 1, dtype=torch.int32)
    return numbers.repeat_interleave(cu_seq_lens.diff())[None]
