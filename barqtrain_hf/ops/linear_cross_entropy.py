"""Linear layer and cross-entropy in one op that never holds all logits.

For each row i with a target t that is not ``ignore_index``:

    z    = logit_scale * (hidden @ weight.T + bias),   then z = softcap * tanh(z / softcap)
    lse  = log(sum_v exp(z_v))
    loss = (1 - s) * (lse - z_t) + s * (lse - mean_v(z)) + z_loss * lse^2      s = label_smoothing
    dz_v = softmax(z)_v * (1 + 2 * z_loss * lse) - (1 - s) * [v == t] - s / V

Ignored rows are dropped before the first product. The gradients are taken while the logits of the loss
are there, so the products cost 6·N·H·V FLOPs with a trained head and 4·N·H·V with a frozen one,
against 8 and 6 for a backward pass that computes the logits again. Between the products one kernel reads
a slab of logits once and writes its gradient in place (``cuda/cross_entropy.cu``): 2·N·V elements.
`_chunked_cross_entropy` says where the gradients are taken, `_cross_entropy_plan` how large a slab is and
how weight's gradient comes together without a sum of rounded parts.

The gradient is divided by num_items before it is rounded to a 16-bit type. In fp16, where it must be
rounded before the upstream gradient (a loss scale) is known, only by its mantissa; the power of two is
applied to the result, exactly, so that nothing underflows that would not underflow in stock PyTorch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops._backend import Backend, autocast_dtype, check_dtypes, use_cuda
from barqtrain_hf.ops._chunked_cross_entropy import Options
from barqtrain_hf.ops._cross_entropy_autograd import LinearCrossEntropy, compiled
from barqtrain_hf.ops._cross_entropy_rows import LossTerms
from barqtrain_hf.ops._targets import CountedTarget, capturing

Reduction = Literal["mean", "sum", "none"]


class TokenStatistics(NamedTuple):
    """What is known of each row after its loss, without gradients; all 0 where the row is ignored.

    Attributes:
        log_prob: [...] fp32, of the target.
        entropy: [...] fp32, of the softmax, in nats.
        is_top1: [...] bool, whether the target is the first of the largest logits.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor | CountedTarget,
    *,
    bias: torch.Tensor | None = ...,
    lora: tuple[torch.Tensor, torch.Tensor] | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items: torch.Tensor | float | None = ...,
    row_weight: torch.Tensor | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    per_token: Literal[False] = ...,
    max_extra_bytes: int | None = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...
