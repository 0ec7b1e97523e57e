"""A model beside its patched self, for the tests of patching."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from barqtrain_hf import unpatch_model
from barqtrain_hf.patching import FusedLoss

GATE = 1.25  # of error(ours) to error(stock), as for every op
_BOUND = ("forward", "_apply_gate")


class Run(NamedTuple):
    """What one call of a model gave."""

    logits: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor]


def batch(rows: int = 2, length: int = 20) -> dict[str, torch.Tensor]:
    """Random tokens, which are their own labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def run(model: Any, inputs: dict[str, Any], autocast: bool = False, fused: bool = False) -> Run:
    """Logits, loss and every gradient; with ``fused`` the loss that is computed in the head."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**inputs)
        loss = outputs.loss
        if fused:
            loss = model(**inputs, fused_loss=FusedLoss()).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(outputs.logits.detach(), loss, list(torch.autograd.grad(loss, trained)))


def assert_equal(ours: Run, stock: Run, tolerance: float = 1e-5) -> None:
    """Equality up to the order of fp32 sums."""
    torch.testing.assert_close(ours.logits, stock.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=tolerance, atol=1e-6)
    for mine, theirs in zip(ours.gradients, stock.gradients, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-7


def assert_as_accurate(ours: Run, stock: Run, truth: Run) -> None:
    """In 16 bits: logits and gradients are no further from those of fp32 than stock's."""
    for mine, theirs, exact in (
        (ours.logits, stock.logits, truth.logits),
        (_flat(ours.gradients), _flat(stock.gradients), _flat(truth.gradients)),
    ):
        assert torch.isfinite(mine).all() and mine.dtype is theirs.dtype
        assert (mine - exact).norm() <= GATE * (theirs - exact).norm()
    torch.testing.assert_close(ours.loss.float(), stock.loss.float(), rtol=2e-3, atol=0.0)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def bound(model: nn.Module) -> list[str]:
    """Modules with something bound on the instance."""
    return [n for n, module in model.named_modules() if any(b in module.__dict__ for b in _BOUND)]


def assert_no_trace(model: Any) -> None:
    """Unpatches; nothing is left on any instance."""
    unpatch_model(model)
    assert bound(model) == []
