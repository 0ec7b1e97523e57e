"""patch_model and unpatch_model: walk, match, probe, bind, restore."""

from __future__ import annotations

import logging
import types
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from barqtrain_hf.config import BarqConfig
from barqtrain_hf.patching import head, norms, sharding
from barqtrain_hf.patching.report import PatchReport
from barqtrain_hf.runtime import cuda_unavailable_reason

logger = logging.getLogger(__name__)

# Where a model keeps its _Patches. On the model itself, so that both are collected together and a
# deep copy of a patched model knows what is bound in it.
_ATTRIBUTE = "_barq_patches"


class _Patches:
    """What is bound in one model."""

    def __init__(self) -> None:
        self.report = PatchReport()
        self.leaves: list[tuple[nn.Module, Any]] = []
        self.head: list[tuple[nn.Module, Any]] = []


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
        model: a transformers model, plain or under PEFT, DDP, FSDP or torch.compile.
        config: which ops; see `BarqConfig.load`.
        leaves: bind leaf ops such as norms.
        fused_head: bind the loss in the LM head.

    Returns:
        What was installed, what was not and why; it keeps counting fallbacks while the model runs.
    """
    config = BarqConfig.load(config)
    base = unwrap(model)
    patches = base.__dict__.setdefault(_ATTRIBUTE, _Patches())
    if fused_head and config.linear_cross_entropy and not head.is_bound(base):
        unpatch_model(base, leaves=False)
        patches.report.forget(head.OP)
        result = head.install(base)
        if isinstance(result, str):
            patches.report.skip(head.OP, "", result)
        else:
            patches.head = result
            patches.report.add(head.OP, "the LM head")
    if leaves and config.rms_norm and not patches.leaves:
        patches.report.forget(norms.OP)
        for name, module in base.named_modules():
            if norms.is_candidate(module):
                with sharding.gathered(module.parameters()):
                    _bind_norm(base, name, module, patches)
    reason = cuda_unavailable_reason()
    if reason is not None and torch.cuda.is_available() and not patches.report.notes:
        patches.report.notes.append(reason)
        logger.warning("barqtrain_hf runs without its CUDA kernels: %s", reason)
    return patches.report


def unpatch_model(model: nn.Module, *, leaves: bool = True, fused_head: bool = True) -> None:
    """Restores the stock forwards of a patched model; does nothing to one that is not.

    The root's forward stays where another package has wrapped it since (accelerate's autocast does):
    it is inert, and taking it out would take the wrapper with it.
    """
    patches = unwrap(model).__dict__.get(_ATTRIBUTE)
    if patches is None:
        return
    for chosen, bound in ((leaves, patches.leaves), (fused_head, patches.head)):
        if chosen:
            for module, forward in bound:
                if module.__dict__.get("forward") is forward:
                    del module.forward
            bound.clear()


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DDP, FSDP, DeepSpeed and PEFT wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def _bind_norm(base: nn.Module, name: str, module: nn.Module, patches: _Patches) -> None:
    if getattr(base, "use_kernels", False):
        reason = "the model was loaded with use_kernels=True, which rebinds forwards itself"
    elif "forward" in module.__dict__:
        reason = "its forward is already patched (by accelerate, Liger or another package)"
    else:
        found = norms.new_forward(module, patches.report)
        if not isinstance(found, str):
            forward = types.MethodType(found, module)
            module.forward = forward
            patches.leaves.append((module, forward))
            patches.report.add(norms.OP, name)
            return
        reason = found
    patches.report.skip(norms.OP, name, reason)
