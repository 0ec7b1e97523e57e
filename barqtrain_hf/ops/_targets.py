"""Which rows have a target: at most one device sync, or none where syncs are impossible."""

from __future__ import annotations

import functools

import torch

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.runtime import Kernel, cuda_unavailable_reason

# A gather and a scatter of all rows cost more than the products of this share of them.
_WORTH_DROPPING = 0.05

# Per device: [1 + row, target] of the first bad target seen where no sync was possible, or zeros.
_pending: dict[torch.device, torch.Tensor] = {}
# Devices with calls that could not look; a CUDA graph may be replayed at any time later.
_without_sync: set[torch.device] = set()


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a CUDA graph, which forbids all waiting."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class CountedTarget:
    """Targets whose number of rows is on its way to the host.

    `linear_cross_entropy` must know how many rows have a target before it can drop the others. Made
    before the model computes its hidden states, this asks the device then, and the op does not wait for
    the model: the host stays ahead of the device.

    Args:
        target: [...] int64, not to be changed until the loss is computed.
        ignore_index: as in `linear_cross_entropy`.
    """

    def __init__(self, target: torch.Tensor, ignore_index: int = -100) -> None:
        self.target = target
        self.ignore_index = ignore_index
        device = target.device
        self.on_device = torch.zeros(3, dtype=torch.int64, device=device)
        flat = target.reshape(-1)
        if len(flat) and device.type == "cuda" and cuda_unavailable_reason() is None:
            arguments = (flat.contiguous(), self.on_device, len(flat), ignore_index)
            _count_kernel()((1, 1, 1), (1024, 1, 1), *arguments)
        elif len(flat):
            ignored = flat == ignore_index
            low, high = torch.aminmax(flat.masked_fill(ignored, 0))
            self.on_device = torch.stack((len(flat) - ignored.sum(), low, high))
        numbers = torch.cat((self.on_device, _pending_on(device)))
        self._numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def numbers(self) -> tuple[int, int, int]:
        """Rows that are not ignored, and their smallest and largest target (or 0).

        Raises:
            ArgumentError: see `raise_bad_target`.
        """
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        count, low, high, *noted = self._numbers.tolist()
        self._numbers[3:] = 0  # an error is raised once
        _raise(noted, self.target.device)
        return count, low, high


@functools.cache
def _count_kernel() -> Kernel:
    numbers = {"targets": torch.int64, "numbers": torch.int64}
    return Kernel("targets.cu", "count_targets<0>", {**numbers, "rows": "int64", "ignore": "int64"})


def valid_rows(
    target: torch.Tensor, counted: CountedTarget | None, ignore_index: int, vocabulary: int
) -> torch.Tensor | None:
    """Indices of the rows whose target is a class, or None to take all rows as they are.

    Args:
        target: [N] int64.
        counted: of the same targets. Without it nothing reaches the host: all rows are taken, and a bad
            target is noted for `raise_bad_target`.

    Raises:
        ArgumentError: a target that is neither a class nor ``ignore_index``.
    """
    pending = _pending_on(target.device)
    if counted is None:
        _without_sync.add(target.device)
        _note(target, ignore_index, vocabulary, pending)
        return None
    count, low, high = counted.numbers()
    if low < 0 or high >= vocabulary:
        _note(target, ignore_index, vocabulary, pending)
        hint = f" of {vocabulary}; a row without a loss must have ignore_index ({ignore_index})"
        _raise(pending.tolist(), target.device, hint)
    if count >= (1.0 - _WORTH_DROPPING) * len(target):
        return None
    return torch.nonzero_static(target != ignore_index, size=count).squeeze(1)


def raise_bad_target() -> None:
    """Raises for a bad target noted since the last call; one sync if there was ever a call without one.

    Raises:
        ArgumentError: with the row and the value.
    """
    for device in _without_sync:
        _raise(_pending[device].tolist(), device)


def _raise(noted: list[int], device: torch.device, hint: str = "") -> None:
    row, target = noted
    if row:
        _pending[device].zero_()
        raise ArgumentError(
            f"linear_cross_entropy: target[{row - 1}] = {target} is outside the vocabulary"
            f"{hint or '; a row without a loss must have the ignore_index'}."
        )


def _pending_on(device: torch.device) -> torch.Tensor:
    # Made by the first call of any kind, so that a CUDA graph captured later does not reset it.
    if device not in _pending:
        _pending[device] = torch.zeros(2, dtype=torch.int64, device=device)
    return _pending[device]


def _note(target: torch.Tensor, ignore_index: int, vocabulary: int, pending: torch.Tensor) -> None:
    if len(target) == 0:
        return
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    row = wrong.to(torch.int8).argmax(keepdim=True)
    found = torch.cat((row + 1, target.gather(0, row)))
    pending.copy_(torch.where((pending[0] == 0) & wrong.any(), found, pending))
