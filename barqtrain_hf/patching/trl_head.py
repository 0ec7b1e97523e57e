"""TRL's fused head, answered by ours.

TRL (1.16) gives the model of SFTTrainer, DPOTrainer and others a forward that takes ``fused_lm_head=True``
and returns log-probabilities instead of logits. It lies over ours (`head`), which was there before it. A
third one over both turns that request into one for ours, and the answer into TRL's own output class:

    accelerate's autocast, if the model was prepared since  ->  this  ->  TRL's  ->  ours
    this  ->  accelerate's autocast, if it was prepared before  ->  TRL's  ->  ours

so that whatever wraps the forward stays in force, and TRL's trainers compute their losses and metrics as
ever. What a release of TRL returns is looked at when this is installed: nothing here imports it.
"""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

import torch
from torch import nn

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.patching import head, head_lora, probe, sharding
from barqtrain_hf.patching.report import PatchReport
from barqtrain_hf.patching.token_output import TokenOutput

OP = "fused_lm_head"
_REQUEST = "fused_lm_head"
_MARK = "_answers_fused_lm_head"  # set on our forward, with what the probe has learned
_FIELDS = {"log_probs", "entropy", "mean_logits", "is_top1", "label_mask", "loss", "aux_loss"}


def asked_for(model: nn.Module) -> bool:
    """Whether TRL has given ``model`` its fused head."""
    return any(_REQUEST in _arguments(forward) for forward in head.forwards(model))


