"""patch_model and unpatch_model: walk, match, probe, bind, restore."""

from __future__ import annotations

import types
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from barqtrain_hf.config import BarqConfig
from barqtrain_hf.patching import head, norms
from barqtrain_hf.patching.report import PatchReport


class _Patches:
    """What is bound in one model."""

    def __init__(self) -> None:
        self.report = PatchReport()
        self.leaves: list[tuple[nn.Module, Any]] = []
        self.head: list[tuple[nn.Module, Any]] = []


_patches: WeakKeyDictionary[nn.Module, _Patches] = WeakKeyDictionary()


def patch_model(
    model: nn.Module,
    config: BarqConfig | dict[str, Any] | str | None = None,
    *,
    leaves: bool = True,
    fused_head: bool = True,
) -> PatchReport:
    """Binds our forwards on instances of ``model``; its weights and its classes are not touched.

    Calling it again adds what is missing. The fused head changes nothing by itself: `BarqTrainer` asks
    for it. Every forward falls back to the stock one for calls it does not cover.

    Args:
        model: a transformers model, plain or under PEFT.
        config: which ops; see `BarqConfig.load`.
        leaves: bind leaf ops such as norms.
        fused_head: bind the loss in the LM head.

    Returns:
        What was installed, what was not and why; it keeps counting fallbacks while the model runs.
    """
    config = BarqConfig.load(config)
    base = unwrap(model)
    patches = _patches.setdefault(base, _Patches())
    report = patches.report
    if fused_head and config.linear_cross_entropy and not patches.head:
        result = head.install(base)
        if isinstance(result, str):
            report.skipped = {k: v for k, v in report.skipped.items() if k[0] != head.OP}
            report.skip(head.OP, "", result)
        else:
            patches.head = result
            report.add(head.OP, "the LM head")
    if leaves and config.rms_norm and not patches.leaves:
        report.installed.pop(norms.OP, None)
        report.skipped = {k: v for k, v in report.skipped.items() if k[0] != norms.OP}
        for name, module in base.named_modules():
            if norms.is_candidate(module):
                _bind_norm(base, name, module, patches)
    return report


def unpatch_model(model: nn.Module, *, leaves: bool = True, fused_head: bool = True) -> None:
    """Restores the stock forwards of a patched model; does nothing to one that is not.

    The root's forward stays where another package has wrapped it since (accelerate's autocast does):
    it is inert, and taking it out would take the wrapper with it.
    """
    patches = _patches.get(unwrap(model))
    if patches is None:
        return
    for chosen, bound in ((leaves, patches.leaves), (fused_head, patches.head)):
        if chosen:
            for module, forward in bound:
                if module.__dict__.get("forward") is forward:
                    del module.forward
            bound.clear()


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DDP and PEFT wrappers."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def _bind_norm(base: nn.Module, name: str, module: nn.Module, patches: _Patches) -> None:
    if getattr(base, "use_kernels", False):
        reason: Any = "the model was loaded with use_kernels=True, which rebinds forwards itself"
    elif "forward" in module.__dict__:
        reason = "its forward is already patched (by accelerate, Liger or another package)"
    else:
        reason = norms.new_forward(module, patches.report)
    if isinstance(reason, str):
        patches.report.skip(norms.OP, name, reason)
        return
    forward = types.MethodType(reason, module)
    module.forward = forward
    patches.leaves.append((module, forward))
    patches.report.add(norms.OP, name)
