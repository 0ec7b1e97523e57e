"""How the rows of `linear_cross_entropy` go through memory.

With a frozen weight, chunks of rows: logits, their gradient in place, its product with the weight. The
trained weight's gradient mixes all rows, and has three plans, by the memory there is:

1. All rows at once: three products, 6·N·H·V FLOPs.
2. Chunks of rows, their gradients of the weight summed in fp32: the sum is read and written once per
   chunk, so chunks must be large, and beside a 16-bit result it takes V·H·4 bytes of its own.
3. Strips of columns: the weight's gradient is finished strip by strip, each one product over all rows,
   so that there is nothing to sum. It needs all rows' logits, of which most are still somewhere: the
   memory of the weight's gradient itself holds H rows of them (strip k of it the columns of strip k, so
   that a strip is read before it is overwritten), the slab holds more, and only the rest is computed
   again, for at worst 8·N·H·V FLOPs in little more memory than the gradients take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops._cross_entropy_rows import RowContext
from barqtrain_hf.ops._targets import capturing

# Summing V·H in fp32 per chunk of fewer rows costs more than computing a third of the logits again.
_MIN_SUMMED_ROWS = 1024
# Chunks of fewer rows are bound by reading the weight.
_MIN_CHUNK_ROWS = 512
# Products of fewer columns are slower, and more of them leave room for fewer rows.
_STRIP_COLUMNS = 4096
# Beyond these a chunk gets no faster: a frozen weight's from about 1500 rows of a 128k vocabulary on, a
# trained one's when all rows of a usual batch are in.
_FROZEN_BYTES = 512 * 2**20
_TRAINED_BYTES = 3 * 2**30  # with the gradients
# Of the free memory of a GPU; the rest is left to others.
_FREE_SHARE = 0.25


class Head(NamedTuple):
    """``logits = sum of inputs[k] @ weights[k].T + bias``, all in the compute dtype.

    The first pair is the layer; a second one of small rank is a LoRA adapter on it.
    """

    inputs: list[torch.Tensor]  # [n, H_k]
    weights: list[torch.Tensor]  # [V, H_k]
    bias: torch.Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    @property
    def rows(self) -> int:
        return len(self.inputs[0])

    @property
    def vocabulary(self) -> int:
        return len(self.weights[0])

    @property
    def stride(self) -> int:
        """Columns of a slab: the vocabulary, up to a multiple of 16 bytes."""
        vector = 16 // self.dtype.itemsize
        return -(-self.vocabulary // vector) * vector

    def logits(self, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """The product of some rows and columns into ``out``."""
        left, right = self.inputs[0][rows], self.weights[0][columns].t()
        if self.bias is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(self.bias[columns], left, right, out=out)
        for more, weight in zip(self.inputs[1:], self.weights[1:], strict=True):
            torch.addmm(out, more[rows], weight[columns].t(), out=out)


class Gradients(NamedTuple):
    """Buffers for the gradients of a `Head`, None where not wanted."""

    inputs: Sequence[torch.Tensor | None]
    weights: Sequence[torch.Tensor | None]
    bias: torch.Tensor | None

    @property
    def any(self) -> bool:
        return any(g is not None for g in (*self.inputs, *self.weights, self.bias))

    def take_inputs(self, head: Head, dz: torch.Tensor, rows: slice) -> None:
        """Gradients of some rows of the inputs from the gradient of their logits [n, V]."""
        for out, weight in zip(self.inputs, head.weights, strict=True):
            if out is not None:
                _product(dz, weight, out[rows])

    def take_weights(
        self, head: Head, dz: torch.Tensor, rows: slice, columns: slice, add: bool
    ) -> None:
        """Gradients of some columns' weights; the first chunk of rows writes, the others add."""
        for out, x in zip(self.weights, head.inputs, strict=True):
            if out is not None:
                (_add_product if add else _product)(dz.t(), x[rows], out[columns])
        if self.bias is not None:
            total = dz.sum(0, dtype=torch.float32)
            if add:
                self.bias[columns] += total
            else:
                self.bias[columns] = total


