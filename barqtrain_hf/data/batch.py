"""The one batch layout that keeps documents apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def packed_batch(
    input_ids: npt.NDArray[np.integer],  # [T]
    labels: npt.NDArray[np.integer],  # [T]
    position_ids: npt.NDArray[np.integer],  # [T]
    boundaries: npt.NDArray[np.int32],  # [documents + 1]
    longest: int,
) -> dict[str, Any]:
    """The arrays as what a model takes: one row of T tokens; the tensors share their memory."""
    cu_seq_lens = torch.from_numpy(boundaries)
    return {
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


def sequence_index(cu_seq_lens: torch.Tensor) -> torch.Tensor:
    """Which document each token is of: int32 of shape ``[1, T]``."""
    numbers = torch.arange(len(cu_seq_lens) - 1, dtype=torch.int32)
    return numbers.repeat_interleave(cu_seq_lens.diff())[None]
