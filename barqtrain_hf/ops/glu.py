"""Gated and plain activations of an MLP (Shazeer 2020, arXiv:2002.05202; GELU: arXiv:1606.08415).

    swiglu(g, u) = silu(g) * u,   silu(g) = g * sigmoid(g)
    geglu(g, u)  = gelu(g) * u,   gelu(g) = g * Phi(g), Phi the normal distribution or a tanh near it
    dg = dy * u * act'(g),  du = dy * act(g)

The activation is rounded to the input's type before it is multiplied, as PyTorch does. Only g and u are
kept for the backward pass, which computes the activation again. [N, I] elements cost 3·N·I of memory
traffic forward and 5·N·I backward in ``cuda/glu.cu``; `gelu` alone 2·N·I and 3·N·I. Up to 2^20 elements on a
GPU, where host time is all that counts, PyTorch's kernels run; ``backend="cuda"`` does not take them.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F

from barqtrain_hf.errors import ArgumentError
from barqtrain_hf.ops._backend import CUDA_NAMES, Backend, check_dtypes, small, use_cuda
from barqtrain_hf.runtime import Kernel

Approximation = Literal["none", "tanh"]
# Activation of glu.cu, in its order.
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_BACKWARD_THREADS = 256
# Threads of a block and vectors of a thread forward, as in glu.cu.
_FORWARD = {"silu": (1024, 1), "gelu": (256, 2), "gelu_tanh": (1024, 1)}


def swiglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, backend: Backend = "auto"
) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate: [..., I], or [..., 2·I] with the gate's half first if ``up`` is None.
        up: [..., I] of gate's dtype, or None.
        backend: "cuda" for the kernel, "torch" for the reference, "auto" for the kernel where it runs.

    Returns:
        [..., I] in gate's dtype.

    Raises:
        ArgumentError: shapes or dtypes that differ, an odd last dimension where ``up`` is None.
        ArgumentTypeError: a dtype that is not fp32, fp16 or bf16.
        UnsupportedError: ``backend="cuda"`` where the kernel cannot run.
    """
    return _gated("swiglu", "silu", gate, up, backend)


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    approximate: Approximation = "tanh",
    backend: Backend = "auto",
) -> torch.Tensor:
    """``gelu(gate) * up``; arguments, result and errors as :func:`swiglu`, ``approximate`` as F.gelu."""
    return _gated("geglu", _gelu_name("geglu", approximate), gate, up, backend)


def gelu(
    x: torch.Tensor, *, approximate: Approximation = "none", backend: Backend = "auto"
) -> torch.Tensor:
    """``F.gelu(x, approximate=approximate)`` for [...] of fp32, fp16 or bf16; errors as :func:`swiglu`."""
    check_dtypes("gelu", x=x.dtype)
    activation = _gelu_name("gelu", approximate)
    # In fp32 arithmetic is what it costs, and PyTorch's kernel needs no less of it.
    stock = backend == "auto" and (x.dtype is torch.float32 or small(x))
    if not stock and use_cuda("gelu", backend, x, None):
        return _apply(activation, x, None, False)
    return activation_reference(activation, x)


def activation_reference(activation: str, x: torch.Tensor) -> torch.Tensor:
    """The definition of ``"silu"``, ``"gelu"`` and ``"gelu_tanh"`` in plain PyTorch."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def glu_reference(activation: str, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """The definition of the gated ops in plain PyTorch."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return activation_reference(activation, gate) * up


def _gelu_name(op: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"{op}: approximate={approximate!r} must be 'none' or 'tanh'.")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _gated(
    op: str, activation: str, gate: torch.Tensor, up: torch.Tensor | None, backend: Backend
) -> torch.Tensor:
    check_dtypes(op, gate=gate.dtype)
    unsupported = None
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ArgumentError(
                f"{op}: gate of shape {tuple(gate.shape)} cannot be halved; pass up, or gate and up "
                "side by side in the last dimension."
            )
    elif up.shape != gate.shape or up.dtype is not gate.dtype:
        raise ArgumentError(
            f"{op}: up is {up.dtype} {tuple(up.shape)} and gate {gate.dtype} {tuple(gate.shape)}; "
            "they must be alike."
        )
    elif up.get_device() != gate.get_device():
        unsupported = f"up is on {up.device} and gate on {gate.device}."
    if not (backend == "auto" and small(gate)) and use_cuda(op, backend, gate, unsupported):
        return _apply(activation, gate, up, True)
    return glu_reference(activation, gate, up)


