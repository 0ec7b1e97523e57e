"""The one batch layout that keeps documents apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class _Told(NamedTuple):
    """What was read of tensors on the host before they were moved."""

    boundaries: list[int]
    of: tuple[tuple[torch.Tensor, int], ...]  # the moved ones and their versions


class PackedBatch(dict[str, Any]):
    """A batch that knows on the host where its documents end, wherever its tensors are.

    It is read from the tensors when they leave the host, so whoever changes a batch before need not tell.
    """

    _told: _Told | None = None

    @property
    def boundaries(self) -> list[int] | None:
        """Where each document starts and, last, the number of tokens; not to be changed. None where only the
        device could tell, or ``position_ids`` and ``cu_seq_lens_q`` tell of other documents.
        """
        tensors = self.get("position_ids"), self.get("cu_seq_lens_q")
        if self._told is not None and all(
            tensor is told and tensor._version == version
            for tensor, (told, version) in zip(tensors, self._told.of, strict=True)
        ):
            return self._told.boundaries
        if all(isinstance(tensor, torch.Tensor) and tensor.is_cpu for tensor in tensors):
            return _boundaries(*tensors)  # type: ignore[arg-type]
        return None

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device: what accelerate looks for in a batch."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        boundaries = self.boundaries
        batch = PackedBatch(
            (key, change(value) if isinstance(value, torch.Tensor) else value)
            for key, value in self.items()
        )
        if _same(self.get("cu_seq_lens_q"), self.get("cu_seq_lens_k")):
            # One tensor, though a DataLoader may have copied it twice.
            batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"]
        if boundaries is not None:
            tensors = batch["position_ids"], batch["cu_seq_lens_q"]
            # Tensors of inference mode do not say when they change.
            if not any(tensor.is_inference() for tensor in tensors):
                of = tuple((tensor, tensor._version) for tensor in tensors)
                batch._told = _Told(boundaries, of)
        return batch


def _boundaries(position_ids: torch.Tensor, cu_seq_lens: torch.Tensor) -> list[int] | None:
    """Of tensors on the host, or None where they tell of other documents."""
    if position_ids.dim() != 2 or position_ids.shape[0] != 1 or cu_seq_lens.dim() != 1:
        return None
    begins = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    boundaries = [0, *begins.tolist(), position_ids.shape[1]]
    return boundaries if boundaries == cu_seq_lens.tolist() else None


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors are one, or equal on the host."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    return one is other or (one.is_cpu and other.is_cpu and torch.equal(one, other))


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
        # Indexed as arrays: a view of a tensor takes ten times as long, in which no other thread has the GIL.
        "input_ids": torch.from_numpy(input_ids[None]),
        "labels": torch.from_numpy(labels[None]),
        "position_ids": torch.from_numpy(position_ids[None]),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        # transformers looks for documents in position_ids only if no KV cache is made, and
        # config.use_cache is True by default: documents would attend to each other, unsaid.
        "use_cache": False,
    }
    return PackedBatch(tensors)


def sequence_index(cu_seq_lens: torch.Tensor) -> torch.Tensor:
    """Which document each token is of: int32 of shape ``[1, T]``."""
    numbers = torch.arange(len(cu_seq_lens) - 1, dtype=torch.int32)
    return numbers.repeat_interleave(cu_seq_lens.diff())[None]
