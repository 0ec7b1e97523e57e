"""Cross-entropy of rows of logits and its gradient in their place: in CUDA, and the same in PyTorch.

The math is in ``cuda/cross_entropy.cu`` and in `linear_cross_entropy`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.runtime import Kernel, sm_count

# The arrays of ``RowContext.statistics``, in the kernels' order.
LOSS, PEAK, TOTAL, LOG_PROB, ENTROPY, TOP1 = range(6)
_THREADS, _VECTORS = 256, 4  # kThreads and kVectors of the kernels


class LossTerms(NamedTuple):
    """The options of the loss that are the same for all rows; see `linear_cross_entropy`."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float


class RowContext(NamedTuple):
    """What the rows of one call share; row i of a slab is row ``first + i`` of these.

    Args:
        target: [n] int64.
        scale: fp32, of the gradient: [1] for all rows, or [n].
        statistics: [6, n] fp32, written by `rows`.
        terms: options of the loss.
        vocabulary: V.
        per_token: whether entropy and top-1 are wanted; else those rows of statistics mean nothing.
        cuda: whether the kernels run, or PyTorch.
    """

    target: torch.Tensor
    scale: torch.Tensor
    statistics: torch.Tensor
    terms: LossTerms
    vocabulary: int
    per_token: bool
    cuda: bool

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        """Peak memory per logit: itself, and in PyTorch its fp32 copies."""
        copies = 1 + (self.terms.softcap is not None) + self.per_token
        return dtype.itemsize + (0 if self.cuda else 4 * copies)

    def rows(self, slab: torch.Tensor, first: int, count: int, write: bool) -> None:
        """Statistics of ``count`` rows of logits in ``slab`` [at least count, stride >= V].

        With ``write`` the logits are replaced by the gradient of the product.
        """
        if self.cuda:
            self._launch_rows(slab, first, count, write)
            return
        part = slice(first, first + count)
        logits = slab[:count, : self.vocabulary]
        z, slope = self._logits(logits, write)
        target, counts = self._targets(part)
        peak = z.amax(1)
        top1 = (z.argmax(1) == target).float() if self.per_token else peak
        # Differences are taken from the peak, not from lse = peak + log(total): one rounding less.
        difference = z.gather(1, target.unsqueeze(1)).squeeze(1) - peak
        z.sub_(peak.unsqueeze(1))
        mean = z.mean(1) if self.terms.label_smoothing else difference
        weighted = peak
        if self.per_token:
            z.clamp_(min=torch.finfo(torch.float32).min)  # 0 * -inf
            weighted = z.exp().mul_(z).sum(1)
        total = z.exp_().sum(1)
        log_total = total.log()
        smoothing = self.terms.label_smoothing
        losses = log_total - ((1.0 - smoothing) * difference + smoothing * mean)
        losses = losses + self.terms.z_loss * (peak + log_total).square()
        wrong = ~counts & (self.target[part] != self.terms.ignore_index)
        entropy = log_total - weighted / total
        arrays = (losses, peak, total, difference - log_total, entropy, top1)
        for array, values in zip(self.statistics[:, part], arrays, strict=True):
            array.copy_(torch.where(counts, values, 0.0))
        self.statistics[LOSS, part].masked_fill_(wrong, torch.nan)
        if write:
            self._differentiate(logits, z, slope, part, 0, 1.0 / total)

    def strip(self, slab: torch.Tensor, first: int, count: int, columns: slice) -> None:
        """Gradient in place of the logits of some columns, from the statistics of the whole rows."""
        if self.cuda:
            self._launch_strip(slab, first, count, columns)
            return
        part = slice(first, first + count)
        logits = slab[:count, : columns.stop - columns.start]
        z, slope = self._logits(logits, True)
        z.sub_(self.statistics[PEAK, part].unsqueeze(1)).exp_()
        self._differentiate(
            logits, z, slope, part, columns.start, 1.0 / self.statistics[TOTAL, part]
        )

    def _logits(
        self, logits: torch.Tensor, overwritten: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In fp32, in place where they are to be overwritten, and then the softcap's derivative too."""
        z = logits.to(torch.float32, copy=not overwritten)
        if self.terms.logit_scale != 1.0:
            z *= self.terms.logit_scale
        if self.terms.softcap is None:
            return z, None
        z.div_(self.terms.softcap).tanh_()
        slope = None
        if overwritten:
            slope = torch.addcmul(torch.ones((), device=z.device), z, z, value=-1.0)
        z *= self.terms.softcap
        return z, slope

    def _targets(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets that can be indexed with, and which of them count."""
        target = self.target[part]
        counts = (target >= 0) & (target < self.vocabulary)
        return torch.where(counts, target, 0), counts

    def _differentiate(
        self,
        logits: torch.Tensor,  # [count, columns], the output
        power: torch.Tensor,  # exp(z - peak) in fp32
        slope: torch.Tensor | None,
        part: slice,
        first_column: int,
        inverse_total: torch.Tensor,
    ) -> None:
        terms = self.terms
        target, counts = self._targets(part)
        lse = self.statistics[PEAK, part] + self.statistics[TOTAL, part].log()
        d = power.mul_(((1.0 + 2.0 * terms.z_loss * lse) * inverse_total).unsqueeze(1))
        if terms.label_smoothing:
            d -= terms.label_smoothing / self.vocabulary
        column = target - first_column
        here = (column >= 0) & (column < d.shape[1])
        hit = here * (1.0 - terms.label_smoothing)
        d.scatter_add_(1, torch.where(here, column, 0).unsqueeze(1), -hit.to(d.dtype).unsqueeze(1))
        if slope is not None:
            d *= slope
        scale = self.scale[part] if len(self.scale) > 1 else self.scale
        d *= (scale * terms.logit_scale).unsqueeze(1)
        logits.copy_(d.masked_fill_(~counts.unsqueeze(1), 0.0))

    def _launch_rows(self, slab: torch.Tensor, first: int, count: int, write: bool) -> None:
        device = slab.get_device()
        few = 2 * count <= sm_count(device)
        layout = _layout(self.vocabulary * slab.dtype.itemsize // 16, device, write, few)
        softcap = self.terms.softcap is not None
        kernel = _rows_kernel(slab.dtype, layout, softcap, self.per_token)
        vocabulary, stride, *terms = self._terms(slab)
        kernel(
            (min(count, layout.clusters) * layout.cluster, 1, 1),
            (layout.threads, 1, 1),
            *(slab, self.target, self.scale, self.statistics, len(self.target), first, count),
            *(self._scale_stride, int(write), self.terms.ignore_index, vocabulary, stride),
            *(layout.capacity, *terms),
        )

    def _launch_strip(self, slab: torch.Tensor, first: int, count: int, columns: slice) -> None:
        width = columns.stop - columns.start
        vectors = width * slab.dtype.itemsize // 16
        blocks = max(-(-vectors // (_THREADS * _VECTORS)), 1)
        vocabulary, stride, *terms = self._terms(slab)
        _strip_kernel(slab.dtype, self.terms.softcap is not None)(
            (count * blocks, 1, 1),
            (_THREADS, 1, 1),
            *(slab, self.target, self.scale, self.statistics, len(self.target), first),
            *(self._scale_stride, width, stride, columns.start, vocabulary, *terms),
        )

    @property
    def _scale_stride(self) -> int:
        return int(len(self.scale) > 1)

    def _terms(self, slab: torch.Tensor) -> tuple[int, int, float, float, float, float]:
        terms = self.terms
        cap = 1.0 if terms.softcap is None else terms.softcap
        smoothing, z_loss = terms.label_smoothing, terms.z_loss
        return self.vocabulary, slab.shape[1], terms.logit_scale, cap, smoothing, z_loss


class _Layout(NamedTuple):
    """How rows are spread: blocks per row, threads per block, vectors of 16 bytes that a block keeps in
    shared memory, and rows in work at once."""

    cluster: int
    threads: int
    capacity: int
    clusters: int


@functools.cache
def _layout(vectors: int, device: int, write: bool, few: bool) -> _Layout:
    properties = torch.cuda.get_device_properties(device)
    # Of a block; the kernel's own arrays and the driver take some of it.
    largest = (properties.shared_memory_per_block_optin - 4096) // 16
    clusters = properties.major >= 9
    if few and clusters:  # rows spread over more SMs
        return _Layout(8, 512, min(-(-vectors // 8), largest) if write else 0, 2**30 // 8)
    if not write:  # nothing to keep a row for
        return _Layout(1, 256, 0, 2**30)
    if vectors > 1.5 * largest and clusters:
        capacity = min(-(-vectors // 2), largest)
        return _Layout(2, 1024, capacity, properties.multi_processor_count // 2)
    # Two blocks, where their rows fit, so that one reads while the other computes.
    two = 2 * (vectors + 256) <= properties.shared_memory_per_multiprocessor // 16
    blocks = 2 if two else 1
    capacity = min(vectors, largest)
    return _Layout(1, 1024 // blocks, capacity, properties.multi_processor_count * blocks)


_TERMS = {"scale": "float32", "cap": "float32", "smoothing": "float32", "z_loss": "float32"}


def _arrays(dtype: torch.dtype) -> dict[str, torch.dtype | str]:
    """The parameters with which both kernels begin."""
    return {
        "x": dtype,
        "targets": torch.int64,
        "row_scale": torch.float32,
        "statistics": torch.float32,
        "all_rows": "int64",
        "first_row": "int64",
    }


@functools.cache
def _rows_kernel(dtype: torch.dtype, layout: _Layout, softcap: bool, per_token: bool) -> Kernel:
    return Kernel(
        "cross_entropy.cu",
        f"cross_entropy_rows<{CUDA_NAMES[dtype]},{layout.cluster},{int(softcap)},{int(per_token)}>",
        {
            **_arrays(dtype),
            "rows": "int32",
            "scale_stride": "int32",
            "write": "int32",
            "ignore_index": "int64",
            "vocabulary": "int32",
            "stride": "int32",
            "capacity": "int32",
            **_TERMS,
        },
        shared_bytes=layout.capacity * 16,
    )


@functools.cache
def _strip_kernel(dtype: torch.dtype, softcap: bool) -> Kernel:
    return Kernel(
        "cross_entropy.cu",
        f"cross_entropy_gradient<{CUDA_NAMES[dtype]},{int(softcap)}>",
        {
            **_arrays(dtype),
            "scale_stride": "int32",
            "columns": "int32",
            "stride": "int32",
            "first_column": "int32",
            "vocabulary": "int32",
            **_TERMS,
        },
    )