def _apply(
    activation: str, gate: torch.Tensor, up: torch.Tensor | None, gated: bool
) -> torch.Tensor:
    # Outside the Function, so that autograd knows of the copies it may save.
    gate, up = _geometry(gate, up, gated)[:2]
    if torch.compiler.is_compiling():
        return torch.ops.barq.glu(gate, up, activation, gated)  # type: ignore[no-any-return]
    return _GLU.apply(gate, up, activation, gated)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, activation: str, gated: bool
    ) -> torch.Tensor:
        y = _forward(gate, up, activation, gated)
        if up is None:
            ctx.save_for_backward(gate)
        else:
            ctx.save_for_backward(gate, up)
        ctx.activation, ctx.gated = activation, gated
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, *rest = ctx.saved_tensors
        up = rest[0] if rest else None
        if torch.is_grad_enabled():  # create_graph: the gradient's own graph, through the reference
            return *_differentiable(ctx.activation, ctx.gated, gate, up, dy), None, None
        dgate, dup = _backward(dy, gate, up, ctx.activation, ctx.gated)
        return dgate, dup, None, None


def _differentiable(
    activation: str, gated: bool, gate: torch.Tensor, up: torch.Tensor | None, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    inputs = [
        t if t.requires_grad else t.detach().requires_grad_() for t in (gate, up) if t is not None
    ]
    if gated:
        y = glu_reference(activation, inputs[0], inputs[1] if up is not None else None)
    else:
        y = activation_reference(activation, inputs[0])
    grads = torch.autograd.grad(y, inputs, dy, create_graph=True)
    return grads[0], grads[1] if up is not None else None


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x with rows of one stride, copied if it has none, and that stride; 0 where x is contiguous."""
    if x.is_contiguous():
        return x, 0
    strides, shape = x.stride(), x.shape
    regular = (
        x.dim() > 1
        and strides[-1] == 1
        and strides[-2] >= shape[-1]
        and all(strides[d] == strides[d + 1] * shape[d + 1] for d in range(x.dim() - 2))
    )
    return (x, strides[-2]) if regular else (x.contiguous(), 0)


def _geometry(
    gate: torch.Tensor, up: torch.Tensor | None, gated: bool
) -> tuple[torch.Tensor, torch.Tensor | None, int, int, int, int]:
    """Both inputs as the kernel takes them, its columns, and the strides of gate, up and gradients."""
    if gated and up is None:
        gate, wide = gate.contiguous(), gate.shape[-1]
        return gate, None, wide // 2, wide, wide, wide
    gate, gate_stride = _rows(gate)
    if up is None:
        return (
            (gate, None, gate.numel(), 0, 0, 0)
            if not gate_stride
            else (gate, None, gate.shape[-1], gate_stride, 0, gate.shape[-1])
        )
    up, up_stride = _rows(up)
    if not gate_stride and not up_stride:
        return gate, up, gate.numel(), 0, 0, 0
    columns = gate.shape[-1]
    return gate, up, columns, gate_stride or columns, up_stride or columns, columns


def _forward(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, gated: bool
) -> torch.Tensor:
    gate, up, columns, gate_stride, up_stride, _ = _geometry(gate, up, gated)
    halves = gated and up is None
    shape = (*gate.shape[:-1], columns) if halves else gate.shape
    y = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        first = gate.data_ptr()
        second = first + columns * gate.element_size() if halves else 0
        if up is not None:
            second = up.data_ptr()
        aligned = not (first | second) % 16
        kernel, vec = _kernel(
            "forward", gate.dtype, activation, gated, aligned, columns, gate_stride, up_stride
        )
        threads, vectors = _FORWARD[activation]
        chunks = -(-columns // (vec * threads * vectors))
        if columns != y.numel():
            # Rows: smaller blocks share each of them evenly, with few idle threads.
            chunks = -(-columns // (vec * min(threads, 512) * vectors))
            threads = -(-columns // (vec * vectors * chunks * 32)) * 32
        grid = (y.numel() // columns * chunks, 1, 1)
        pointers = (first, second, y.data_ptr())
        scalars = (columns, gate_stride, up_stride, chunks)
        kernel.launch(gate.get_device(), grid, (threads, 1, 1), *pointers, *scalars)
    return y


def _backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, gated: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dy = dy.contiguous()
    gate, up, columns, gate_stride, up_stride, grad_stride = _geometry(gate, up, gated)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dy.numel():
        inputs, outputs = [gate.data_ptr(), 0], [dgate.data_ptr(), 0]
        if up is not None and dup is not None:
            inputs[1], outputs[1] = up.data_ptr(), dup.data_ptr()
        elif gated:
            half = columns * gate.element_size()
            inputs[1], outputs[1] = inputs[0] + half, outputs[0] + half
        aligned = not (dy.data_ptr() | inputs[0] | inputs[1] | outputs[1]) % 16
        kernel, vec = _kernel(
            "backward", gate.dtype, activation, gated, aligned, columns, gate_stride, up_stride
        )
        chunks = -(-columns // (vec * _BACKWARD_THREADS))
        grid = (dy.numel() // columns * chunks, 1, 1)
        pointers = (dy.data_ptr(), *inputs, *outputs)
        scalars = (columns, gate_stride, up_stride, grad_stride, chunks)
        kernel.launch(gate.get_device(), grid, (_BACKWARD_THREADS, 1, 1), *pointers, *scalars)
    return dgate, dup


def _kernel(
    direction: str, dtype: torch.dtype, activation: str, gated: bool, aligned: bool, *sizes: int
) -> tuple[Kernel, int]:
    """The kernel for these types and its vector length; ``sizes`` must be whole vectors to have any."""
    vec = 16 // dtype.itemsize
    if not aligned or any(size % vec for size in sizes):
        vec = 1
    return _built(direction, dtype, activation, gated, vec), vec


@functools.cache
def _built(direction: str, dtype: torch.dtype, activation: str, gated: bool, vec: int) -> Kernel:
    forward = direction == "forward"
    pointers = ("gate", "up", "y") if forward else ("dy", "gate", "up", "dgate", "dup")
    strides = ("gate_stride", "up_stride") + (() if forward else ("grad_stride",))
    parameters: dict[str, torch.dtype | str] = dict.fromkeys(pointers, dtype)
    parameters |= dict.fromkeys(("columns", *strides), "int64") | {"chunks": "int32"}
    number, flag = _ACTIVATIONS.index(activation), str(gated).lower()
    name = f"glu_{direction}<{CUDA_NAMES[dtype]},{number},{flag},{vec}>"
    return Kernel("glu.cu", name, parameters)


# torch.compile traces these instead of the Function above: opaque to it, so no graph break.
@torch.library.custom_op("barq::glu", mutates_args=(), device_types="cuda")
def _glu_op(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, gated: bool
) -> torch.Tensor:
    return _forward(gate, up, activation, gated)


@_glu_op.register_fake
def _(gate: torch.Tensor, up: torch.Tensor | None, activation: str, gated: bool) -> torch.Tensor:
    halves = gated and up is None
    shape = (*gate.shape[:-1], gate.shape[-1] // 2) if halves else gate.shape
    return torch.empty(shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("barq::glu_backward", mutates_args=(), device_types="cuda")
def _glu_backward_op(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = _backward(dy, gate, up, activation, gated)
    return dgate, dgate.new_empty(0) if dup is None else dup


@_glu_backward_op.register_fake
def _(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dup = (0,) if up is None else up.shape
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return dgate, torch.empty(dup, dtype=gate.dtype, device=gate.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation, ctx.gated = inputs
    ctx.gate_only = up is None
    ctx.save_for_backward(*(t for t in (gate, up) if t is not None))


def _op_backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    gate, *rest = ctx.saved_tensors
    up = rest[0] if rest else None
    dgate, dup = torch.ops.barq.glu_backward(dy, gate, up, ctx.activation, ctx.gated)
    return dgate, None if ctx.gate_only else dup, None, None


_glu_op.register_autograd(_op_backward, setup_context=_setup_context)
