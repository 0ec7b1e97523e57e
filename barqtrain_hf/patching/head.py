"""The LM head: the loss is computed inside it, so that logits need not exist.

Two forwards are bound. The head's own takes a `FusedLoss` and then returns the loss; it is called as a
module, so that the hooks of FSDP2, ZeRO-3 and PEFT that gather or choose its weight fire. The root's
takes the same `FusedLoss`, runs the base model and hands its hidden states to the head; it is inert
until a trainer passes one. Neither is removed after training: accelerate wraps the root's forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutput

from barqtrain_hf.errors import UnsupportedError
from barqtrain_hf.ops import CountedTarget, linear_cross_entropy
from barqtrain_hf.ops._targets import capturing
from barqtrain_hf.patching import head_lora, known_documents, probe, sharding
from barqtrain_hf.patching.bound import Bound
from barqtrain_hf.patching.token_output import TokenOutput, auxiliary_loss, mean_logits

OP = "linear_cross_entropy"
MARK = "_takes_fused_loss"  # set on our root forwards


class FusedLoss:
    """Asks a patched model for its loss. A plain class on purpose: FSDP2 casts every floating tensor it
    finds in the arguments, and ``num_items`` in bf16 would be off by up to 0.4 %.

    Args:
        num_items: divisor of the summed loss, or None for the mean over this batch's targets.
        label_smoothing: as in `linear_cross_entropy`.
        max_extra_bytes: as in `linear_cross_entropy`.
        tokens: the model returns a `TokenOutput`. With ``"statistics"`` its loss has the gradient, with
            ``"gradient"`` its log_probs.
        mean_logits: of tokens, too; not for a model with a softcap.
    """

    def __init__(
        self,
        num_items: torch.Tensor | float | None = None,
        label_smoothing: float = 0.0,
        max_extra_bytes: int | None = None,
        *,
        tokens: Literal["statistics", "gradient"] | None = None,
        mean_logits: bool = False,
    ) -> None:
        self.num_items = num_items
        self.label_smoothing = label_smoothing
        self.max_extra_bytes = max_extra_bytes
        self.tokens = tokens
        self.mean_logits = mean_logits


class _Target:
    """What the root hands to the head; opaque to FSDP2 for the same reason as `FusedLoss`."""

    def __init__(self, labels: torch.Tensor | CountedTarget, fused: FusedLoss, config: Any) -> None:
        self.labels, self.fused, self.config = labels, fused, config

    def on(self, device: torch.device) -> torch.Tensor | CountedTarget:
        """The labels on the head's device, which may not be the first layer's."""
        labels = self.labels.target if isinstance(self.labels, CountedTarget) else self.labels
        return self.labels if labels.device == device else labels.to(device)


def install(model: nn.Module) -> str | list[Bound]:
    """Probes and binds the root's and the head's forwards.

    Returns:
        What is bound, or the reason why the model keeps its own loss.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        return "it is not a transformers model"
    if model.get_output_embeddings() is None:
        return "it has no LM head"
    with sharding.gathered(p for leaf in leaves(model) for p in leaf.parameters()):
        return _install(model)


def _install(model: nn.Module) -> str | list[Bound]:
    reason = _structure_unsupported(model)
    if reason is not None:
        return reason
    root_forward = _root_forward(type(model))
    bound = [Bound.of(OP, leaf, "forward", _head_forward) for leaf in leaves(model)]
    difference: str | None = "the probe was interrupted"
    try:
        difference = _probe(model, root_forward)
    finally:
        if difference is not None:
            for of_leaf in bound:
                of_leaf.remove()
    if difference is not None:
        return f"its loss is not plain cross-entropy over the head's logits: {difference}"
    return [*bound, Bound.of(OP, model, "forward", root_forward)]


def is_bound(model: nn.Module) -> bool:
    """Whether the root and every current copy of the head take a `FusedLoss`.

    The root's forward may have been wrapped since, by accelerate's autocast. A head may have been
    replaced, by resize_token_embeddings for one.
    """
    return any(hasattr(forward, MARK) for forward in forwards(model)) and leaves_are_bound(model)


def leaves_are_bound(model: nn.Module) -> bool:
    """Whether every current copy of the head takes what our root forward hands it."""
    return all(
        getattr(leaf.__dict__.get("forward"), "__func__", None) is _head_forward
        for leaf in leaves(model)
    )


def forwards(model: nn.Module) -> Iterator[Any]:
    """The functions that the root's forward is made of, outermost first, as far as wrappers tell."""
    forward = model.__dict__.get("forward")
    while forward is not None:
        yield getattr(forward, "__func__", forward)
        forward = getattr(forward, "__wrapped__", None)