def _arguments(forward: Any) -> tuple[str, ...]:
    code = getattr(forward, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def install(
    model: nn.Module, report: PatchReport, max_extra_bytes: int | None
) -> str | tuple[types.MethodType, types.MethodType]:
    """Probes and binds the forward that answers TRL's requests.

    Args:
        model: the transformers model itself, in which `asked_for` and `head.is_bound` were true, the latter
            before TRL's head came over ours.
        report: is told of calls that are left to TRL.
        max_extra_bytes: as in `linear_cross_entropy`.

    Returns:
        The bound forward and the one it lies over, or the reason why TRL's head stays.
    """
    reason = _unsupported(model)
    if reason is not None:
        return reason
    previous: Any = model.forward
    forward = types.MethodType(_forward(model, previous, report, max_extra_bytes), model)
    difference: str | None = "the probe was interrupted"
    model.forward = forward  # `head.is_bound` follows its mark
    try:
        difference = _probe(model, forward, previous)
    finally:
        if difference is not None:
            model.forward = previous
    return (forward, previous) if difference is None else difference


def _unsupported(model: nn.Module) -> str | None:
    if not isinstance(model.forward, types.MethodType):
        return "its forward is no method"
    leaf = head.leaves(model)[0]
    if head_lora.is_lora_linear(leaf):
        return "the head has a LoRA adapter, which TRL's leaves out"
    return sharding.sharded(leaf.weight) or sharding.missing(leaf.weight)


def _forward(
    model: nn.Module, previous: Any, report: PatchReport, max_extra_bytes: int | None
) -> Any:
    # What TRL's head returns: its class, and the fields that its trainer asked for. The probe finds out.
    known: dict[str, Any] = {}
    owner = weakref.ref(model)
    cls, function = type(model), previous.__func__

    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return function(self, *args, **kwargs)
        reason = head.head_unsupported(self, kwargs, tokens=True)
        if owner() is not self:
            # TRL's forward hands ours the model that it was made for, in a deep copy of it too.
            reason = "the model is a copy"
        if reason is not None:
            report.fall_back(OP, reason)
            return function(self, *args, fused_lm_head=True, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        fused = head.FusedLoss(
            max_extra_bytes=max_extra_bytes,
            tokens="gradient",
            mean_logits="mean_logits" in known["fields"],
        )
        outputs = function(self, *args, fused_loss=fused, **kwargs)
        if not isinstance(outputs, TokenOutput):
            raise UnsupportedError(
                f"{cls.__name__} did not pass fused_loss on to barqtrain_hf's forward.",
                'Pass barq_config={"linear_cross_entropy": False}.',
            )
        return _answer(known["class"], known["fields"], outputs, kwargs, num_items, self.config)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    if _REQUEST not in _arguments(function):
        # accelerate's autocast lies between, and follows this when it takes itself out.
        forward.__wrapped__ = previous  # type: ignore[attr-defined]
    setattr(forward, _MARK, known)
    setattr(forward, head.MARK, True)
    return forward


def _answer(
    output_class: Any,
    fields: frozenset[str],
    outputs: TokenOutput,
    inputs: dict[str, Any],
    num_items: Any,
    config: Any,
) -> Any:
    """Ours as TRL's: without the last column, which predicts nothing unless labels came shifted."""
    values: dict[str, Any] = {
        name: getattr(outputs, name)
        for name in ("log_probs", "entropy", "is_top1", "label_mask", "mean_logits")
        if name in fields
    }
    if inputs.get("shift_labels") is None:
        values = {name: value[:, :-1] for name, value in values.items()}
    log_probs, mask = values["log_probs"], values["label_mask"]
    if "entropy" in fields:
        values["entropy"] = _WithoutGradient.apply(values["entropy"], log_probs)
    if "mean_logits" in fields:
        values["mean_logits"] = values["mean_logits"].masked_fill(~mask, 0.0)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    if outputs.aux_loss is not None:
        text_config = config.get_text_config()
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * outputs.aux_loss
    return output_class(**values, loss=loss, aux_loss=outputs.aux_loss)


class _WithoutGradient(torch.autograd.Function):
    """The entropy, as something that must not be trained on: ours has no gradient, and TRL's has one."""

    @staticmethod
    def forward(ctx: Any, entropy: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor | None) -> tuple[None, None]:  # type: ignore[override]
        if upstream is not None:
            raise UnsupportedError(
                "the loss depends on the entropy, which has no gradient in barqtrain_hf's head.",
                'Pass barq_config={"linear_cross_entropy": False}, or entropy_coef=0.',
            )
        return None, None


@probe.full_precision()
def _probe(model: nn.Module, ours: Any, theirs: Any) -> str | None:
    """Both heads on given hidden states: the same numbers for every field, and the same gradient."""
    leaf = head.leaves(model)[0]
    with sharding.gathered(leaf.parameters()), torch.enable_grad():
        weight = leaf.weight
        assert isinstance(weight, torch.Tensor)
        hidden, labels = _probe_inputs(weight)
        inputs = {"input_ids": torch.zeros_like(labels), "labels": labels}
        dtypes: list[torch.dtype] = []
        results = []
        try:
            for forward in (theirs, ours):
                with head.given_hidden_states(model, hidden, dtypes):
                    outputs = forward(**inputs, fused_lm_head=True, output_router_logits=False)
                if forward is theirs:
                    reason = _learn(ours, outputs, model.config)
                    if reason is not None:
                        return reason
                (gradient,) = torch.autograd.grad(
                    outputs.log_probs, hidden, torch.linspace(-1, 1, 8, device=hidden.device)[None]
                )
                results.append((outputs, gradient))
        except Exception as error:  # whatever a foreign forward raises, its head is not ours
            return f"the probe fails: {type(error).__name__}: {error}"
    (stock, stock_gradient), (answer, gradient) = results
    names = sorted(getattr(ours.__func__, _MARK)["fields"] | {"loss"})
    return probe.first_difference(
        [*names, "the gradient of log_probs"],
        [*(getattr(answer, name).float() for name in names), gradient],
        [*(getattr(stock, name).float() for name in names), stock_gradient],
        dtypes[0],
    )


def _learn(ours: Any, outputs: Any, config: Any) -> str | None:
    """Keeps what TRL's head returns for the answers of ours, or says what it asks too much."""
    given = {name for name, value in outputs.items() if value is not None}
    if not given >= {"log_probs", "label_mask"}:
        return (
            f"TRL's head gives {', '.join(sorted(given))}, and no log_probs with their label_mask"
        )
    if given - _FIELDS:
        return f"the trainer wants {', '.join(sorted(given - _FIELDS))}, which ours does not give"
    if "mean_logits" in given and getattr(config, "final_logit_softcapping", None) is not None:
        return "the trainer wants the mean of logits with a softcap, which needs the logits"
    known = getattr(ours.__func__, _MARK)
    known["class"], known["fields"] = type(outputs), frozenset(given - {"loss", "aux_loss"})
    return None


def _probe_inputs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [1, 9, H] that ask for a gradient, and labels [1, 9].

    Every other state points at its label, so that it is the largest logit by far; at random it never
    would be, and a narrow win could go either way in 16 bits.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    labels = torch.randint(len(weight), (1, 9), generator=generator, device=weight.device)
    with torch.no_grad():
        shape = (1, 9, weight.shape[1])
        hidden = torch.randn(shape, generator=generator, device=weight.device)
        scale = 3.0 / (hidden.to(weight.dtype) @ weight.T).float().std().clamp(min=1e-6)
        hidden *= scale
        targets = weight[labels[0, 1:]].float()
        targets *= hidden[0, :-1].norm(dim=1, keepdim=True) / targets.norm(dim=1, keepdim=True)
        hidden[0, :-1:2] = targets[::2]
    labels[0, 3:5] = -100
    return hidden.to(weight.dtype).requires_grad_(), labels
