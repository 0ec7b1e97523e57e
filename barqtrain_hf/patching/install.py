"""patch_model and unpatch_model: walk, match, probe, bind, restore."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from barqtrain_hf.config import BarqConfig
from barqtrain_hf.errors import ArgumentTypeError
from barqtrain_hf.patching import (
    activations,
    attention,
    experts,
    glu,
    head,
    lora,
    norms,
    probe,
    rope,
    trl_head,
)
from barqtrain_hf.patching.attention_interface import register_attention
from barqtrain_hf.patching.bound import Bound
from barqtrain_hf.patching.candidate import Candidate
from barqtrain_hf.patching.report import PatchReport
from barqtrain_hf.runtime import cuda_unavailable_reason

logger = logging.getLogger(__name__)

# Where a model keeps its _Patches. On the model itself, so that both are collected together and a
# deep copy of a patched model knows what is bound in it.
_ATTRIBUTE = "_barq_patches"
# One file per kind of layer, in the order in which they look at the model.
_KINDS = (norms, glu, experts, activations, rope, attention, lora)
_NO_GPU = "no CUDA device: what is installed runs as its PyTorch reference, not as a kernel"
_LEAF_OPS = ("rms_norm", "layer_norm", "glu", "rope", "attention", "lora")


class _Patches:
    """What is bound in one model, and the configs that name our attention with what they named before."""

    def __init__(self) -> None:
        self.report = PatchReport()
        self.leaf_ops: set[str] = set()
        self.leaves: list[Bound] = []
        self.head: list[Bound] = []
        self.switched: list[tuple[Any, str]] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickled model, whose config names our attention wherever it is loaded."""
        self.__dict__.update(state)
        if self.switched:
            register_attention()


@probe.full_precision()
def patch_model(
    model: nn.Module,
    config: BarqConfig | dict[str, Any] | str | None = None,
    *,
    leaves: bool = True,
    fused_head: bool = True,
) -> PatchReport:
    """Binds our forwards on instances of ``model``; its weights and its classes are not touched.

    Calling it again adds what is missing. The fused head changes nothing by itself: `BarqTrainer` asks
    for it. Every forward falls back to the stock one for calls it does not cover. A patched model that is
    pickled is loaded with stock forwards, and may be patched again.

    Args:
        model: a transformers model, plain or under PEFT, DDP, FSDP or torch.compile.
        config: which ops; see `BarqConfig.load`.
        leaves: bind leaf ops such as norms.
        fused_head: bind the loss in the LM head.

    Returns:
        What was installed, what was not and why; it keeps counting fallbacks while the model runs.

    Raises:
        ArgumentTypeError: ``model`` is no module, such as a name.
    """
    check_module("model", model)
    config = BarqConfig.load(config)
    base = unwrap(model)
    patches = base.__dict__.setdefault(_ATTRIBUTE, _Patches())
    if any(bound.is_stock for bound in (*patches.head, *patches.leaves)):
        # The model was unpickled: it is stock, but for what says that it is not.
        unpatch_model(base)
        patches = base.__dict__[_ATTRIBUTE] = _Patches()
    if fused_head and config.linear_cross_entropy:
        _bind_head(base, config, patches)
    if leaves:
        ops = {op for op in _LEAF_OPS if getattr(config, op)} - patches.leaf_ops
        if rope.OP in ops and attention.OP in patches.leaf_ops:
            # Attention is bound over the rotation, so it comes off and is bound again.
            _unbind_leaves(patches, {attention.OP})
            ops.add(attention.OP)
        if getattr(config, lora.OP):
            # Adapters come and go: those of layers that were wrapped since are found, too.
            _unbind_leaves(patches, {lora.OP})
            ops.add(lora.OP)
        _bind_leaves(base, ops, patches)
    reason = cuda_unavailable_reason()
    if reason is not None:
        is_mistake = torch.cuda.is_available()
        note = reason if is_mistake else _NO_GPU
        if note not in patches.report.notes:
            patches.report.notes.append(note)
            if is_mistake:
                logger.warning("barqtrain_hf runs without its CUDA kernels: %s", reason)
    return patches.report


