"""`linear_cross_entropy` in chunks of rows, in PyTorch; see there for the math.

The products are cuBLAS's (or the CPU's), everything between them is in place on one slab of logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from barqtrain_hf.errors import ArgumentError


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    divisor: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    max_extra_bytes: int,
    dtype: torch.dtype,
    per_row: bool,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and, for a loss of 1, the gradients up to the power of two of ``1 / divisor``.

    With ``per_row`` the loss is [N] and only the gradient of hidden is taken here: row i of it scales
    with the i-th upstream gradient, while those of weight and bias mix rows (see `recompute`).
    Gradients not asked for are empty.
    """
    if per_row:
        factor = torch.ones_like(divisor)
        hidden_grad = hidden_grad and not (weight_grad or bias_grad)
        weight_grad = bias_grad = False
    else:
        factor = torch.frexp(1.0 / divisor).mantissa
    grads = _Gradients(hidden, weight, dtype, hidden_grad, weight_grad, bias_grad)
    options = (label_smoothing, z_loss, softcap, logit_scale)
    inputs = (hidden, weight, bias, target)
    losses = _run(*inputs, factor, grads, ignore_index, options, max_extra_bytes, dtype)
    loss = losses if per_row else losses.sum() / divisor
    return (loss, *grads.results())


def recompute(
    upstream: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    max_extra_bytes: int,
    dtype: torch.dtype,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a per-row loss for upstream gradients [N], from logits computed again."""
    grads = _Gradients(hidden, weight, dtype, hidden_grad, weight_grad, bias_grad)
    options = (label_smoothing, z_loss, softcap, logit_scale)
    inputs = (hidden, weight, bias, target)
    _run(*inputs, upstream.unsqueeze(1), grads, ignore_index, options, max_extra_bytes, dtype)
    return grads.results()


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    factor: torch.Tensor,  # of the gradients: one for all rows, or one per row [N, 1]
    grads: _Gradients,
    ignore_index: int,
    options: tuple[float, float, float | None, float],
    max_extra_bytes: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Takes all rows through `_chunk`; returns their losses [N] and adds to ``grads``."""
    valid = _valid_rows(target, ignore_index, weight.shape[0])
    losses = hidden.new_zeros(target.shape, dtype=torch.float32)
    row_bytes = _row_bytes(weight, dtype, softcap=options[2])
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        cast_weight = weight.to(dtype)
        for rows in _chunks(valid, row_bytes, max_extra_bytes):
            h, t = hidden[rows].to(dtype), target[rows]
            losses[rows], dz = _chunk(h, cast_weight, bias, t, *options, want_grad=grads.any_wanted)
            if dz is not None:
                dz *= factor[rows] if factor.dim() == 2 else factor
                grads.add(rows, h, cast_weight, dz)
            del dz  # or it would live beside the next chunk's logits
    return losses


def _chunk(
    hidden: torch.Tensor,  # [n, H] in the compute dtype
    weight: torch.Tensor,  # [V, H] in the compute dtype
    bias: torch.Tensor | None,
    target: torch.Tensor,  # [n], all valid
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    want_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses [n] and the gradient of the product [n, V], in fp32; everything else in place."""
    z = F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype)).float()
    if logit_scale != 1.0:
        z *= logit_scale
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        if want_grad:
            slope = torch.addcmul(torch.ones((), device=z.device), z, z, value=-1.0)
        z *= softcap
    # Differences are taken from the peak, not from lse = peak + log(total): one rounding less.
    peak = z.amax(1)
    z.sub_(peak.unsqueeze(1))
    at_target = z.gather(1, target.unsqueeze(1)).squeeze(1)
    mean = z.mean(1) if label_smoothing else at_target
    total = z.exp_().sum(1)
    log_total = total.log()
    lse = peak + log_total
    losses = log_total - ((1.0 - label_smoothing) * at_target + label_smoothing * mean)
    losses += z_loss * lse.square()
    if not want_grad:
        return losses, None
    dz = z.mul_(((1.0 + 2.0 * z_loss * lse) / total).unsqueeze(1))
    if label_smoothing:
        dz -= label_smoothing / weight.shape[0]
    dz[torch.arange(len(target), device=dz.device), target] -= 1.0 - label_smoothing
    if slope is not None:
        dz *= slope
    if logit_scale != 1.0:
        dz *= logit_scale
    return losses, dz


class _Gradients:
    """Gradients of hidden, weight and bias in fp32, built up chunk by chunk.

    They stay in fp32 until the upstream gradient is known, so that they are rounded once.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        hidden_grad: bool,
        weight_grad: bool,
        bias_grad: bool,
    ) -> None:
        self._compute_dtype = dtype
        self._wanted = (hidden_grad, weight_grad, bias_grad)
        self.any_wanted = any(self._wanted)
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        self.hidden, self.weight, self.bias = (
            hidden.new_zeros(shape if want else 0, dtype=torch.float32)
            for shape, want in zip(shapes, self._wanted, strict=True)
        )

    def add(
        self,
        rows: torch.Tensor | slice,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        dz: torch.Tensor,
    ) -> None:
        """Adds one chunk of rows with their hidden states [n, H] and the product's gradient [n, V]."""
        hidden_grad, weight_grad, bias_grad = self._wanted
        if bias_grad:
            self.bias += dz.sum(0)
        if dz.is_cuda:
            dz = dz.to(self._compute_dtype)
        if hidden_grad:
            self.hidden[rows] = _product(dz, weight)
        if weight_grad:
            _add_product(self.weight, dz.t(), hidden)

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three gradients, empty where not wanted."""
        return self.hidden, self.weight, self.bias


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` in fp32; 16-bit operands keep the fp32 accumulator where the device can."""
    if left.dtype is torch.float32:
        return torch.mm(left, right.float())
    if torch.cuda.get_device_capability(left.device)[0] >= 8:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``, in place where no 16-bit product is in between."""
    if left.dtype is torch.float32:
        total.addmm_(left, right.float())
    else:
        total += _product(left, right)


def _valid_rows(target: torch.Tensor, ignore_index: int, vocabulary: int) -> torch.Tensor | slice:
    """Indices of the rows that count, or all as a slice; one device sync, which also checks them."""
    valid = target != ignore_index
    wrong = valid & ((target < 0) | (target >= vocabulary))
    count, bad = torch.stack((valid.sum(), wrong.sum())).tolist()
    if bad:
        row = int(wrong.nonzero()[0])
        raise ArgumentError(
            f"linear_cross_entropy: target[{row}] = {int(target[row])} is outside the vocabulary of "
            f"{vocabulary}; a row without a loss must have ignore_index ({ignore_index})."
        )
    if count == len(target):
        return slice(0, count)
    return torch.nonzero_static(valid, size=count).squeeze(1)


def _row_bytes(weight: torch.Tensor, dtype: torch.dtype, softcap: float | None) -> int:
    """Peak extra bytes per row: fp32 logits, their 16-bit twin, and the softcap's slope."""
    per_logit = 4 + (dtype.itemsize if dtype is not torch.float32 else 0) + (4 if softcap else 0)
    return int(weight.shape[0]) * per_logit


def _chunks(
    valid: torch.Tensor | slice, row_bytes: int, max_extra_bytes: int
) -> Iterator[torch.Tensor | slice]:
    rows = max_extra_bytes // row_bytes
    if rows == 0:
        raise ArgumentError(
            f"linear_cross_entropy: max_extra_bytes={max_extra_bytes} does not hold one row of "
            f"logits; give at least {row_bytes}."
        )
    count = valid.stop if isinstance(valid, slice) else len(valid)
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        yield slice(start, stop) if isinstance(valid, slice) else valid[start:stop]
