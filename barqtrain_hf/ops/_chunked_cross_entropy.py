"""The forward and backward passes of `linear_cross_entropy`.

Gradients are taken in one of three places:

- in the backward pass from logits that were kept, if weight is trained and all logits fit (in PyTorch, if
  its gradient is also in 16 bits): the upstream gradient is then folded in before anything is rounded;
- else in the forward pass, for a loss of 1, while a chunk's logits are there (`_cross_entropy_plan`);
- in the backward pass from logits computed again, if a gradient that mixes rows needs their upstream
  gradients (``per_row``), or for a second backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from barqtrain_hf.ops._cross_entropy_plan import Gradients, Head, default_extra_bytes, run
from barqtrain_hf.ops._cross_entropy_rows import (
    ENTROPY,
    LOG_PROB,
    LOSS,
    TOP1,
    LossTerms,
    RowContext,
)
from barqtrain_hf.ops._targets import CountedTarget, valid_rows

# hidden, weight, bias, lora's input [N, r], lora's weight [V, r]: what can have a gradient.
Inputs = Sequence[torch.Tensor | None]
FiveTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_HAS_ROWS = (0, 3)  # those of them whose first dimension is the rows


class Options(NamedTuple):
    """How a call is computed.

    Attributes:
        terms: of the loss.
        max_extra_bytes: see `linear_cross_entropy`.
        dtype: of the products.
        cuda: run our kernels.
        counted: for dropping ignored rows; None where the host cannot learn their number.
        per_token: entropy and top-1 are wanted.
    """

    terms: LossTerms
    max_extra_bytes: int | None
    dtype: torch.dtype
    cuda: bool
    counted: CountedTarget | None
    per_token: bool


class Batch(NamedTuple):
    """The rows of one call that take part in it."""

    head: Head
    context: RowContext
    valid: torch.Tensor | None  # their indices, None if all do
    rows: int  # with those that do not

    @classmethod
    def of(
        cls, inputs: Inputs, target: torch.Tensor, scale: torch.Tensor, options: Options
    ) -> Batch:
        """``scale``: of the gradients, [1] or [N]."""
        hidden, weight, bias, lora_input, lora_weight = inputs
        assert hidden is not None and weight is not None
        vocabulary, dtype = len(weight), options.dtype
        valid = valid_rows(target, options.counted, options.terms.ignore_index, vocabulary)

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if valid is None else tensor.index_select(0, valid)

        head = Head(
            [pick(x).to(dtype) for x in (hidden, lora_input) if x is not None],
            [w.to(dtype) for w in (weight, lora_weight) if w is not None],
            None if bias is None else bias.to(dtype),
        )
        picked, terms = pick(target), options.terms
        if terms.ignore_index >= 0:  # rows are told apart by whether their target is a class
            picked = torch.where(picked == terms.ignore_index, -1, picked)
            terms = terms._replace(ignore_index=-1)
        context = RowContext(
            picked,
            scale if len(scale) == 1 else pick(scale),
            scale.new_empty(6, len(picked)),
            terms,
            vocabulary,
            options.per_token,
            options.cuda,
        )
        return cls(head, context, valid, len(target))

    def buffers(
        self, inputs: Inputs, needs: Sequence[bool], dtypes: Sequence[torch.dtype]
    ) -> Gradients:
        """Memory for the gradients of the inputs that need one."""
        # Without rows there are no products to fill it.
        make = torch.zeros if self.head.rows == 0 else torch.empty
        buffers = [
            make(
                (self.head.rows, *x.shape[1:]) if i in _HAS_ROWS else x.shape,
                dtype=dtype,
                device=x.device,
            )
            if x is not None and need
            else None
            for i, (x, need, dtype) in enumerate(zip(inputs, needs, dtypes, strict=True))
        ]
        pairs = 1 if inputs[3] is None else 2
        return Gradients(buffers[0::3][:pairs], buffers[1::3][:pairs], buffers[2])

    def spread(self, picked: torch.Tensor, dim: int) -> torch.Tensor:
        """Rows back to where they were, with zeros between them."""
        if self.valid is None:
            return picked
        shape = list(picked.shape)
        shape[dim] = self.rows
        return picked.new_zeros(shape).index_copy_(dim, self.valid, picked)

    def results(self, grads: Gradients) -> list[torch.Tensor | None]:
        """Gradients in the order of `Inputs`, None where there is none."""
        inputs, weights = (
            [*pair, None] if len(pair) == 1 else pair for pair in (grads.inputs, grads.weights)
        )
        ordered = (inputs[0], weights[0], grads.bias, inputs[1], weights[1])
        return [
            self.spread(g, 0) if g is not None and i in _HAS_ROWS else g
            for i, g in enumerate(ordered)
        ]


class Kept(NamedTuple):
    """A batch whose logits wait for the backward pass."""

    batch: Batch
    slab: torch.Tensor

    def gradients(
        self, inputs: Inputs, scale: torch.Tensor, needs: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """For upstream gradients ``scale``, [1] or [N]. Uses the slab up."""
        batch, valid = self.batch, self.batch.valid
        if len(scale) > 1 and valid is not None:
            scale = scale.index_select(0, valid)
        head, context = batch.head, batch.context._replace(scale=scale)
        everything = slice(0, head.vocabulary)
        with _products(scale.device.type):
            context.strip(self.slab, 0, head.rows, everything)
            dz = self.slab[:, : head.vocabulary]
            grads = batch.buffers(inputs, needs, final_dtypes(inputs, head.dtype))
            grads.take_inputs(head, dz, slice(None))
            grads.take_weights(head, dz, slice(None), everything, add=False)
            return batch.results(grads)


class Result(NamedTuple):
    """Of a forward pass; the gradients are there, or kept logits, or neither."""

    loss: torch.Tensor
    tokens: torch.Tensor
    grads: list[torch.Tensor | None] | None
    kept: Kept | None


def mixes_rows(needs: Sequence[bool]) -> bool:
    """Whether a gradient is wanted that sums over rows."""
    return needs[1] or needs[2] or needs[4]


@contextmanager
def _products(device_type: str) -> Iterator[None]:
    """Without autograd and autocast, and with partial sums of products kept in fp32.

    cuBLAS may split a long sum and round its parts to 16 bits before it adds them, as torch allows it by
    default; that is another rounding of gradients, whose sums run over all rows or the vocabulary.
    """
    matmul = torch.backends.cuda.matmul
    names = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    # Later releases of torch keep a pair, whose second half they show under a name of its own.
    splits = [f"{name}_split_k" for name in names]
    before = [
        (getattr(matmul, name), getattr(matmul, split))
        if hasattr(matmul, split)
        else getattr(matmul, name)
        for name, split in zip(names, splits, strict=True)
    ]
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        try:
            for name in names:
                setattr(matmul, name, False)
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(matmul, name, value)


def take(
    inputs: Inputs,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    divisor: torch.Tensor,
    options: Options,
    per_row: bool,
    needs: Sequence[bool],
    keep: bool,
) -> Result:
    """The forward pass.

    Args:
        per_row: the loss is [N], not their sum over ``divisor``.
        needs: which inputs want a gradient.
        keep: logits may be kept for the backward pass.
    """
    with _products(target.device.type):
        scale = torch.ones_like(divisor) if per_row else gradient_scale(divisor, options.dtype)
        scale = (scale if row_weight is None else scale * row_weight).reshape(-1)
        extra = _extra_bytes(inputs, options, needs)
        batch = Batch.of(inputs, target, scale, options)
        head, context = batch.head, batch.context
        fits = head.rows * head.stride * context.bytes_per_logit(head.dtype) <= extra
        grads = kept = None
        # Kept logits are looked at twice, which costs PyTorch more than the kernels; gradients that wait in
        # fp32 are as exact.
        worth = (
            options.cuda or per_row or early_dtypes(inputs, options.dtype)[1] is not torch.float32
        )
        if keep and worth and mixes_rows(needs) and fits and head.rows:
            slab = torch.empty(head.rows, head.stride, dtype=head.dtype, device=target.device)
            head.logits(slice(None), slice(None), slab[:, : head.vocabulary])
            context.rows(slab, 0, head.rows, write=False)
            kept = Kept(batch, slab)
        else:
            # Rows that scale one by one can be scaled later, a sum of them cannot.
            needs = [need and not (per_row and mixes_rows(needs)) for need in needs]
            dtypes = early_dtypes(inputs, options.dtype)
            # Where memory is scarce, hidden's gradient too is rounded before its last factor is known.
            hidden_bytes = head.inputs[0].numel() * 2
            if needs[0] and options.dtype is torch.bfloat16:
                row_bytes = head.stride * context.bytes_per_logit(head.dtype)
                if hidden_bytes > min(extra // 10, extra - row_bytes):
                    dtypes[0] = final_dtypes(inputs, options.dtype)[0]
                else:
                    extra -= hidden_bytes
            buffers = batch.buffers(inputs, needs, dtypes)
            filled = run(head, context, buffers, extra)
            grads = batch.results(filled) if any(needs) else None
        statistics = batch.spread(context.statistics, 1)
        losses = statistics[LOSS]
        if row_weight is not None:  # an ignored row has loss 0 whatever its weight
            losses = torch.where(losses == 0.0, 0.0, losses * row_weight)
        loss = losses.clone() if per_row else losses.sum() / divisor
        wanted = [LOG_PROB, ENTROPY, TOP1] if options.per_token else []
        return Result(loss, statistics[wanted], grads, kept)


def take_again(
    inputs: Inputs,
    target: torch.Tensor,
    scale: torch.Tensor,
    options: Options,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients for upstream gradients ``scale``, [1] or [N], from logits computed again."""
    with _products(target.device.type):
        extra = _extra_bytes(inputs, options, needs)
        batch = Batch.of(inputs, target, scale, options._replace(per_token=False))
        dtypes = final_dtypes(inputs, options.dtype)
        grads = run(batch.head, batch.context, batch.buffers(inputs, needs, dtypes), extra)
        return batch.results(grads)