def default_extra_bytes(
    rows: int, hidden: torch.Tensor, weight: torch.Tensor, trained: bool, dtype: torch.dtype
) -> int:
    """``max_extra_bytes`` where the user gave none: by shape, bounded, and within the free memory.

    Called before the number of rows with a target is known, so that nothing stands between that and the
    first product.
    """
    row_bytes = len(weight) * dtype.itemsize
    bound = _FROZEN_BYTES
    if trained:
        gradients = weight.numel() * weight.itemsize + hidden.numel() * hidden.itemsize
        # A large batch is summed in fp32 rather than computed again.
        summed = weight.numel() * 4 + 2 * _MIN_SUMMED_ROWS * row_bytes
        bound = max(_TRAINED_BYTES - gradients, summed)
    # PyTorch needs copies of the logits; a vocabulary is rounded up to a multiple of 16 bytes.
    wanted = min(bound, 8 * max(rows, 1) * (row_bytes + 16))
    device = weight.device
    if device.type != "cuda" or wanted <= _FROZEN_BYTES or capturing(device):
        return wanted
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(min(wanted, int(free * _FREE_SHARE)), _FROZEN_BYTES)


def run(head: Head, context: RowContext, grads: Gradients, max_extra_bytes: int) -> Gradients:
    """Fills the context's statistics and the gradients.

    Returns:
        The gradients, with a fp32 sum in place of weight's if it was summed.

    Raises:
        ArgumentError: ``max_extra_bytes`` is too small for one row.
    """
    if head.rows == 0:
        return grads
    row_bytes = head.stride * context.bytes_per_logit(head.dtype)
    fit = max_extra_bytes // row_bytes
    if fit == 0:
        raise ArgumentError(
            f"linear_cross_entropy: max_extra_bytes={max_extra_bytes} does not hold one row of "
            f"logits; give at least {row_bytes}."
        )
    main = grads.weights[0]
    if (
        main is None
        or fit >= head.rows
        or (
            main.dtype is torch.float32
            and (
                # fp32 products are so slow that summing them is nothing.
                head.dtype is torch.float32 or fit >= _MIN_SUMMED_ROWS
            )
        )
    ):
        _by_rows(head, context, grads, fit)
    elif (
        main.dtype is not torch.float32
        and main.numel() * 4 <= max_extra_bytes
        and (spare := max_extra_bytes - main.numel() * 2) >= _MIN_SUMMED_ROWS * row_bytes
    ):
        total = torch.empty_like(main, dtype=torch.float32)
        grads = grads._replace(weights=[total, *grads.weights[1:]])
        _by_rows(head, context, grads, spare // row_bytes)
    else:
        _by_strips(head, context, grads, max_extra_bytes)
    return grads


def _by_rows(head: Head, context: RowContext, grads: Gradients, fit: int) -> None:
    """Chunks of at most ``fit`` rows; the gradients of weights are summed in their buffers."""
    chunks = -(-head.rows // fit)
    size = -(-head.rows // chunks)
    slab = torch.empty(size, head.stride, dtype=head.dtype, device=head.weights[0].device)
    for start in range(0, head.rows, size):
        rows = slice(start, min(start + size, head.rows))
        dz = _chunk(head, context, grads, slab, rows)
        if grads.any:
            grads.take_weights(head, dz, rows, slice(None), add=start > 0)


def _chunk(
    head: Head, context: RowContext, grads: Gradients, slab: torch.Tensor, rows: slice
) -> torch.Tensor:
    """Statistics of some rows and the gradients of their inputs; returns that of their logits."""
    count = rows.stop - rows.start
    dz = slab[:count, : head.vocabulary]
    head.logits(rows, slice(None), dz)
    context.rows(slab, rows.start, count, write=grads.any)
    if grads.any:
        grads.take_inputs(head, dz, rows)
    return dz


def _by_strips(head: Head, context: RowContext, grads: Gradients, max_extra_bytes: int) -> None:
    """Plan 3. Rows are, in order: computed twice, stashed in the weight's gradient, kept in the slab."""
    main = grads.weights[0]
    assert main is not None
    per_logit = context.bytes_per_logit(head.dtype)
    column_bytes = head.rows * per_logit
    vector = 16 // head.dtype.itemsize
    columns = min(max_extra_bytes // 4 // column_bytes, _STRIP_COLUMNS) // vector * vector
    kept = (max_extra_bytes - columns * column_bytes) // (head.stride * per_logit)
    if kept < _MIN_CHUNK_ROWS or columns == 0:
        kept, columns = 0, max(max_extra_bytes // column_bytes // vector, 1) * vector
    columns = min(columns, head.stride)
    strips = [
        slice(start, min(start + columns, head.vocabulary))
        for start in range(0, head.vocabulary, columns)
    ]
    # Until its strips are written, the weight's gradient is memory for logits.
    memory = main.view(-1).view(head.dtype)
    slots = memory.numel() // head.vocabulary
    stashed = min(slots, head.rows - kept) if kept else 0
    again = head.rows - kept - stashed
    blocks = [memory[s.start * slots : s.stop * slots].view(slots, -1) for s in strips]

    def new(rows: int, width: int) -> torch.Tensor:
        return torch.empty(rows, width, dtype=head.dtype, device=main.device)

    size = min(again, max(memory.numel() // head.stride, 1))
    if not context.cuda:  # PyTorch makes fp32 copies of what it works on
        size = min(size, max(max_extra_bytes // (head.stride * per_logit), 1))
    if again:
        spare = memory if memory.numel() >= head.stride else new(1, head.stride).view(-1)
        slab = spare[: size * head.stride].view(size, head.stride)
        for start in range(0, again, size):
            _chunk(head, context, grads, slab, slice(start, min(start + size, again)))
    slab = new(kept, head.stride)
    for start in range(again, again + stashed, max(kept, 1)):
        rows = slice(start, min(start + kept, again + stashed))
        dz = _chunk(head, context, grads, slab, rows)
        for block, strip in zip(blocks, strips, strict=True):
            _copy(block[rows.start - again : rows.stop - again], dz[:, strip])
    if kept:
        _chunk(head, context, grads, slab, slice(again + stashed, head.rows))

    buffer = new(head.rows, columns)
    for block, strip in zip(blocks, strips, strict=True):
        dz = buffer[:, : strip.stop - strip.start]
        if again:
            head.logits(slice(0, again), strip, dz[:again])
            context.strip(buffer, 0, again, strip)
        _copy(dz[again : again + stashed], block[:stashed])
        _copy(dz[again + stashed :], slab[:kept, strip])
        grads.take_weights(head, dz, slice(None), strip, add=False)


def _copy(out: torch.Tensor, rows: torch.Tensor) -> None:
    """``out.copy_(rows)`` of views of strips, in 16-byte elements: torch copies strided ones one by one."""
    if rows.shape[1] * rows.itemsize % 16 == 0:
        out, rows = out.view(torch.complex128), rows.view(torch.complex128)
    out.copy_(rows)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """``out = left @ right``; a fp32 ``out`` of 16-bit operands keeps the fp32 accumulator."""
    if out.dtype is left.dtype:
        torch.mm(left, right, out=out)
    elif not left.is_cuda:
        torch.mm(left.float(), right.float(), out=out)
    elif torch.cuda.get_device_capability(left.device)[0] >= 8:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(left, right))


def _add_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """``out += left @ right`` for a fp32 ``out``."""
    if out.dtype is left.dtype:
        out.addmm_(left, right)
    elif not left.is_cuda:
        out.addmm_(left.float(), right.float())
    elif torch.cuda.get_device_capability(left.device)[0] >= 8:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out += torch.mm(left, right)
