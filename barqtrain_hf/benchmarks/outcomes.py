"""What implementations give: results and gradients, how far apart they are, and the graph behind them."""

from __future__ import annotations

from typing import Any

import torch

from barqtrain_hf.benchmarks.elementwise_anchors import Implementation, Tensors

# A rival that is further from stock than this computes something else: its call would be wrong.
_TOLERANCE = 0.05


def results(
    implementation: Implementation, originals: Tensors, upstream_dtype: torch.dtype | None = None
) -> Tensors:
    """Outputs and gradients for upstream gradients that are the same at every call."""
    inputs = implementation.prepare(copies(originals))
    outputs = as_tuple(implementation.call(*inputs))
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = []
    for y in outputs:
        noise = torch.randn(y.shape, device=y.device, generator=generator)
        upstream.append(noise.to(upstream_dtype or y.dtype).to(y.dtype))
    gradients = torch.autograd.grad(outputs, trained(inputs), upstream)
    return tuple(t.detach() for t in (*outputs, *gradients))


def check(found: Tensors, expected: Tensors) -> None:
    """Refuses results of another function.

    Raises:
        ValueError: one differs by 5 % or more.
    """
    worst = max(errors(found, expected))
    if not worst < _TOLERANCE:  # NaN is not
        raise ValueError(f"its result differs from stock's by {worst:.2g}")


def errors(values: Tensors, exact: Tensors) -> list[float]:
    """‖x − x64‖ / ‖x64‖ of each."""
    return [
        float(torch.linalg.vector_norm(value.to(other.dtype) - other, dtype=torch.float64))
        / float(torch.linalg.vector_norm(other, dtype=torch.float64))
        for value, other in zip(values, exact, strict=True)
    ]


def nodes(out: torch.Tensor) -> list[Any]:
    """The nodes of autograd's graph behind a result, each once."""
    found: dict[Any, None] = {}
    todo = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = None
            todo += [parent for parent, _ in node.next_functions]
    return list(found)


def copies(inputs: Tensors) -> Tensors:
    """Leaves with the same values, trained where the originals are."""
    return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)


def trained(inputs: Tensors) -> Tensors:
    """Those that want gradients."""
    return tuple(t for t in inputs if t.requires_grad)


def as_tuple(outputs: Any) -> Tensors:
    """What a call gave, one tensor or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