def unpatch_model(model: nn.Module, *, leaves: bool = True, fused_head: bool = True) -> None:
    """Restores the stock forwards of a patched model; does nothing to one that is not.

    The root's forward stays where another package has wrapped it since (accelerate's autocast does):
    it is inert, and taking it out would take the wrapper with it.

    Raises:
        ArgumentTypeError: ``model`` is no module, such as a name.
    """
    check_module("model", model)
    patches = unwrap(model).__dict__.get(_ATTRIBUTE)
    if patches is None:
        return
    if leaves:
        _unbind_leaves(patches, set(_LEAF_OPS))
    if fused_head:
        for bound in patches.head:
            bound.remove()
        patches.head.clear()
    if leaves and fused_head:
        patches.report = PatchReport()  # of what comes next; who has the old one keeps it


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DDP, FSDP, DeepSpeed and PEFT wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def check_module(name: str, model: Any) -> None:
    """Refuses what is no model; a name or a path is the usual mistake.

    Raises:
        ArgumentTypeError: with what to pass.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, (str, os.PathLike)):
        load = f"AutoModelForCausalLM.from_pretrained({str(model)!r})"
        raise ArgumentTypeError(f"{name} is {model!r}, a name: load it first and pass {load}.")
    given = model.__name__ if isinstance(model, type) else f"of type {type(model).__name__}"
    raise ArgumentTypeError(f"{name} is {given}: pass a model, an instance of torch.nn.Module.")


def asks_for_trl_head(model: nn.Module) -> bool:
    """Whether TRL has given ``model``, plain or wrapped, its fused head."""
    return trl_head.asked_for(unwrap(model))


def _bind_head(base: nn.Module, config: BarqConfig, patches: _Patches) -> None:
    """Binds the loss in the LM head, and what answers TRL's requests where TRL has a head of its own."""
    report, over_ours = patches.report, False
    if not head.is_bound(base):
        # A forward of TRL's over ours does not tell; the probe of what answers it will.
        over_ours = bool(patches.head) and head.leaves_are_bound(base) and trl_head.asked_for(base)
        if not over_ours:
            unpatch_model(base, leaves=False)
            report.forget(head.OP)
            report.forget(trl_head.OP)
            result = head.install(base)
            if isinstance(result, str):
                report.skip(head.OP, "", result)
            else:
                patches.head = result
                report.add(head.OP, "the LM head")
    if over_ours:
        report.forget(trl_head.OP)
        answer = trl_head.install(base, report, config.max_extra_bytes)
        if isinstance(answer, str):
            report.skip(trl_head.OP, "", answer)
        else:
            patches.head.insert(0, Bound(trl_head.OP, base, "forward", *answer))
            report.add(trl_head.OP, "the LM head")


def _bind_leaves(base: nn.Module, ops: set[str], patches: _Patches) -> None:
    """Binds ``ops``, none of which is in the model, wherever they match."""
    patches.leaf_ops |= ops
    probe.forget_failures()
    for op in ops:
        patches.report.forget(op)
    for kind in _KINDS:
        if ops.isdisjoint(kind.OPS):
            continue
        for candidate in kind.candidates(base):
            op, function = _answer(base, candidate, patches.report)
            if op not in ops:
                continue
            if isinstance(function, str):
                if function:
                    patches.report.skip(op, candidate.name, function)
                continue
            patches.leaves.append(Bound.of(op, candidate.module, candidate.attribute, function))
            patches.report.add(op, candidate.name)
    if attention.OP in ops:
        bound = [leaf.module for leaf in patches.leaves if leaf.op == attention.OP]
        patches.switched = attention.switch(bound)
        if not bound:
            # The device may be the reason: a model that is moved to a GPU may be patched again.
            patches.leaf_ops.discard(attention.OP)


def _unbind_leaves(patches: _Patches, ops: set[str]) -> None:
    if attention.OP in ops:
        attention.switch_back(patches.switched)
        patches.switched.clear()
    for bound in patches.leaves:
        if bound.op in ops:
            bound.remove()
    patches.leaves = [bound for bound in patches.leaves if bound.op not in ops]
    patches.leaf_ops -= ops


def _answer(base: nn.Module, candidate: Candidate, report: PatchReport) -> tuple[str, Any]:
    """The op and the function to bind, or the op and why not."""
    if getattr(base, "use_kernels", False):
        return (
            candidate.op,
            "the model was loaded with use_kernels=True, which rebinds forwards itself",
        )
    found = candidate.module.__dict__.get(candidate.attribute)
    if found is not None and not candidate.over(found):
        ours = str(getattr(found, "__module__", "")).startswith(f"{__package__}.")
        by = "with another model" if ours else "by accelerate, Liger or another package"
        return candidate.op, f"its {candidate.attribute} is already patched ({by})"
    answer = candidate.build(report)
    return (candidate.op, answer) if isinstance(answer, str) else answer