def head_unsupported(
    model: nn.Module, inputs: dict[str, Any], *, tokens: bool = False
) -> str | None:
    """Why this call of a model must take the stock forward, or None.

    Args:
        model: the transformers model itself.
        inputs: what it is called with.
        tokens: a `TokenOutput` is wanted, which has room for the router's loss.
    """
    if not is_bound(model):
        return "the model was not patched for it, or has been unpatched or changed since"
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        return "no labels in the batch"
    if not tokens and _routes(model, inputs):
        return "the router's auxiliary loss is on"
    keep = inputs.get("logits_to_keep")
    if isinstance(keep, torch.Tensor) or keep:
        return "logits_to_keep is set"
    if any(inputs.get(name) for name in ("output_hidden_states", "output_attentions")):
        return "hidden states or attentions are asked for"
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head_lora.is_lora_linear(head):
        if "adapter_names" in inputs or "alora_offsets" in inputs:
            return "the batch chooses adapters"
        return head_lora.unsupported(head)
    return None


def _root_forward(cls: type[nn.Module]) -> Any:
    def forward(
        self: nn.Module, *args: Any, fused_loss: FusedLoss | None = None, **kwargs: Any
    ) -> Any:
        if fused_loss is None:
            return cls.forward(self, *args, **kwargs)
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        kwargs.pop("logits_to_keep", None)
        # A cache would be of no use, and makes transformers miss the boundaries of packed documents.
        kwargs["use_cache"] = False
        target = _Target(_counted(shift_labels), fused_loss, self.config)
        if fused_loss.tokens and _routes(self, kwargs):
            kwargs["output_router_logits"] = True
        # Not what a compiler traces: it asks nobody.
        compiling = args or torch.compiler.is_compiling()
        with nullcontext() if compiling else known_documents.forward_pass(self, kwargs):
            outputs = self.base_model(*args, **kwargs)  # type: ignore[operator]
        answer = self.get_output_embeddings()(outputs[0], fused_target=target)  # type: ignore[operator]
        if not fused_loss.tokens:
            return CausalLMOutput(loss=answer)
        loss, log_probs, entropy, is_top1, *means = answer
        aux_loss = None
        if kwargs.get("output_router_logits"):
            mask = kwargs.get("attention_mask")
            aux_loss = auxiliary_loss(self.config, outputs.router_logits, mask)
        return TokenOutput(
            loss=loss if fused_loss.tokens == "statistics" else None,
            log_probs=log_probs if fused_loss.tokens == "statistics" else -loss,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=(shift_labels != -100).to(entropy.device),
            mean_logits=means[0] if means else None,
            aux_loss=aux_loss,
        )

    # The Trainer reads the signature for column names, generate() for model kwargs. Not
    # functools.wraps: accelerate follows __wrapped__ when it unwraps, and would drop this forward.
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    setattr(forward, MARK, True)
    return forward


