"""Dropout of whose mask nothing is kept: it is made again from a seed, by the launch of dropout.cu.

The random numbers are those of Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2,
3"), a function of a key and a counter: any element's is known without those before it. PyTorch's definition,
which runs where there is no CUDA, gives the same bits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from barqtrain_hf.ops._backend import CUDA_NAMES
from barqtrain_hf.runtime import Kernel

_THREADS = 256  # as in the kernel
_ALIGNMENT = 16  # bytes, of which a thread of the kernel has as many
_ROUNDS, _WORD = 10, 2**32 - 1
_FACTORS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


class Masks(NamedTuple):
    """Of layers with one input, for each its own.

    Attributes:
        probabilities: of each layer, in [0, 1), with which an element is dropped; at 0 all is as it was.
        seed: int64 [1], on the device of what is dropped.
    """

    probabilities: tuple[float, ...]
    seed: torch.Tensor

    @classmethod
    def draw(cls, probabilities: tuple[float, ...], device: torch.device) -> Masks:
        """Masks by PyTorch's generator of the device, which the host does not wait for."""
        return cls(probabilities, torch.empty(1, dtype=torch.int64, device=device).random_())

    def drop(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """``mask * x``, x itself if the layer drops nothing."""
        p = self.probabilities[layer]
        return dropout(x, self.seed, layer, p) if p else x

    def drop_(self, x: torch.Tensor, layer: int) -> None:
        """``x = mask * x``, contiguous."""
        p = self.probabilities[layer]
        if p:
            dropout(x, self.seed, layer, p, out=x)

    def add(self, out: torch.Tensor, x: torch.Tensor, layer: int) -> None:
        """``out += mask * x`` of a layer that drops something, both contiguous."""
        dropout(x, self.seed, layer, self.probabilities[layer], out=out, add=True)

    def differentiable(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """`drop` with a graph, any number of times."""
        p = self.probabilities[layer]
        return _Dropout.apply(x, self.seed, layer, p) if p else x  # type: ignore[no-any-return]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seed: torch.Tensor, stream: int, p: float) -> Any:
        ctx.save_for_backward(seed)
        ctx.stream, ctx.p = stream, p
        return dropout(x, seed, stream, p)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return _Dropout.apply(dy, seed, ctx.stream, ctx.p), None, None, None


def dropout(
    x: torch.Tensor,
    seed: torch.Tensor,
    stream: int,
    p: float,
    *,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """``out = mask * x``, or ``out += mask * x``; the mask is 0, or 1 / (1 - p) where an element is kept.

    What is dropped is 0 whatever it was, infinite or not a number too.

    Args:
        x: fp32, fp16 or bf16; contiguous, if ``out`` is given.
        seed: int64 [1], on x's device.
        stream: of those that a seed has, from 0 to 2^31 - 1.
        p: with which an element is dropped, in [0, 1).
        out: of x's shape and dtype, contiguous; may be x.
    """
    if out is None:
        x = x.contiguous()
        out = torch.empty_like(x)
    device, count = x.get_device(), x.numel()
    if device < 0:
        return dropout_reference(x, seed, stream, p, out=out, add=add)
    if not count:
        return out
    pointers = (x.data_ptr(), out.data_ptr())
    aligned = not any(pointer % _ALIGNMENT for pointer in pointers)
    _kernel(x.dtype, add).launch(
        device,
        (-(-count * x.itemsize // (_ALIGNMENT * _THREADS)), 1, 1),
        (_THREADS, 1, 1),
        *(*pointers, seed.data_ptr(), count, _least(p), stream, 1.0 / (1.0 - p), aligned),
    )
    return out


def dropout_reference(
    x: torch.Tensor,
    seed: torch.Tensor,
    stream: int,
    p: float,
    *,
    out: torch.Tensor,
    add: bool = False,
) -> torch.Tensor:
    """The definition in plain PyTorch, the same bits; arguments as of :func:`dropout`."""
    kept = random_words(0, x.numel(), seed, stream).view(x.shape) >= _least(p)
    product = torch.where(kept, x.float() * (1.0 / (1.0 - p)), 0.0)
    return out.copy_(out.float() + product if add else product)


def random_words(first: int, count: int, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """Those of the elements from ``first`` on: int64 [count], 32 random bits each."""
    counter = torch.arange(first // 4, -(-(first + count) // 4), device=seed.device)
    high = torch.full_like(counter, stream)
    words = philox(
        (counter & _WORD, counter >> 32, high, torch.zeros_like(counter)),
        (seed & _WORD, seed >> 32 & _WORD),
    )
    return torch.stack(words, dim=1).flatten()[first % 4 :][:count]


def philox(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of a counter of four words and a key of two, words of 32 bits in int64."""
    x, y, z, w = counter
    k, m = key
    for _ in range(_ROUNDS):
        a, b = _FACTORS[0] * x, _FACTORS[1] * z  # modulo 2^64, of which int64 is one half negative
        x, y = b >> 32 & _WORD ^ y ^ k, b & _WORD
        z, w = a >> 32 & _WORD ^ w ^ m, a & _WORD
        k, m = k + _STEPS[0] & _WORD, m + _STEPS[1] & _WORD
    return x, y, z, w


def _least(p: float) -> int:
    """The least word of an element that is kept."""
    return min(round(p * 2**32), _WORD)


@functools.cache
def _kernel(dtype: torch.dtype, add: bool) -> Kernel:
    parameters: dict[str, torch.dtype | str] = {"in": dtype, "out": dtype, "seed": torch.int64}
    parameters |= {"count": "int64", "least": "int64", "stream": "int32", "scale": "float32"}
    name = f"dropout<{CUDA_NAMES[dtype]},{str(add).lower()}>"
    return Kernel("dropout.cu", name, parameters | {"aligned": "int32"})
