"""The ops that are examined: inputs, ours, what Hugging Face runs instead, and the definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from barqtrain_hf.ops import (
    apply_rope,
    geglu,
    gelu,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)
from barqtrain_hf.ops.rms_norm import rms_norm_reference

EPS = 1e-6
IGNORED = -100
Tensors = tuple[torch.Tensor, ...]


class Draw:
    """Where a case takes its inputs from: the same numbers for the same seed.

    Args:
        dtype, device: of the inputs.
        seed: of their numbers.
        large: whether they are to keep a GPU busy, or only to be compared.
        scale: divides the number of rows of large inputs, for GPUs with little memory.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, seed: int, large: bool, scale: int = 1
    ) -> None:
        self.dtype, self.device, self.large, self.scale = dtype, device, large, scale
        self.generator = torch.Generator(device).manual_seed(seed)

    def size(self, small: tuple[int, ...], large: tuple[int, ...]) -> tuple[int, ...]:
        """A shape; the first number of ``large`` counts rows."""
        return (max(1, large[0] // self.scale), *large[1:]) if self.large else small

    def leaf(self, *shape: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
        """Normal numbers that ask for a gradient."""
        numbers = torch.randn(shape, generator=self.generator, device=self.device)
        return (mean + deviation * numbers).to(self.dtype).requires_grad_()


@dataclass(frozen=True)
class Case:
    """One op with one set of options.

    ``ours`` takes a ``backend`` beside the inputs; all three return one tensor or several. ``exact`` is
    given the inputs in fp64.
    """

    name: str
    inputs: tuple[str, ...]  # names of those with gradients, which come first
    make: Callable[[Draw], Tensors]
    ours: Callable[..., Any]
    stock: Callable[..., Any]
    exact: Callable[..., Any]


def cases() -> list[Case]:
    """Every op that is put into models, with the options that choose other kernels or other arithmetic."""
    return [*_norms(), *_activations(), *_rope(), *_losses()]


def _norms() -> list[Case]:
    def make(draw: Draw, full: int = 1, mean: float = 1.0, bias: bool = False) -> Tensors:
        rows, dim = draw.size((257, 1000), (16384, 4096))
        vectors = [draw.leaf(dim, mean=mean, deviation=0.1)]
        vectors += [draw.leaf(dim)] if bias else []
        return (*(draw.leaf(rows, dim) for _ in range(full)), *vectors)

    def rms(x: torch.Tensor, weight: torch.Tensor, backend: Any, **options: Any) -> Any:
        return rms_norm(x, weight, EPS, backend=backend, **options)

    def stock(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> Any:
        return rms_norm_reference(x, weight, EPS, **options)  # transformers' own formulas

    def exact(x: torch.Tensor, weight: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (offset + weight)

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    one, two = ("x", "weight"), ("x", "residual", "weight")
    return [
        Case("rms_norm", one, make, rms, stock, exact),
        Case(
            "rms_norm zero-centred",
            one,
            partial(make, mean=0.0),
            partial(rms, zero_centered=True),
            partial(stock, zero_centered=True),
            partial(exact, offset=1.0),
        ),
        Case(
            "rms_norm rounded once",
            one,
            make,
            partial(rms, round_once=True),
            partial(stock, round_once=True),
            exact,
        ),
        Case(
            "rms_norm + residual",
            two,
            partial(make, full=2),
            lambda x, r, w, backend: rms(x, w, backend, residual=r),
            lambda x, r, w: stock(x, w, residual=r),
            lambda x, r, w: (exact(x + r, w), x + r),
        ),
        Case(
            "layer_norm",
            ("x", "weight", "bias"),
            partial(make, bias=True),
            lambda x, w, b, backend: layer_norm(x, w, b, EPS, backend=backend),
            layer,
            layer,
        ),
        Case(
            "layer_norm + residual",
            ("x", "residual", "weight", "bias"),
            partial(make, full=2, bias=True),
            lambda x, r, w, b, backend: layer_norm(x, w, b, EPS, residual=r, backend=backend),
            lambda x, r, w, b: (layer(x + r, w, b), x + r),
            lambda x, r, w, b: (layer(x + r, w, b), x + r),
        ),
    ]


def _activations() -> list[Case]:
    def make(draw: Draw, tensors: int = 2, halves: int = 1) -> Tensors:
        rows, width = draw.size((257, 1000), (16384, 8192 // halves))
        return tuple(draw.leaf(rows, halves * width) for _ in range(tensors))

    def case(name: str, ours: Callable[..., Any], act: Callable[..., torch.Tensor]) -> Case:
        def stock(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return act(gate) * up

        return Case(name, ("gate", "up"), make, ours, stock, stock)

    def side_by_side(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    tanh, erf = partial(F.gelu, approximate="tanh"), F.gelu
    alone = partial(make, tensors=1)
    return [
        case("swiglu", swiglu, F.silu),
        Case(
            "swiglu side by side",
            ("gate and up",),
            partial(make, tensors=1, halves=2),
            swiglu,
            side_by_side,
            side_by_side,
        ),
        case("geglu tanh", geglu, tanh),
        case("geglu exact", partial(geglu, approximate="none"), erf),
        Case("gelu tanh", ("x",), alone, partial(gelu, approximate="tanh"), tanh, tanh),
        Case("gelu exact", ("x",), alone, gelu, erf, erf),
    ]


def _rope() -> list[Case]:
    def make(draw: Draw, part: int = 1) -> Tensors:
        batch, length, heads, key_heads, dim = draw.size((2, 67, 8, 2, 64), (4, 4096, 32, 8, 128))
        # As projections leave them: heads side by side in a token, seen transposed.
        q, k = (
            draw.leaf(batch, length, number, dim).detach().transpose(1, 2).requires_grad_()
            for number in (heads, key_heads)
        )
        rotary = dim // part
        frequencies = 10_000.0 ** -(torch.arange(0, rotary, 2, device=draw.device) / rotary)
        angles = torch.arange(length, device=draw.device).outer(frequencies)
        return q, k, *_tables(angles.repeat(1, 2), draw)

    def make_interleaved(draw: Draw) -> Tensors:
        q, k, cos, sin = make(draw)
        half = cos.shape[-1] // 2
        return q, k, *(table[..., :half].repeat_interleave(2, dim=-1) for table in (cos, sin))

    def stock_partial(q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any) -> Any:
        n = cos.shape[-1]
        turned = modeling_llama.apply_rotary_pos_emb(q[..., :n], k[..., :n], cos, sin)
        return tuple(
            torch.cat((t, x[..., n:]), dim=-1) for t, x in zip(turned, (q, k), strict=True)
        )

    def ours(*inputs: torch.Tensor, backend: Any, **options: Any) -> Any:
        return apply_rope(*inputs, backend=backend, **options)

    names = ("q", "k")
    llama = modeling_llama.apply_rotary_pos_emb
    exact_interleaved = partial(_exact_rope, interleaved=True)
    return [
        Case("rope half-split", names, make, ours, llama, _exact_rope),
        Case(
            "rope interleaved",
            names,
            make_interleaved,
            partial(ours, interleaved=True),
            modeling_cohere.apply_rotary_pos_emb,
            exact_interleaved,
        ),
        Case("rope partial", names, partial(make, part=2), ours, stock_partial, _exact_rope),
    ]


def _tables(angles: torch.Tensor, draw: Draw) -> Tensors:
    return angles.cos().to(draw.dtype)[None], angles.sin().to(draw.dtype)[None]


def _exact_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
) -> Tensors:
    n = cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = (
            (x[..., :n:2], x[..., 1:n:2]) if interleaved else x[..., :n].chunk(2, dim=-1)
        )
        other = (-second, first)
        paired = torch.stack(other, dim=-1).flatten(-2) if interleaved else torch.cat(other, dim=-1)
        return torch.cat((x[..., :n] * cos + paired * sin, x[..., n:]), dim=-1)

    return turn(q), turn(k)


def _losses() -> list[Case]:
    def make(draw: Draw) -> Tensors:
        rows, hidden, vocabulary = draw.size((303, 256, 1000), (4096, 2048, 32_000))
        shape, device = (rows,), draw.device
        target = torch.randint(vocabulary, shape, generator=draw.generator, device=device)
        target[:: max(2, rows // 16)] = IGNORED
        return (
            draw.leaf(rows, hidden),
            draw.leaf(vocabulary, hidden, deviation=2 * hidden**-0.5),
            target,
        )

    def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product = F.linear(hidden, weight)
        return product if product.dtype is torch.float64 else product.float()

    def stock(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits(hidden, weight), target, ignore_index=IGNORED, reduction="sum"
        )

    def stock_tokens(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Tensors:
        log_probs = F.log_softmax(logits(hidden, weight), dim=-1)
        valid = target != IGNORED
        chosen = log_probs.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1) * valid
        entropy = -(log_probs.exp() * log_probs).sum(-1) * valid
        return -chosen.sum(), chosen.detach(), entropy.detach()

    def ours(*inputs: torch.Tensor, backend: Any) -> Any:
        return linear_cross_entropy(*inputs, reduction="sum", backend=backend)

    def ours_tokens(*inputs: torch.Tensor, backend: Any) -> Tensors:
        loss, tokens = linear_cross_entropy(
            *inputs, reduction="sum", per_token=True, backend=backend
        )
        return loss, tokens.log_prob, tokens.entropy

    names = ("hidden", "weight")
    return [
        Case("linear_cross_entropy", names, make, ours, stock, stock),
        Case("… with statistics", names, make, ours_tokens, stock_tokens, stock_tokens),
    ]