def _routes(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the router's auxiliary loss is on for this call."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return bool(inputs.get("output_router_logits", getattr(config, "output_router_logits", False)))


def _counted(labels: torch.Tensor) -> torch.Tensor | CountedTarget:
    """Asks for the number of rows with a target before the layers are queued; see `CountedTarget`."""
    if torch.compiler.is_compiling() or capturing(labels.device):
        return labels
    return CountedTarget(labels)


def _head_forward(
    self: nn.Module,
    x: torch.Tensor,
    *args: Any,
    fused_target: _Target | None = None,
    **kwargs: Any,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The logits; with a target the loss, or it and what is known of each token."""
    if fused_target is None:
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    fused, config = fused_target.fused, fused_target.config
    linear: Any = self
    lora = None
    if head_lora.is_lora_linear(self):
        linear, lora = self.base_layer, head_lora.low_rank_product(self, x)
        reason = sharding.sharded(linear.weight) or sharding.missing(linear.weight)
        if reason is not None:
            raise UnsupportedError(
                f"the weight inside the LM head's LoRA layer is not there: {reason}.",
                'Pass barq_config={"linear_cross_entropy": False}.',
            )
    scale = _logit_scale(config)
    result: Any = linear_cross_entropy(  # type: ignore[call-overload, misc]
        x,
        linear.weight,
        fused_target.on(x.device),
        bias=linear.bias,
        lora=lora,
        reduction="none" if fused.tokens == "gradient" else "mean",
        num_items=None if fused.tokens == "gradient" else fused.num_items,
        label_smoothing=fused.label_smoothing,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=scale,
        per_token=fused.tokens is not None,
        max_extra_bytes=fused.max_extra_bytes,
    )
    if fused.tokens is None:
        return result  # type: ignore[no-any-return]
    loss, statistics = result
    means = (mean_logits(x, linear.weight, linear.bias, scale),) if fused.mean_logits else ()
    # A plain tuple: DeepSpeed's hooks cannot make another kind anew.
    return (loss, *statistics, *means)


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits, Granite divides them; the probe checks what is read here."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )


def leaves(model: nn.Module) -> list[nn.Module]:
    """The layers behind the head: itself, or all copies under PEFT's modules_to_save."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def _structure_unsupported(model: nn.Module) -> str | None:
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder models keep their own loss"
    if model.base_model is model:
        return "its base model cannot be told from its head"
    if "forward" in model.__dict__:
        return "its forward is already patched (by accelerate, Liger or another package)"
    for leaf in leaves(model):
        if type(leaf) is not nn.Linear and not head_lora.is_lora_linear(leaf):
            return f"its head is a {type(leaf).__module__}.{type(leaf).__name__}, not a plain nn.Linear"
        if "forward" in leaf.__dict__:
            return "its head's forward is already patched"
        reason = sharding.sharded(leaf.weight) or sharding.missing(leaf.weight)
        if reason is not None:
            return f"its head: {reason}"
    return None


@torch.enable_grad()
def _probe(model: nn.Module, root_forward: Any) -> str | None:
    """Stock root forward against ours on given hidden states: same loss and gradient, or why not.

    The base model is stood in for by one that returns the hidden states, so the probe costs nine rows of
    logits however large the model is, and sees softcaps, scales and custom losses whatever their names.
    """
    leaf = leaves(model)[0]
    weight = leaf.weight
    assert isinstance(weight, torch.Tensor)
    dtype, device = weight.dtype, weight.device
    # The probe is about what the model does with its head's logits. An adapter on the head would add its
    # dropout, and in 16 bits another order of rounding; it is put out for the two calls.
    adapted = head_lora.is_lora_linear(leaf) and not leaf.disable_adapters and not leaf.merged
    if adapted:
        leaf._disable_adapters = True
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.randint(weight.shape[0], (1, 9), generator=generator, device=device)
    labels[0, 3:5] = -100
    inputs = {"input_ids": torch.zeros_like(labels), "labels": labels}
    try:
        hidden = torch.randn(1, 9, weight.shape[1], generator=generator, device=device)
        with torch.no_grad():
            # Logits of about ±30, so that a softcap shows.
            hidden *= 30.0 / F.linear(hidden.to(dtype), weight).float().std().clamp(min=1e-6)
        hidden = hidden.to(dtype).requires_grad_()
        theirs: list[dict[str, Any]] = []
        with given_hidden_states(model, hidden, calls=theirs):
            stock = type(model).forward(model, **inputs, num_items_in_batch=5).loss
            ours = root_forward(model, **inputs, fused_loss=FusedLoss(num_items=5)).loss
        (stock_grad,) = torch.autograd.grad(stock, hidden)
        (our_grad,) = torch.autograd.grad(ours, hidden)
    except Exception as error:  # whatever a foreign forward raises, its loss is not ours
        return f"the probe fails: {type(error).__name__}: {error}"
    finally:
        if adapted:
            leaf._disable_adapters = False
    # Theirs is first. It may number documents' tokens, which hidden states that are given would not show.
    made = sorted(
        name
        for name, value in (theirs[0] if theirs else {}).items()
        if isinstance(value, torch.Tensor) and all(value is not given for given in inputs.values())
    )
    if made:
        return f"its forward gives the base model {', '.join(made)} that it makes itself"
    names = ("the loss", "its gradient")
    return probe.first_difference(names, (ours, our_grad), (stock, stock_grad), dtype)


class _GivenOutput(BaseModelOutputWithPast):
    """A base model's output; what only some have, such as router logits, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def given_hidden_states(
    model: nn.Module,
    hidden: torch.Tensor,
    dtypes: list[torch.dtype] | None = None,
    calls: list[dict[str, Any]] | None = None,
) -> Iterator[None]:
    """The base model returns ``hidden``, and puts the dtype that its head will work in into ``dtypes`` and
    its arguments into ``calls``."""
    base = model.base_model
    previous = base.__dict__.get("forward")
    kind = hidden.device.type

    def stub(*args: Any, **kwargs: Any) -> _GivenOutput:
        if calls is not None:
            calls.append({**{f"argument {n}": value for n, value in enumerate(args)}, **kwargs})
        if dtypes is not None:
            autocast = torch.is_autocast_enabled(kind)
            dtypes.append(torch.get_autocast_dtype(kind) if autocast else hidden.dtype)
        return _GivenOutput(last_hidden_state=hidden)

    base.forward = stub  # type: ignore[union-attr]
    try:
        yield
    finally:
        del base.forward  # type: ignore[union-attr]
        if previous is not None:
            base.forward = previous  # type: ignore[union-attr]