def _extra_bytes(inputs: Inputs, options: Options, needs: Sequence[bool]) -> int:
    if options.max_extra_bytes is not None:
        return options.max_extra_bytes
    hidden, weight = inputs[:2]
    assert hidden is not None and weight is not None
    return default_extra_bytes(len(hidden), hidden, weight, needs[1], options.dtype)


def gradient_scale(divisor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What early gradients are multiplied with before they are rounded to ``dtype``.

    1 / divisor; in fp16 only its mantissa, or small gradients would underflow. The backward pass then
    applies the power of two, which is exact.
    """
    inverse = 1.0 / divisor
    return torch.frexp(inverse).mantissa if dtype is torch.float16 else inverse


def final_dtypes(inputs: Inputs, dtype: torch.dtype) -> list[torch.dtype]:
    """Of gradients that get no further factor: the input's own, where a product can be rounded to it.

    fp32 for bias and LoRA's pair: they are small, and summed over chunks.
    """
    return [
        dtype if i < 2 and x is not None and x.dtype is dtype else torch.float32
        for i, x in enumerate(inputs)
    ]


def early_dtypes(inputs: Inputs, dtype: torch.dtype) -> list[torch.dtype]:
    """Of gradients that wait for the upstream gradient: fp32, to be rounded once.

    But bf16 for a bf16 weight, whose gradient in fp32 would be the largest tensor of all. It is scaled
    exactly by a power of two, which an upstream gradient mostly is. fp16 would lack the range.
    """
    early = [torch.float32] * len(inputs)
    if dtype is torch.bfloat16:
        early[1] = final_dtypes(inputs, dtype)[1]
    return early