@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor | CountedTarget,
    *,
    bias: torch.Tensor | None = ...,
    lora: tuple[torch.Tensor, torch.Tensor] | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items: torch.Tensor | float | None = ...,
    row_weight: torch.Tensor | None = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    per_token: Literal[True],
    max_extra_bytes: int | None = ...,
    backend: Backend = ...,
) -> tuple[torch.Tensor, TokenStatistics]: ...
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor | CountedTarget,
    *,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: torch.Tensor | float | None = None,
    row_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    per_token: bool = False,
    max_extra_bytes: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, TokenStatistics]:
    """Cross-entropy of ``hidden @ weight.T`` against ``target`` without holding all logits.

    Args:
        hidden: [..., H], fp32, fp16 or bf16.
        weight: [V, H], the head's weight. Under autocast the products run in the autocast dtype, else
            in hidden's; gradients return in each input's own dtype.
        target: [...], int64 class indices or ``ignore_index``; as a `CountedTarget` the op does not wait
            for hidden.
        bias: [V] or None.
        lora: (u [..., r], b [V, r]): ``u @ b.T`` is added to the product, the adapter of a LoRA layer
            with u = scaling * dropout(hidden) @ a.T.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduction: "mean" (over the rows that are not ignored, or ``num_items``), "sum" or "none". With
            "none" and a trained weight, the backward pass computes the logits again if they do not fit.
        num_items: divisor of "mean": a number or a 0-dim tensor on any device, such as the Trainer's
            ``num_items_in_batch``.
        row_weight: [...], a constant that multiplies each row's loss; it does not change the divisor.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        z_loss: weight of lse^2, which keeps the logits' scale in place (PaLM, arXiv:2204.02311).
        softcap: bound of the logits, as in Gemma 2, or None.
        logit_scale: factor of the logits, as in Cohere and Granite.
        per_token: return `TokenStatistics` too; they come from the same pass.
        max_extra_bytes: memory beside the gradients' own, mostly for logits; more is faster. The default
            is what the logits need, up to 512 MiB with a frozen weight; with a trained one up to 3 GiB
            less the gradients or, for larger batches, a fp32 sum of its gradient and 1024 rows; and
            never more than a quarter of the GPU's free memory (but 512 MiB).
        backend: "cuda" for the kernels, "torch" for PyTorch in chunks, "auto" for kernels where they run.

    Returns:
        An fp32 scalar, or [...] in fp32 for "none"; with ``per_token`` a pair of it and
        `TokenStatistics`. With every row ignored the loss is 0, connected to the graph, with zero
        gradients.

    Raises:
        ArgumentError: shapes that disagree, a target outside [0, V), an option out of its range,
            ``max_extra_bytes`` too small for one row. Under torch.compile and CUDA graph capture no
            target can be looked at: the loss is NaN, and the error is raised by the next call outside
            or by `raise_bad_target`, which BarqTrainer calls when it logs.
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"`` where the kernels cannot run; says why.
    """
    counted = target if isinstance(target, CountedTarget) else None
    target = target.target if isinstance(target, CountedTarget) else target
    if counted is not None and counted.ignore_index != ignore_index:
        raise ArgumentError(
            f"linear_cross_entropy: ignore_index={ignore_index}, but target was counted with "
            f"{counted.ignore_index}; give both the same."
        )
    _check_arguments(hidden, weight, target, bias, lora, row_weight)
    _check_options(reduction, label_smoothing, softcap, logit_scale)
    cuda = use_cuda("linear_cross_entropy", backend, hidden, _unsupported(hidden, weight))
    flat_target = target.reshape(-1).contiguous()
    compiling = torch.compiler.is_compiling()
    # Neither a graph nor a compiled model may wait for the number of rows with a target.
    static = hidden.is_cuda and (compiling or capturing(hidden.device))
    if static:
        counted = None
    elif counted is None and not compiling:
        counted = CountedTarget(target, ignore_index)
    if reduction == "mean" and num_items is None:
        count = (flat_target != ignore_index).sum() if counted is None else counted.on_device[0]
        divisor = count.clamp(min=1).float()
    elif reduction == "mean":
        divisor = torch.as_tensor(num_items, dtype=torch.float32, device=hidden.device)
        if divisor.numel() != 1:
            raise ArgumentError(
                f"linear_cross_entropy: num_items of shape {tuple(divisor.shape)} must be one number."
            )
        divisor = divisor.reshape(())
        # No target in the whole batch: a loss of zero and not of 0 / 0.
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    elif num_items is not None:
        raise ArgumentError(
            f"linear_cross_entropy: num_items divides reduction='mean', not {reduction!r}; drop it."
        )
    else:
        divisor = torch.ones((), dtype=torch.float32, device=hidden.device)
    dtype = autocast_dtype(hidden) or hidden.dtype
    u, b = lora if lora is not None else (None, None)
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if u is None else u.reshape(-1, u.shape[-1]),
        b,
        flat_target,
        None if row_weight is None else row_weight.detach().float().reshape(-1),
        divisor,
    )
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias, u, b)
    ]
    terms = LossTerms(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    options = Options(terms, max_extra_bytes, dtype, cuda, counted, per_token)
    if compiling:
        loss, tokens = compiled(tensors, options, reduction == "none", needs)
    else:
        loss, tokens = LinearCrossEntropy.apply(*tensors, options, reduction == "none", needs)
    if reduction == "none":
        loss = loss.view(target.shape)
    if not per_token:
        return loss  # type: ignore[no-any-return]
    log_prob, entropy, top1 = tokens.view(3, *target.shape)
    return loss, TokenStatistics(log_prob, entropy, top1 > 0)


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: torch.Tensor | float | None = None,
    row_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """The definition in plain PyTorch, with all logits in memory; see :func:`linear_cross_entropy`."""
    logits = F.linear(hidden, weight, bias)
    if lora is not None:
        logits = logits + F.linear(*lora)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    logits, target = logits.flatten(0, -2), target.flatten()
    losses = F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    valid = target != ignore_index
    losses = losses + torch.where(valid, z_loss * logits.logsumexp(-1).square(), 0.0)
    if row_weight is not None:
        losses = losses * row_weight.flatten()
    if reduction == "none":
        return losses.view(hidden.shape[:-1])
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (valid.sum().clamp(min=1) if num_items is None else num_items)


def _unsupported(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    if weight.device != hidden.device:
        return f"weight is on {weight.device} and hidden on {hidden.device}."
    return None


def _check_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
    row_weight: torch.Tensor | None,
) -> None:
    op = "linear_cross_entropy"
    check_dtypes(op, hidden=hidden.dtype, weight=weight.dtype)
    if weight.dim() != 2 or hidden.dim() == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ArgumentError(
            f"{op}: weight of shape {tuple(weight.shape)} does not fit hidden of shape "
            f"{tuple(hidden.shape)}; weight must be [V, H] for hidden [..., H]."
        )
    for name, tensor in (("target", target), ("row_weight", row_weight)):
        if tensor is not None and tensor.shape != hidden.shape[:-1]:
            raise ArgumentError(
                f"{op}: {name} of shape {tuple(tensor.shape)} must have hidden's shape without its "
                f"last dimension, {tuple(hidden.shape[:-1])}."
            )
    if target.dtype is not torch.int64:
        raise ArgumentError(f"{op}: target is {target.dtype}; cast it to int64.")
    if bias is not None:
        check_dtypes(op, bias=bias.dtype)
        if bias.shape != weight.shape[:1]:
            raise ArgumentError(
                f"{op}: bias of shape {tuple(bias.shape)} must be [V] = [{weight.shape[0]}]."
            )
    if lora is not None:
        u, b = lora
        check_dtypes(op, **{"lora[0]": u.dtype, "lora[1]": b.dtype})
        if u.shape[:-1] != hidden.shape[:-1] or b.shape != (weight.shape[0], u.shape[-1]):
            raise ArgumentError(
                f"{op}: lora of shapes {tuple(u.shape)} and {tuple(b.shape)} must be [..., r] like "
                f"hidden {tuple(hidden.shape)}, and [V, r] with V = {weight.shape[0]}."
            )


def _check_options(
    reduction: str, label_smoothing: float, softcap: float | None, logit_scale: float
) -> None:
    op = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f"{op}: reduction={reduction!r} must be 'mean', 'sum' or 'none'.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"{op}: label_smoothing={label_smoothing} must be in [0, 1].")
    if softcap is not None and softcap <= 0.0:
        raise ArgumentError(f"{op}: softcap={softcap} must be positive, or None for no cap.")
    if logit_scale <= 0.0:
        raise ArgumentError(f"{op}: logit_scale={logit_scale} must be positive.")
