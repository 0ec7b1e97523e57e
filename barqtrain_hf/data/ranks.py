"""Which of the processes that train together this one is."""

from __future__ import annotations

import os

import torch

from barqtrain_hf.data.packing import non_negative_int, positive_int
from barqtrain_hf.errors import ArgumentError


def find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Both arguments checked, or found out if both are None.

    They are then those of ``torch.distributed`` where it is initialised, else ``RANK`` and
    ``WORLD_SIZE`` of the environment, which torchrun and accelerate set, else 0 and 1.

    Raises:
        ArgumentError: only one of them is given, or they do not go together.
        ArgumentTypeError: one is no integer.
    """
    if (rank is None) != (world_size is None):
        raise ArgumentError(
            f"rank is {rank!r} and world_size is {world_size!r}: pass both, or neither to have them found "
            "out."
        )
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        found = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            rank, world_size = map(int, found)
        except ValueError:
            raise ArgumentError(
                f"RANK is {found[0]!r} and WORLD_SIZE is {found[1]!r} in the environment: set both to "
                "integers, or pass rank and world_size."
            ) from None
    world_size = positive_int("world_size", world_size)
    rank = non_negative_int("rank", rank)
    if rank >= world_size:
        raise ArgumentError(f"rank is {rank}: pass 0 to world_size - 1 = {world_size - 1}.")
    return rank, world_size
